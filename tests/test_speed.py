"""What measures speed and memory: full-size models for the command, and the page of figures."""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts that import one another

import big  # noqa: E402
import speed  # noqa: E402

from tiny import tiny_backbone  # noqa: E402


def test_the_models_that_it_makes_upscale_its_picture(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(big, "build", lambda kind: tiny_backbone())
    words = big.full_size("sd15", tmp_path)
    given = big.picture(24, tmp_path / "in.png")
    ran = shell("upscale", given, "-o", tmp_path / "out.png", "--steps", 1, *words)
    assert (ran.code, ran.err) == (0, "")
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (96, 96)


def test_the_page_is_that_of_the_results():
    """Of those that are committed; a figure that misses its goal says so."""
    page = speed.page(speed.RESULTS)
    assert page == (speed.ROOT / "docs" / "speed.md").read_text()
    assert page.count("## ") == len([1 for _, pattern, _ in speed.PARTS if list(speed.RESULTS.glob(pattern))])
    assert (speed.met(1.2, 1.22), speed.met(1.22, 1.22), speed.met(1.03, 1.02, most=True)) == (
        "missed",
        "met",
        "missed",
    )
