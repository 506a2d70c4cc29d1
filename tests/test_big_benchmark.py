"""benchmarks/big.py: the full-size models that it makes are those that the command takes."""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts that import one another

import big  # noqa: E402

from tiny import tiny_backbone  # noqa: E402


def test_the_models_that_it_makes_upscale_its_picture(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(big, "build", lambda kind: tiny_backbone())
    words = big.full_size("sd15", tmp_path)
    given = big.picture(24, tmp_path / "in.png")
    ran = shell("upscale", given, "-o", tmp_path / "out.png", "--steps", 1, *words)
    assert (ran.code, ran.err) == (0, "")
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (96, 96)
