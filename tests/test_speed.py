"""What measures speed and memory: full-size models for the command, and the page of figures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts that import one another

import big  # noqa: E402
import flags  # noqa: E402
import speed  # noqa: E402
import train_step  # noqa: E402

from shell import make_adapter  # noqa: E402
from tiny import LATENT_CHANNELS, tiny_backbone, tiny_checkpoint  # noqa: E402


def test_the_models_that_it_makes_upscale_its_picture(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(big, "build", lambda kind: tiny_backbone())
    words = big.full_size("sd15", tmp_path)
    given = big.picture(24, tmp_path / "in.png")
    ran = shell("upscale", given, "-o", tmp_path / "out.png", "--steps", 1, *words)
    assert (ran.code, ran.err) == (0, "")
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (96, 96)


def test_every_way_of_running_is_timed(tmp_path, monkeypatch):
    model, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "flags.json"
    ways = ["plain", "fused", "channels-last", "bfloat16", "plain-attention"]
    words = ["flags.py", "--model", model, "--adapter", make_adapter(tmp_path / "adapter", "upscale"), "--size", 32]
    words += ["--steps", 1, "--threads", torch.get_num_threads(), "--repeats", 1, "--warm", 0, "--out", out, "--ways"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, *ways]])
    flags.main()
    told = json.loads(out.read_text())
    assert list(told["ratios"]) == ways and told["ratios"]["plain"] == 1 and min(told["seconds"].values()) > 0
    assert "`fuse_lora()`" in "\n".join(speed.flag_lines(told))


@pytest.mark.parametrize("name", train_step.CONTESTANTS)
def test_every_contestant_takes_its_step(name):
    """With a condition of the guidance scale, LCM's network is another than its teacher."""
    backbone = tiny_backbone()
    before = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    step = train_step.CONTESTANTS[name](backbone, False)
    text = torch.randn(2, 3, backbone.unet.config["cross_attention_dim"])
    step(torch.randn(2, LATENT_CHANNELS, 8, 8), {"text": text, "added": None}, torch.zeros_like(text))
    after = backbone.unet.state_dict()
    moved = any(not torch.equal(before[key], after[key]) for key in before)
    assert moved == (name == "codi")


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
