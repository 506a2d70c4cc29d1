"""Writing a finished adapter, or another model: whole or not at all."""

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
    """Write an adapter folder into `out`, which may hold other things: config.json, which lists the other files with
    their checksums, comes last, so that a folder with one is whole. `network`: that which it works with; of a `full`
    adapter all of it is kept, in `unet/` or `transformer/`, otherwise its low-rank updates, if it has any. Neither
    argument is changed."""

    def stored(module: Any) -> Any:
        return copy.deepcopy(module).to(torch.float16) if half else module

    def fill(folder: Path) -> None:
        stored(adapter).save_pretrained(folder, safe_serialization=True)
        if full:
            stored(network).save_pretrained(folder / family_of(network).component, safe_serialization=True)
        for name in [] if full else lora_names(network):
            save_lora(network, folder, name, half)
        for config in folder.rglob(CONFIG):
            edit_json(config, _name_or_path=None)  # where it lay on this machine
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors leaves them to their owner alone
        list_files(folder)

    place(out, fill, (CONFIG, FILE, *{kind.component for kind in FAMILIES}))


def list_files(folder: Path) -> None:
    """Write into an adapter's config.json which files belong to it, with their checksums."""
    config = folder / CONFIG
    info = json.loads(config.read_text()).get("info") or {}
    edit_json(config, info={**info, "files": checksums(folder, CONFIG)})


def place(out: Path, fill: Callable[[Path], Any], stale: Sequence[str]) -> None:
    """Write into `out`, which may hold other things, the files that `fill(folder)` leaves in an empty folder; its
    config.json comes last. `stale`: what an earlier model may have left there, its config first, so that there never
    is one over a mixture."""
    staged = out / ".finished"
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed below
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
    """A recipe (a dataclass) as it may go with a model: of a local path only the last part."""

    def public(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and os.sep in value and Path(value).exists() else value

    return {key: public(value) for key, value in asdict(recipe).items() if key not in ("out", "device")}
