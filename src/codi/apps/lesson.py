"""The training of `codi demo`: a new upscaling adapter, trained from the backbone for a few minutes or less."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from ..sampling.pipeline import CoDiPipeline
from ..training.checkpoint import CHECKPOINTS, complete, read_state
from ..training.distill import DistillRecipe, distill
from .common import shows_progress


def train_upscaler(
    pipe: CoDiPipeline,
    out: Path,
    minutes: float,
    *,
    model: str,
    side: int,
    seed: int,
    device: str,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train an upscaler below `out`/training, or resume the training of an earlier demo. `changes` override keys of the
    recipe. Returns the page's figures of the training. Raises UserError where the training fails."""
    recipe = _recipe(pipe, out, model, side, seed, device, changes or {})
    folder = distill(recipe, quiet=not shows_progress(), minutes=minutes)
    rows = {row["images"]: {} for row in _log(folder)}
    for row in _log(
        folder
    ):  # losses and obedience are logged in separate lines; a killed run's lines are logged again on resuming
        rows[row["images"]].update(row)
    progress, _ = read_state(complete(folder / CHECKPOINTS)[-1])
    return {
        "images": progress.images,
        "of": recipe.images,
        "seconds": progress.seconds,
        "objective": recipe.objective,
        "curve": [rows[images] for images in sorted(rows)],
        "previews": [f"training/{folder.name}/previews/{p.name}" for p in sorted((folder / "previews").glob("*.png"))],
    }


def _recipe(
    pipe: CoDiPipeline, out: Path, model: str, side: int, seed: int, device: str, changes: dict[str, Any]
) -> DistillRecipe:
    """Return the recipe. Its folder is named after a checksum of settings, configuration and weights, so that another
    model or version starts a new training instead of resuming checkpoints that do not fit."""
    settings: dict[str, Any] = {
        "model": model, "data": "scenes:train:512", "held_out": "scenes:held-out:8",
        "size": side, "degradation": "bicubic", "images": 8_000, "batch_size": 8, "learning_rate": 3e-4, "warmup": 160,
        "ema": 0.99, "log_every": 40, "preview_every": 160, "checkpoint_every": 8_000, "keep": 1, "seed": seed,
        "device": device,
    }  # fmt: skip
    settings |= changes
    weights = float(next(pipe.network.parameters()).double().sum())
    key = zlib.crc32(json.dumps([settings, dict(pipe.network.config), weights], sort_keys=True, default=str).encode())
    return DistillRecipe(out=str(out / "training" / f"{key:08x}"), **settings)


def _log(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
