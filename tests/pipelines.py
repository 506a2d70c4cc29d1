"""A pipeline of tiny models with an adapter for each task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS
from shell import make_adapter
from tiny import rand, tiny_checkpoint

GUIDANCE = {"generate": {"text": [1.0, 5.0]}, "edit": {"text": [1.0, 5.0], "image": [1.0, 2.0]}}


def make_folder(root: Path) -> Path:
    """Write model/, an adapter for each task, and full/, an upscaler with its own U-Net."""
    tiny_checkpoint(root / "model")
    for task in TASKS:
        make_adapter(root / task, task, GUIDANCE.get(task))
    make_adapter(root / "full", "upscale", full=True)
    return root


def open_pipeline(folder: Path) -> CoDiPipeline:
    """Return a pipeline with all adapters loaded."""
    pipe = CoDiPipeline.from_pretrained(folder / "model")
    for task in TASKS:
        pipe.load_adapter(folder / task)
    pipe.load_adapter(folder / "full")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_for(task: str, height: int = 16, width: int = 24, count: int = 1) -> dict[str, Tensor]:
    """Return the image arguments of a call for a task."""
    if task == "generate":
        return {}
    image = rand(count, 1 if task == "depth" else 3, height, width, seed=1)
    return {"image": image, **({"mask": hole(height, width)} if task == "inpaint" else {})}


def hole(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., 3:11, 5:] = 1
    return mask


def run(pipe: CoDiPipeline, **arguments) -> Tensor:
    return pipe(**{"prompt": "a red ball", "steps": 2, "output_type": "pt", **arguments}).images  # type: ignore
