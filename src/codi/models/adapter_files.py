"""Adapters on disk: a folder with config.json, safetensors, and what else belongs to it.

config.json, diffusion_pytorch_model.safetensors    the adapter itself; config.json's info.files lists the other files
pytorch_lora_weights.safetensors                    its low-rank updates of the backbone, if it has any
unet/ or transformer/                               the backbone trained with it (full CoDi only)
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors.torch import load_file

from ..errors import UserError, one_line
from .adapter import FORMS, Adapter
from .backbones import (
    EMBEDDED,
    FAMILIES,
    digest_weights,
    find_model,
    require_buildable,
    require_finite,
    require_safetensors,
)
from .checksums import find_fault
from .lora import FILE, load_lora

ADAPTERS = "adapters"  # of a model's folder: its own ones, a folder each


def libraries(model: str | Path = "mini") -> list[Path]:
    """The folders whose adapters go by their names with `model`: its own, and mini's, which fine-tunes of it take too,
    unless it is another embedded model."""
    own, minis = Path(find_model(model)) / ADAPTERS, EMBEDDED / ADAPTERS
    return [own] if own.parent.parent == EMBEDDED and own.is_dir() else [own, minis]


def find_adapter(name: str | Path, model: str | Path = "mini") -> Path:
    """The name of an adapter that `model` has (see libraries), or a folder -> the folder."""
    named = (library / str(name) for library in libraries(model))
    return next((folder for folder in named if (folder / "config.json").is_file()), Path(name))


def fitting_adapter(name: str | Path, network: Any, family: str, model: str | Path = "mini") -> Path:
    """Return the folder that find_adapter does, but of the embedded adapters of a name the one that was trained on the
    weights of `network`, wherever they came from. Warns where an embedded one was trained on other weights of the same
    family, which a fine-tune has."""
    found = find_adapter(name, model)
    kind = _stated(found)
    if (
        (found / "config.json").is_file()
        and not found.is_relative_to(EMBEDDED)  # a folder of the user's
        or kind.get("family", family) != family
    ):
        return found
    weights = network.state_dict()
    if any(value.is_meta for value in weights.values()):
        if not any(hasattr(part, "_hf_hook") for part in network.modules()):
            return found  # never loaded: only its shape is of use
        weights = get_state_dict_offloaded_model(network)
    mine = digest_weights(weights)
    mine = _rounded_digests(EMBEDDED).get(mine, mine)
    for library in (EMBEDDED / ADAPTERS, *sorted(EMBEDDED.glob(f"*/{ADAPTERS}"))):
        if _stated(library / str(name)).get("backbone") == mine:
            return library / str(name)
    if kind.get("backbone"):
        warnings.warn(
            f"{name}: this adapter was trained on the backbone {kind['backbone']} "
            f"({(kind.get('recipe') or {}).get('model', 'unnamed')}), and the weights of this model are {mine}: "
            "results are good only if it is a fine-tune of that one",
            stacklevel=3,
        )
    return found


@functools.lru_cache(maxsize=1)
def _rounded_digests(embedded: Path) -> dict[str, str]:
    """Return, for the digest of each embedded network rounded to bfloat16, as a copy may be stored, its own digest."""
    found = {}
    for file in embedded.glob("*/*/diffusion_pytorch_model.safetensors"):
        if file.parent.name in {kind.component for kind in FAMILIES}:
            weights = load_file(file)
            found[digest_weights({key: value.bfloat16() for key, value in weights.items()})] = digest_weights(weights)
    return found


def _stated(folder: Path) -> dict[str, Any]:
    """Return the `info` of an adapter's configuration, {} where it cannot be read: read_config says what is wrong."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return dict(json.loads((folder / "config.json").read_text())["info"])
    return {}


def default_model(adapter: str | Path) -> str:
    """Return the embedded model for an adapter by its name, by default the task's, or its folder: "photo" for its own
    ones and for folders that say that they were trained on it, "mini" otherwise."""
    config = Path(adapter) / "config.json"
    if config.is_file():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # load_adapter says what is wrong
            model = json.loads(config.read_text())["info"]["recipe"]["model"]
            return "photo" if model == "photo" else "mini"
        return "mini"
    return "photo" if (EMBEDDED / "photo" / ADAPTERS / adapter / "config.json").is_file() else "mini"


def own_network(folder: Path) -> Path | None:
    """The folder of the network that a full adapter brings; None for other adapters."""
    names = (kind.component for kind in FAMILIES)
    return next((folder / name for name in names if _has(folder, f"{name}/config.json")), None)


def _has(folder: Path, name: str) -> bool:
    """Return whether an adapter has a file, which its list of files, if there is one, must name."""
    return (folder / name).is_file() and name in _stated(folder).get("files", (name,))


def load_adapter(
    name: str | Path,
    task: str | None,
    family: str | None,
    network: Any,
    model: str | Path = "mini",
) -> tuple[Adapter, Any]:
    """Loads an adapter folder (config.json + safetensors), or one that `model` has, in float32 -> (adapter, the network
    it works with).

    A full adapter brings its own trained network; one with low-rank updates a copy of `network` that shares its weights
    and carries them under the task's name; otherwise the second answer is `network` itself, which never changes.
    Raises UserError where it is missing, broken, made for another `task`, or for another backbone `family`
    (None: not checked).
    """
    folder, cls, config = read_config(name, task, family, model)
    if fault := _find_fault(folder, cls, config.get("info") or {}):
        raise UserError(f"{folder}: {fault}: fetch or train the adapter again")
    adapter = _weights(cls, folder)
    if own := own_network(folder):
        network = _weights(type(network), own).to(device=network.device, dtype=network.dtype)
    elif _has(folder, FILE):
        network = _updates(network, folder, str((config.get("info") or {}).get("task", "adapter")))
    return adapter, network


def read_config(
    name: str | Path, task: str | None, family: str | None, model: str | Path = "mini"
) -> tuple[Path, type[Adapter], dict[str, Any]]:
    """An adapter's folder, form and configuration; no weight is read. Raises UserError as load_adapter does."""
    folder = find_adapter(name, model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        shipped = sorted({p.parent.name for library in libraries(model) for p in library.glob("*/config.json")})
        raise UserError(
            f"{name}: no adapter there (no config.json): give a folder or one of {', '.join(shipped) or '(none)'}"
        )
    try:
        config = json.loads(config_file.read_text())
        cls = {c.__name__: c for c in FORMS.values()}[config["_class_name"]]
        info = dict(config.get("info") or {})
        _require_sound(config, info)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{config_file}: not an adapter's config ({one_line(repr(error))}): train or fetch the adapter again"
        ) from error
    if family and info.get("family") and info["family"] != family:
        raise UserError(
            f"{name}: this adapter was trained for backbone {info['family']}, the model given is {family}: "
            "use the model it was trained on (or a fine-tune of it), or train an adapter for this one"
        )
    if task and info.get("task") and info["task"] != task:
        raise UserError(f"{name}: this adapter does {info['task']!r}, not {task!r}: give an adapter of that task")
    return folder, cls, config


# Of an adapter's numbers, the least and the most.
_SHAPE = {"condition_channels": (3, 64), "guidance_scales": (0, 2), "downscale": (1, 64), "depth": (1, 1_000)}
_NUMBERS = dict.fromkeys(("guidance_scale", "image_guidance_scale", "embedded_guidance"), (0, 1e6)) | {
    "shift": (1e-6, 1e6)
}


def _require_sound(config: dict[str, Any], info: dict[str, Any]) -> None:
    """Raise ValueError for a value of the wrong type or out of range in an adapter's configuration."""

    def positive(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < math.inf

    for values, ranges, kinds in ((config, _SHAPE, (int,)), (info, _NUMBERS, (int, float))):
        for key, (low, high) in ranges.items():
            if values.get(key) is not None and not (type(values[key]) in kinds and low <= values[key] <= high):
                raise ValueError(f"{key} is {values[key]!r}")
    for kind, keys in ((dict, ("task_options", "recipe", "guidance")), (str, ("task", "family", "backbone", "colour"))):
        for key in keys:
            if info.get(key) is not None and not isinstance(info[key], kind):
                raise ValueError(f"{key} is {info[key]!r}")
    for key, span in (info.get("guidance") or {}).items():
        if not isinstance(span, list) or len(span) != 2 or not all(map(positive, span)) or span[0] > span[1]:
            raise ValueError(f"guidance of {key} is {span!r}")


def _find_fault(folder: Path, cls: type[Adapter], info: dict[str, Any]) -> str | None:
    """Return what an adapter lacks, None for nothing. Older ones do not list their files."""
    if "files" in info:
        fault = find_fault(folder, info["files"])
        if fault or (fault := _unlisted(folder, info["files"])):
            return fault
    if info.get("full"):
        return None if own_network(folder) else "the network that belongs to it is missing"
    bare = cls is FORMS["lora"] and "files" not in info  # a complete list says that there are no updates
    updates = bare or (info.get("recipe") or {}).get("lora_rank")
    return f"{FILE} is missing" if updates and not _has(folder, FILE) and not own_network(folder) else None


def _unlisted(folder: Path, files: dict[str, str]) -> str | None:
    """Return what is wrong where diffusers would read weights that `files` does not list, None for nothing."""
    for part in filter(None, (folder, own_network(folder))):
        for file in sorted(part.glob("diffusion_pytorch_model*")):
            if (name := file.relative_to(folder).as_posix()) not in files:
                return f"{name} is not in its list of files"
    return None


def _updates(network: Any, folder: Path, name: str) -> Any:
    try:
        adapted = load_lora(network, folder, name)
    except Exception as error:  # peft, diffusers and safetensors raise many kinds
        raise UserError(f"{folder / FILE}: the low-rank updates could not be read ({one_line(error)}): "
                        "train or fetch the adapter again") from error  # fmt: skip
    require_finite(adapted, str(folder / FILE))
    return adapted


def _weights(cls: Any, folder: Path) -> Any:
    require_safetensors(folder)
    require_buildable(folder)
    try:
        module, report = cls.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # diffusers would leave them random
            raise ValueError(f"weight {sorted(report['missing_keys'])[0]!r} is missing")
    except Exception as error:  # diffusers and safetensors raise many kinds; the user needs one line
        raise UserError(
            f"{folder}: the weights could not be read ({one_line(error)}): train or fetch the adapter again"
        ) from error
    require_finite(module, str(folder))
    return module
