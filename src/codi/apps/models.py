"""`codi models`: list the models embedded in the package, with their licences and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..training.recipe import current_names
from .common import Json, print_json

EXAMPLE = "Example: codi models --json"
LICENCE = "Apache-2.0"  # of the package and its weights
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def models(json_: Json = False) -> None:
    """List the embedded models, tiny decoders and adapters, their licences and sizes."""
    rows = embedded()
    if json_:
        print_json(rows)
        return
    if not rows:
        print("nothing is embedded in this installation: give --model and --adapter a folder")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "task", "steps", "MB", "licence", "origin")
    for row in rows:
        steps = ", ".join(str(n) for n in row["steps"] or [])
        size = f"{row['bytes'] / 1e6:.1f}"
        name = row["name"] if row["model"] in (row["name"], "mini") else f"{row['model']}/{row['name']}"
        table.add_row(name, row["kind"], row["task"] or "", steps, size, row["licence"], row["origin"])
    Console(emoji=False, markup=False).print(table)  # folder names must not be read as markup


def embedded(weights: Path = WEIGHTS) -> list[dict[str, Any]]:
    """Return a row for each model, tiny decoder and adapter below `weights`: name, kind ("model", "decoder" or
    "adapter"), the model it is for, path, licence, bytes, task, step counts it was distilled for, backbone family and
    origin (None where unknown).
    """
    rows = [_model(path.parent) for path in sorted(weights.glob("*/model_index.json"))]
    rows += [_decoder(path.parent) for path in sorted(weights.glob("*/tiny_vae/config.json"))]
    rows += [_adapter(path.parent, "mini") for path in sorted(weights.glob("adapters/*/config.json"))]
    own = sorted(weights.glob("*/adapters/*/config.json"))
    return rows + [_adapter(path.parent, path.parents[2].name) for path in own]


def _model(folder: Path) -> dict[str, Any]:
    record = _read(folder / "training.json")
    images = record.get("images")
    pictures = record.get("pictures", "rendered scenes")
    origin = f"trained by codi on {images:,} {pictures}" if images else f"trained by codi on {pictures}"
    row = _row(folder, "model", record, origin)
    # Without the adapters, which have rows of their own.
    return row | {"model": folder.name, "bytes": row["bytes"] - _size(folder / "adapters")}


def _decoder(folder: Path) -> dict[str, Any]:
    record = _read(folder / "training.json")
    facts = [f"{record['images']:,} crops" if "images" in record else None, record.get("recipe", {}).get("data")]
    origin = ", ".join(str(part) for part in (f"distilled for {folder.parent.name}", *facts) if part)
    return _row(folder, "decoder", {}, origin) | {"name": "tiny", "model": folder.parent.name}  # as for --decoder


def _adapter(folder: Path, model: str) -> dict[str, Any]:
    info = _read(folder / "config.json").get("info") or {}
    recipe = current_names(info.get("recipe") or {})
    facts = [recipe.get("objective"), f"{info['images']:,} images" if info.get("images") else None, recipe.get("data")]
    origin = ", ".join(str(part) for part in facts if part) or "trained by codi"
    return _row(folder, "adapter", info, origin) | {"model": model}


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _row(folder: Path, kind: str, record: dict[str, Any], origin: str) -> dict[str, Any]:
    return {
        "name": folder.name,
        "kind": kind,
        "path": str(folder),
        "licence": record.get("licence", LICENCE),
        "bytes": _size(folder),
        "task": record.get("task"),
        "steps": record.get("steps"),
        "family": record.get("family"),
        "origin": origin,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
