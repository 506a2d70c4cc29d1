"""Adapters of a saved pipeline: a folder each beside the checkpoint, and a file with the weights of the active ones."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, one_line
from ..models.adapter_files import ADAPTERS, own_network
from ..models.checksums import checksum, find_fault
from ..models.lora import FILE, add_prefix, update_names

if TYPE_CHECKING:
    from .adapter_store import LoadedAdapter

CONFIG = "config.json"
SET = "set.json"  # in the folder of adapters: {name: weight} of the active ones


def require_sources(loaded: Mapping[str, LoadedAdapter]) -> None:
    """Raise UserError if the source folder of an adapter has changed since it was loaded: its files are copied."""
    for name, adapter in loaded.items():
        if fault := _fault(adapter):
            raise UserError(f"{adapter.folder}: the adapter {name!r} was loaded from there, but {fault}: put its files "
                            "back before saving, or load the adapter again, into a new pipeline")  # fmt: skip


def _fault(adapter: LoadedAdapter) -> str | None:
    folder = adapter.folder
    if not folder.is_dir():
        return "the folder is gone"
    if not (folder / CONFIG).is_file():
        return f"{CONFIG} is missing"
    if "files" in adapter.info:
        return find_fault(folder, adapter.info["files"])
    if adapter.full and own_network(folder) is None:  # older adapters do not list their files
        return "the network that belongs to it is missing"
    patterns = ["diffusion_pytorch_model*.safetensors", *([FILE] if update_names(adapter.network) else [])]
    return next((f"{name} is missing" for name in patterns if not any(folder.glob(name))), None)


def save_adapters(
    folder: Path, loaded: Mapping[str, LoadedAdapter], weights: Mapping[str, float], component: str
) -> None:
    """Copy the adapters' files to `folder`/adapters, all or nothing. `component`: the network's name in stock
    pipelines, which old files of low-rank updates lack."""
    target, temporary = folder / ADAPTERS, folder / f".{ADAPTERS}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, adapter in loaded.items():
            _copy(adapter, temporary / name)
            _add_network_name(temporary / name, component)
        (temporary / SET).write_text(json.dumps(weights))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(adapter: LoadedAdapter, target: Path) -> None:
    folder, own = adapter.folder, own_network(adapter.folder)
    paths = [*folder.glob("*.safetensors"), *(own.rglob("*") if own else ())]
    names = adapter.info.get("files") or [file.relative_to(folder) for file in paths if file.is_file()]
    for name in (CONFIG, *names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def _add_network_name(folder: Path, component: str) -> None:
    """Prefix the keys of an adapter's low-rank updates with the network's name, and update their checksum."""
    updates, config = folder / FILE, folder / CONFIG
    if not updates.is_file():
        return
    add_prefix(updates, component)
    values = json.loads(config.read_text())
    if "files" in (values.get("info") or {}):
        values["info"]["files"][FILE] = checksum(updates)
        config.write_text(json.dumps(values, indent=2) + "\n")


def saved_weights(folder: Path) -> dict[str, float] | None:
    """Return the weights of a saved pipeline's active adapters; None if `folder` has no adapters.

    Raises UserError if the file is broken.
    """
    path = folder / ADAPTERS / SET
    if not path.is_file():
        return None
    try:
        weights = {name: float(weight) for name, weight in json.loads(path.read_text()).items()}
        if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
            raise ValueError(f"the weight of {wrong[0]} is not finite")
        return weights
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a saved pipeline's list of adapters ({one_line(error)}): "
                        "save it again") from error  # fmt: skip
