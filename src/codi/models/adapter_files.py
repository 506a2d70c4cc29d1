"""Adapters on disk: find, check and load the folder of an adapter.

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

ADAPTERS = "adapters"  # in a model's folder: its adapters, one subfolder each


def adapter_folders(model: str | Path = "mini") -> list[Path]:
    """Return the folders in which adapters of `model` are found by name: its own, and, unless it is another embedded
    model, that of mini, whose adapters also fit fine-tunes of mini."""
    own, of_mini = Path(find_model(model)) / ADAPTERS, EMBEDDED / ADAPTERS
    return [own] if own.parent.parent == EMBEDDED and own.is_dir() else [own, of_mini]


def find_adapter(name: str | Path, model: str | Path = "mini") -> Path:
    """Return the folder of an adapter, given its name among those of `model` (see adapter_folders) or the folder
    itself."""
    candidates = (parent / str(name) for parent in adapter_folders(model))
    return next((folder for folder in candidates if (folder / "config.json").is_file()), Path(name))


def fitting_adapter(name: str | Path, network: Any, family: str, model: str | Path = "mini") -> Path:
    """Return the folder of an adapter as find_adapter does, but among embedded adapters of the same name prefer the one
    trained on exactly the weights of `network`. Warns if only an embedded adapter for other weights of the same family
    exists, as is the case for a fine-tune."""
    folder = find_adapter(name, model)
    info = _read_info(folder)
    if (
        (folder / "config.json").is_file()
        and not folder.is_relative_to(EMBEDDED)  # a folder of the user's
        or info.get("family", family) != family
    ):
        return folder
    weights = network.state_dict()
    if any(value.is_meta for value in weights.values()):
        if not any(hasattr(part, "_hf_hook") for part in network.modules()):
            return folder  # the weights were never loaded, as in a dry run
        weights = get_state_dict_offloaded_model(network)
    digest = digest_weights(weights)
    digest = _rounded_digests(EMBEDDED).get(digest, digest)
    for parent in (EMBEDDED / ADAPTERS, *sorted(EMBEDDED.glob(f"*/{ADAPTERS}"))):
        if _read_info(parent / str(name)).get("backbone") == digest:
            return parent / str(name)
    if info.get("backbone"):
        warnings.warn(
            f"{name}: this adapter was trained on the backbone {info['backbone']} "
            f"({(info.get('recipe') or {}).get('model', 'unnamed')}), and the weights of this model are {digest}: "
            "results are good only if it is a fine-tune of that one",
            stacklevel=3,
        )
    return folder


@functools.lru_cache(maxsize=1)
def _rounded_digests(embedded: Path) -> dict[str, str]:
    """Map the digest of each embedded network rounded to bfloat16, as a copy may be stored, to its own digest."""
    digests = {}
    for file in embedded.glob("*/*/diffusion_pytorch_model.safetensors"):
        if file.parent.name in {kind.component for kind in FAMILIES}:
            weights = load_file(file)
            digests[digest_weights({key: value.bfloat16() for key, value in weights.items()})] = digest_weights(weights)
    return digests


def _read_info(folder: Path) -> dict[str, Any]:
    """Return `info` of an adapter's configuration, or {} if it cannot be read; read_config reports the error."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return dict(json.loads((folder / "config.json").read_text())["info"])
    return {}


def default_model(adapter: str | Path) -> str:
    """Return the embedded model for an adapter, given its name (by default that of the task) or folder: "photo" for the
    adapters of photo and for folders whose recipe names it, otherwise "mini"."""
    config = Path(adapter) / "config.json"
    if config.is_file():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # load_adapter reports the error
            model = json.loads(config.read_text())["info"]["recipe"]["model"]
            return "photo" if model == "photo" else "mini"
        return "mini"
    return "photo" if (EMBEDDED / "photo" / ADAPTERS / adapter / "config.json").is_file() else "mini"


def own_network(folder: Path) -> Path | None:
    """Return the folder of the network that a full adapter includes; None for other adapters."""
    names = (kind.component for kind in FAMILIES)
    return next((folder / name for name in names if _has_file(folder, f"{name}/config.json")), None)


def _has_file(folder: Path, name: str) -> bool:
    """Return True if an adapter has this file and its list of files, if any, names it."""
    return (folder / name).is_file() and name in _read_info(folder).get("files", (name,))


def load_adapter(
    name: str | Path,
    task: str | None,
    family: str | None,
    network: Any,
    model: str | Path = "mini",
) -> tuple[Adapter, Any]:
    """Load an adapter in float32, given its folder or its name among those of `model`; return it and its network.

    The network is the adapter's own for a full adapter; for an adapter with low-rank updates, a copy of `network` that
    shares its weights and has the updates under the task's name; otherwise `network` itself, which never changes.
    Raises UserError for an adapter that is missing, broken, or made for another `task` or backbone `family` (None: not
    checked).
    """
    folder, cls, config = read_config(name, task, family, model)
    if fault := _find_fault(folder, cls, config.get("info") or {}):
        raise UserError(f"{folder}: {fault}: fetch or train the adapter again")
    adapter = _load_module(cls, folder)
    if own := own_network(folder):
        network = _load_module(type(network), own).to(device=network.device, dtype=network.dtype)
    elif _has_file(folder, FILE):
        network = _load_updates(network, folder, str((config.get("info") or {}).get("task", "adapter")))
    return adapter, network


def read_config(
    name: str | Path, task: str | None, family: str | None, model: str | Path = "mini"
) -> tuple[Path, type[Adapter], dict[str, Any]]:
    """Return an adapter's folder, class and configuration without reading weights. Raises UserError as load_adapter."""
    folder = find_adapter(name, model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        names = sorted({p.parent.name for parent in adapter_folders(model) for p in parent.glob("*/config.json")})
        raise UserError(
            f"{name}: no adapter there (no config.json): give a folder or one of {', '.join(names) or '(none)'}"
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


# Ranges (lowest, highest) of the numbers in an adapter's configuration and in its `info`.
_CONFIG_RANGES = {"condition_channels": (3, 64), "guidance_scales": (0, 2), "downscale": (1, 64), "depth": (1, 1_000)}
_INFO_RANGES = dict.fromkeys(("guidance_scale", "image_guidance_scale", "embedded_guidance"), (0, 1e6)) | {
    "shift": (1e-6, 1e6)
}


def _require_sound(config: dict[str, Any], info: dict[str, Any]) -> None:
    """Raise ValueError for a value of the wrong type or out of range in an adapter's configuration."""

    def positive(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < math.inf

    for values, ranges, types in ((config, _CONFIG_RANGES, (int,)), (info, _INFO_RANGES, (int, float))):
        for key, (low, high) in ranges.items():
            if values.get(key) is not None and not (type(values[key]) in types and low <= values[key] <= high):
                raise ValueError(f"{key} is {values[key]!r}")
    for type_, keys in (
        (dict, ("task_options", "recipe", "guidance")),
        (str, ("task", "family", "backbone", "colour")),
    ):
        for key in keys:
            if info.get(key) is not None and not isinstance(info[key], type_):
                raise ValueError(f"{key} is {info[key]!r}")
    for key, span in (info.get("guidance") or {}).items():
        if not isinstance(span, list) or len(span) != 2 or not all(map(positive, span)) or span[0] > span[1]:
            raise ValueError(f"guidance of {key} is {span!r}")


def _find_fault(folder: Path, cls: type[Adapter], info: dict[str, Any]) -> str | None:
    """Return a message that says which file of an adapter is missing or damaged, or None. Older adapters do not list
    their files."""
    if "files" in info:
        fault = find_fault(folder, info["files"])
        if fault or (fault := _find_unlisted(folder, info["files"])):
            return fault
    if info.get("full"):
        return None if own_network(folder) else "the network that belongs to it is missing"
    # An adapter of form "lora" consists of updates, unless its list of files shows that it has none.
    unlisted_lora = cls is FORMS["lora"] and "files" not in info
    needs_updates = unlisted_lora or (info.get("recipe") or {}).get("lora_rank")
    return f"{FILE} is missing" if needs_updates and not _has_file(folder, FILE) and not own_network(folder) else None


def _find_unlisted(folder: Path, files: dict[str, str]) -> str | None:
    """Return a message that names a file of weights which diffusers would read but `files` does not list, or None."""
    for part in filter(None, (folder, own_network(folder))):
        for file in sorted(part.glob("diffusion_pytorch_model*")):
            if (name := file.relative_to(folder).as_posix()) not in files:
                return f"{name} is not in its list of files"
    return None


def _load_updates(network: Any, folder: Path, name: str) -> Any:
    """Return a copy of `network` with an adapter's low-rank updates. Raises UserError if they cannot be read."""
    try:
        adapted = load_lora(network, folder, name)
    except Exception as error:  # peft, diffusers and safetensors raise many types
        raise UserError(f"{folder / FILE}: the low-rank updates could not be read ({one_line(error)}): "
                        "train or fetch the adapter again") from error  # fmt: skip
    require_finite(adapted, str(folder / FILE))
    return adapted


def _load_module(cls: Any, folder: Path) -> Any:
    """Load a model of class `cls` in float32. Raises UserError for missing, invalid or unreadable weights."""
    require_safetensors(folder)
    require_buildable(folder)
    try:
        module, report = cls.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # diffusers would initialize them at random
            raise ValueError(f"weight {sorted(report['missing_keys'])[0]!r} is missing")
    except Exception as error:  # diffusers and safetensors raise many types; the user needs one line
        raise UserError(
            f"{folder}: the weights could not be read ({one_line(error)}): train or fetch the adapter again"
        ) from error
    require_finite(module, str(folder))
    return module
