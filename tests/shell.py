"""The command line on tiny models: what the tests of the shell share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codi.apps.cli import main
from codi.models.adapter import FusedAdapter
from tiny import tiny_backbone, tiny_checkpoint


@dataclass(frozen=True)
class Ran:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def failed(self, code: int = 1, *words: str) -> None:
        """Asserts the exit code and that stderr is one line that names `words`."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for word in words:
            assert word in lines[0], self.err


@dataclass(frozen=True)
class Shell:
    """`shell("upscale", ...)` runs a command in this process."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: object) -> Ran:
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self.capsys.readouterr()
        return Ran(code, out, err)


@dataclass(frozen=True)
class Models:
    """Folders of a tiny backbone and an adapter for it."""

    model: Path
    adapter: Path

    @property
    def options(self) -> tuple[str, ...]:
        return ("--model", str(self.model), "--adapter", str(self.adapter), "--device", "cpu")


def make_models(folder: Path, scale: int = 4) -> Models:
    """A tiny checkpoint and an untrained adapter with some influence."""
    backbone = tiny_backbone()
    info = {"task": "upscale", "task_options": {"scale": scale, "degradation": "bicubic"}, "steps": [1, 2, 4]}
    info |= {"family": backbone.family, "full": True, "images": 8, "recipe": {"objective": "codi", "size": 32}}
    adapter = FusedAdapter.from_backbone(backbone.unet, backbone.vae, 3, **info)
    for mu in adapter.mu:
        mu.data.fill_(0.1)
    adapter.save_pretrained(folder / "adapter")
    return Models(tiny_checkpoint(folder / "model"), folder / "adapter")


def picture(path: Path, width: int = 7, height: int = 5, mode: str = "RGB", seed: int = 0) -> Path:
    """A file of noise."""
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *bands), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
