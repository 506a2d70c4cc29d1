"""Helpers to run commands on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codi.apps.cli import main
from codi.models.adapter import FORMS
from codi.tasks import get_task
from codi.training.saving import save_adapter
from tiny import rand, tiny_backbone, tiny_checkpoint, tiny_lora


@dataclass(frozen=True)
class CommandResult:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    def failed(self, code: int = 1, *fragments: str) -> None:
        """Assert the exit code and that stderr is one error line that contains all `fragments`."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for fragment in fragments:
            assert fragment in lines[0], self.err


@dataclass(frozen=True)
class Shell:
    """A callable that runs a command in this process: `shell("upscale", ...)`."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> CommandResult:
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return CommandResult(code, out, err)


@dataclass(frozen=True)
class Models:
    """Folders of a tiny backbone and its adapter."""

    model: Path
    adapter: Path

    @property
    def options(self) -> tuple[str, ...]:
        return ("--model", str(self.model), "--adapter", str(self.adapter), "--device", "cpu")


def make_models(folder: Path, scale: int = 4) -> Models:
    """Write a tiny checkpoint and a full upscaler with nonzero weights."""
    adapter = make_adapter(folder / "adapter", "upscale", full=True, scale=scale, degradation="bicubic")
    return Models(tiny_checkpoint(folder / "model"), adapter)


def make_adapter(
    folder: Path, task: str, guidance: dict[str, list[float]] | None = None, full: bool = False, **options: object
) -> Path:
    """Write an adapter for `tiny_checkpoint`, of the form shipped for `task`, with nonzero weights."""
    backbone, task_instance = tiny_backbone(), get_task(task, **options)
    form = FORMS["lora" if task == "generate" else "fused"]
    adapter = form.from_backbone(backbone.unet, backbone.vae, task_instance.condition_channels, len(guidance or ()))
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.startswith(("mu.", "guidance.")):
                p.copy_(0.2 * rand(*p.shape, seed=p.numel()))
    info = {
        "task": task,
        "task_options": task_instance.config(),
        "steps": [1, 2, 4],
        "family": backbone.family,
        "full": full,
    }
    info |= {"guidance": guidance or {}, "images": 8, "recipe": {"objective": "codi", "size": 32}}
    adapter.register_to_config(info=info)
    unet = backbone.unet if full or task == "upscale" else tiny_lora(backbone.unet, task)
    save_adapter(folder, adapter, unet, full, half=False)
    return folder


def picture(path: Path, width: int = 7, height: int = 5, mode: str = "RGB", seed: int = 0) -> Path:
    """Write an image of noise."""
    bands = {"1": (), "L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *bands), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels > 127 if mode == "1" else pixels).save(path)
    return path
