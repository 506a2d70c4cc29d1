"""The adapters of a saved pipeline: a folder each beside its checkpoint, and a list of those that are set."""

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
SET = "set.json"  # among the adapters: {name: weight} of those that are set


def require_sources(loaded: Mapping[str, LoadedAdapter]) -> None:
    """Raise UserError where the folder of an adapter, whose files are copied, is not what it was when it was loaded."""
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
    wanted = ["diffusion_pytorch_model*.safetensors", *([FILE] if update_names(adapter.network) else [])]
    return next((f"{name} is missing" for name in wanted if not any(folder.glob(name))), None)


def save_adapters(
    folder: Path, loaded: Mapping[str, LoadedAdapter], weights: Mapping[str, float], component: str
) -> None:
    """Copy the adapters' files to `folder`/adapters, whole or not at all. `component`: what stock pipelines call the
    network, which old files of low-rank updates do not say."""
    target, temporary = folder / ADAPTERS, folder / f".{ADAPTERS}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, adapter in loaded.items():
            _copy(adapter, temporary / name)
            _name_network(temporary / name, component)
        (temporary / SET).write_text(json.dumps(weights))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(adapter: LoadedAdapter, target: Path) -> None:
    folder, own = adapter.folder, own_network(adapter.folder)
    found = [*folder.glob("*.safetensors"), *(own.rglob("*") if own else ())]
    names = adapter.info.get("files") or [file.relative_to(folder) for file in found if file.is_file()]
    for name in (CONFIG, *names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def _name_network(folder: Path, component: str) -> None:
    """Have an adapter's updates say which network they are for, and its list of files their new checksum."""
    updates, config = folder / FILE, folder / CONFIG
    if not updates.is_file():
        return
    add_prefix(updates, component)
    values = json.loads(config.read_text())
    if "files" in (values.get("info") or {}):
        values["info"]["files"][FILE] = checksum(updates)
        config.write_text(json.dumps(values, indent=2) + "\n")


def saved_weights(folder: Path) -> dict[str, float] | None:
    """Return which adapters of a saved pipeline are set, with their weights; None where `folder` has no adapters.

    Raises UserError where the list is broken.
    """
    listed = folder / ADAPTERS / SET
    if not listed.is_file():
        return None
    try:
        weights = {name: float(weight) for name, weight in json.loads(listed.read_text()).items()}
        if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
            raise ValueError(f"the weight of {wrong[0]} is not finite")
        return weights
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{listed}: not a saved pipeline's list of adapters ({one_line(error)}): "
                        "save it again") from error  # fmt: skip
