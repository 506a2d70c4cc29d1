"""Checkpoints: complete, atomic, and free of pickle.

A checkpoint is a folder `step-00000123/` of safetensors (weights, average, optimiser moments, random state) and a
`state.json` (progress, optimiser settings, loss scale, recipe). It is written under a temporary name, flushed to disk
and renamed, so a folder with the final name is always whole; leftovers of a killed run are removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from . import processes, sharding

_TEMPORARY = ".writing-"


@dataclass
class Progress:
    """How far a run is. `updates` optimiser updates, `images` training images seen, `seconds` spent training."""

    updates: int = 0
    images: int = 0
    seconds: float = 0.0


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {k: p for k, p in module.named_parameters() if p.requires_grad}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().cpu().contiguous() for k, t in tensors.items()}


def write_atomically(folder: Path, fill) -> None:
    """Calls `fill(temporary)` on an empty folder beside `folder`, flushes it, then renames it over `folder`."""
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        old = folder.parent / f"{_TEMPORARY}old-{folder.name}"
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors says "no space left" in its own way
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{folder}: could not be written ({reason}): free space or change --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}, indent=2) + "\n")


def save(
    root: Path,
    progress: Progress,
    online: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    scaler: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `root/step-N`, then removes all but the newest `keep` checkpoints. Returns the folder. All processes call
    it, and the first one writes."""
    names, averages = trainable(online), dict(average.named_parameters())
    state = optimizer.state_dict()
    moments = flatten(state["state"])
    parts = {"weights": names, "average": {k: averages[k] for k in names}, "optimizer": moments}
    parts = {file: sharding.gathered(tensors) for file, tensors in parts.items()}
    folder = root / f"step-{progress.updates:08d}"
    if processes.rank():
        return folder

    def fill(folder: Path) -> None:
        for file, tensors in parts.items():
            save_file(_contiguous(tensors), folder / f"{file}.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        save_file(random, folder / "random.safetensors")
        text = json.dumps(
            {"progress": vars(progress), "groups": state["param_groups"], "scaler": scaler, "recipe": recipe}, indent=1
        )
        (folder / "state.json").write_text(text)

    write_atomically(folder, fill)
    for old in complete(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def flatten(state: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors and whole numbers -> tensors by dotted names."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = torch.as_tensor(value)
    return flat


def complete(root: Path) -> list[Path]:
    """The whole checkpoints below `root`, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / "state.json").is_file())


def require_same_run(root: Path, recipe: Any, free: set[str]) -> None:
    """Raises UserError if the newest checkpoint below `root` is of a different recipe (a dataclass): resuming would mix
    two runs. Keys in `free` may differ; one that is newer than the checkpoint had its default then."""
    found = complete(root)
    if not found:
        return
    file = found[-1] / "state.json"
    try:
        before = json.loads(file.read_text())["recipe"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: cannot be read ({error!r}): delete its folder to go on from the one before"
        ) from error
    for field in (f for f in fields(recipe) if f.name not in free):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        values = before.get(field.name, default), getattr(recipe, field.name)
        old, new = (json.loads(json.dumps(value)) for value in values)  # a tuple comes back from the file as a list
        if old != new:
            raise UserError(
                f"{root.parent}: holds a run with {field.name} {old!r}, not {new!r}: "
                "give another --out, or the old value to go on with that run"
            )


def clean(root: Path) -> None:
    """Removes what a killed run left half-written; puts back a folder caught between two renames."""
    for left in root.glob(f"{_TEMPORARY}*"):
        name = left.name.removeprefix(f"{_TEMPORARY}old-")
        if left.name.startswith(f"{_TEMPORARY}old-") and not (root / name).exists():
            left.rename(root / name)
        else:
            shutil.rmtree(left)


def load(
    folder: Path, online: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any]]:
    """Restores everything `save` wrote, in place. Returns the progress and the rest of state.json.

    Raises UserError if the checkpoint is broken or of a differently shaped run.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        for file, module in (("weights", online), ("average", average)):
            values, parameters = load_file(folder / f"{file}.safetensors"), dict(module.named_parameters())
            expected = trainable(online).keys()
            if values.keys() != expected:
                odd = sorted(values.keys() ^ expected)[0]
                raise UserError(f"{folder}: made by a run that trains other weights ({odd}): give another --out")
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(sharding.split_like(value, parameters[name]))
        moments: dict[int, dict[str, Any]] = {}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, *names, last = key.split(".")
            entry, like = moments.setdefault(int(index), {}), trained[int(index)]
            for name in names:
                entry = entry.setdefault(name, {})
            counts = value.ndim == 0 and value.dtype == torch.int64  # steps, which bitsandbytes wants as a number
            split = sharding.split_like(value, like) if value.shape == like.shape else value
            entry[last] = int(value) if counts else split
        optimizer.load_state_dict({"state": moments, "param_groups": state["groups"]})
        random = load_file(folder / "random.safetensors")
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder}: the checkpoint is broken ({reason}): delete it to go on from the one before"
        ) from error
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return Progress(**state["progress"]), state
