"""Atomic writing of a finished adapter or another model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..files import write_folder
from ..models.backbones import FAMILIES, family_of
from ..models.checksums import checksums
from ..models.lora import FILE, lora_names, save_lora
from .checkpoint import edit_json

CONFIG = "config.json"


def save_adapter(out: Path, adapter: Any, network: Any, full: bool, half: bool) -> None:
    """Write an adapter into `out`, which may hold other files. config.json, which lists the other files with their
    checksums, comes last, so a folder with one is complete. `network`: the backbone that the adapter works with. A
    `full` adapter stores all of it, in `unet/` or `transformer/`, others its low-rank updates, if any. Neither is
    changed."""

    def converted(module: Any) -> Any:
        return copy.deepcopy(module).to(torch.float16) if half else module

    def fill(folder: Path) -> None:
        converted(adapter).save_pretrained(folder, safe_serialization=True)
        if full:
            converted(network).save_pretrained(folder / family_of(network).component, safe_serialization=True)
        for name in [] if full else lora_names(network):
            save_lora(network, folder, name, half)
        for config in folder.rglob(CONFIG):
            edit_json(config, _name_or_path=None)  # a local path
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors makes them readable by their owner only
        list_files(folder)

    place(out, fill, (CONFIG, FILE, *{kind.component for kind in FAMILIES}))


def list_files(folder: Path) -> None:
    """Add the checksums of an adapter's files to its config.json."""
    config = folder / CONFIG
    info = json.loads(config.read_text()).get("info") or {}
    edit_json(config, info={**info, "files": checksums(folder, CONFIG)})


def place(out: Path, fill: Callable[[Path], Any], stale: Sequence[str]) -> None:
    """Move the files that `fill(folder)` writes in an empty folder into `out`, which may hold others; config.json comes
    last. `stale`: files of an earlier model to remove first, its config before the others, so that a config.json never
    describes a mixture of two models."""
    staged = out / ".finished"
    shutil.rmtree(staged, ignore_errors=True)  # left by a killed run
    write_folder(staged, fill)
    for old in (out / name for name in stale):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    for item in sorted(staged.rglob("*"), key=lambda p: (p.name == CONFIG, len(p.parts) == len(staged.parts) + 1)):
        if item.is_file():
            target = out / item.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            item.replace(target)
    for folder in sorted((p for p in staged.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    staged.rmdir()


def shareable(recipe: Any) -> dict[str, Any]:
    """Return a recipe (a dataclass) as it is published with a model: local paths shortened to their last part."""

    def without_folder(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and os.sep in value and Path(value).exists() else value

    return {key: without_folder(value) for key, value in asdict(recipe).items() if key not in ("out", "device")}
