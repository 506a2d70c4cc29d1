"""Checkpoints: complete, atomic, and free of pickle.

A checkpoint is a folder `step-00000123/` of safetensors (weights, average, optimizer moments, random state) and a
`state.json` (progress, loss scale, recipe, checksums of the other files). It is written under a temporary name, flushed
to disk and renamed, and removed under another, so a folder with the final name is always whole; leftovers of a killed
run are removed by the next one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..files import OLD, WRITING, write_folder
from ..models.checksums import checksums, find_fault
from . import processes, sharding

_GONE = f"{WRITING}gone-"  # a folder that is being removed
CHECKPOINTS, STATE = "checkpoints", "state.json"


@dataclass
class Progress:
    """Progress of a run: `updates` of the optimizer, training `images` used, `seconds` spent training."""

    updates: int = 0
    images: int = 0
    seconds: float = 0.0


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name."""
    return {k: p for k, p in module.named_parameters() if p.requires_grad}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().cpu().contiguous() for k, t in tensors.items()}


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
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
    """Write `root/step-N`, remove all but the newest `keep` checkpoints, and return the folder. All processes call it;
    the first one writes."""
    weights, averages = trainable(online), dict(average.named_parameters())
    state = optimizer.state_dict()
    parts = {"weights": weights, "average": {k: averages[k] for k in weights}, "optimizer": flatten(state["state"])}
    parts = {file: sharding.gather(tensors) for file, tensors in parts.items()}
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
        files = checksums(folder, STATE)
        state = {"progress": vars(progress), "scaler": scaler, "recipe": recipe, "files": files}
        (folder / STATE).write_text(json.dumps(state, indent=1))

    write_folder(folder, fill)
    for old in complete(root)[:-keep]:
        _discard(old)
    return folder


def _discard(folder: Path) -> None:
    """Remove a folder, renamed first so that an interrupted removal leaves no checkpoint that looks complete."""
    gone = folder.with_name(f"{_GONE}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def flatten(state: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dicts of tensors and whole numbers to tensors by dotted names."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = torch.as_tensor(value)
    return flat


def complete(root: Path) -> list[Path]:
    """Return the complete checkpoints below `root`, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / STATE).is_file())


def read_state(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Return the progress of a checkpoint and its state.json. Raises UserError if the file cannot be read or holds an
    impossible value."""
    file = folder / STATE
    try:
        state = json.loads(file.read_text())
        progress = Progress(**state["progress"])
        counts = (progress.updates, progress.images)
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise ValueError(f"updates and images are {counts}")
        if isinstance(progress.seconds, bool) or not 0 <= progress.seconds < math.inf:
            raise ValueError(f"seconds is {progress.seconds}")
        scaler = state.get("scaler") or {}
        if not isinstance(state["recipe"], dict) or not all(type(value) in (int, float) for value in scaler.values()):
            raise ValueError("the recipe or the loss scale has the wrong type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "delete its folder to go on from the one before"
        raise UserError(f"{file}: not the state of a run ({one_line(repr(error))}): {fix}") from error
    return progress, state


def require_same_run(
    root: Path, recipe: Any, free: set[str], current: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> None:
    """Raise UserError if the newest checkpoint below `root` is of a different recipe (a dataclass): resuming would mix
    two runs. Keys in `free` may differ; keys that the recorded recipe lacks count as their defaults.
    `current` converts a recorded recipe to the current keys."""
    checkpoints = complete(root)
    if not checkpoints:
        return
    before = current(read_state(checkpoints[-1])[1]["recipe"])
    for field in (f for f in fields(recipe) if f.name not in free):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        values = before.get(field.name, default), getattr(recipe, field.name)
        old, new = (json.loads(json.dumps(value)) for value in values)  # a tuple comes back from the file as a list
        if old != new:
            raise UserError(
                f"{root.parent}: holds a run with {field.name} {old!r}, not {new!r}: "
                "give another --out, or the old value to go on with that run"
            )


def clean(out: Path) -> None:
    """Remove files and folders that a killed run left half-written or half-removed in `out` and its checkpoints; put
    back a folder whose replacement was interrupted between two renames."""
    root = out / CHECKPOINTS
    for left in (*out.glob(f"{WRITING}*"), *root.glob(f"{WRITING}*")):
        name = left.name.removeprefix(OLD)
        if left.name.startswith(OLD) and not left.with_name(name).exists():
            left.rename(left.with_name(name))
        else:
            shutil.rmtree(left, ignore_errors=True)
    for step in set(root.glob("step-*")) - set(complete(root)):
        shutil.rmtree(step, ignore_errors=True)


def load(
    folder: Path, online: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any]]:
    """Restore everything that `save` wrote, in place; return the progress and state.json.

    Raises UserError if the checkpoint is broken or of a run with other weights.
    """
    progress, state = read_state(folder)
    try:
        # The first process verifies for all. Old checkpoints have no checksums.
        if processes.rank() == 0 and (fault := find_fault(folder, state.get("files", {}))):
            raise ValueError(fault)
        for file, module in (("weights", online), ("average", average)):
            values, parameters = load_file(folder / f"{file}.safetensors"), dict(module.named_parameters())
            expected = trainable(online).keys()
            if values.keys() != expected:
                other = sorted(values.keys() ^ expected)[0]
                raise UserError(f"{folder}: made by a run that trains other weights ({other}): give another --out")
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(sharding.shard_like(value, parameters[name]))
        moments: dict[int, dict[str, Any]] = {}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, *names, last = key.split(".")
            entry, like = moments.setdefault(int(index), {}), trained[int(index)]
            for name in names:
                entry = entry.setdefault(name, {})
            is_count = value.ndim == 0 and value.dtype == torch.int64  # of steps, which bitsandbytes needs as a number
            sharded = sharding.shard_like(value, like) if value.shape == like.shape else value
            entry[last] = int(value) if is_count else sharded
        # Learning rates and other settings come from the recipe, not from the checkpoint.
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        random = load_file(folder / "random.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    except UserError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the checkpoint is broken ({one_line(error)}): delete it to go on from the one before"
        ) from error
    return progress, state
