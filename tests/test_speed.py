"""What measures speed and memory: full-size models for the command, and the page of figures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts that import one another

import big  # noqa: E402
import flags  # noqa: E402
import latency  # noqa: E402
import lightness  # noqa: E402
import speed  # noqa: E402
import train_step  # noqa: E402

from shell import make_adapter  # noqa: E402
from tiny import LATENT_CHANNELS, tiny_backbone, tiny_checkpoint  # noqa: E402

CARD = {"gpu": "a card", "threads": 1, "cpus": 1}


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


def test_who_fails_a_contest_is_named_and_the_others_go_on():
    def breaks():
        raise MemoryError("too\nlarge")

    rounds = latency.contest({"codi": lambda: None, "lcm": lambda: None, "ddim": breaks}, "cpu", warm=1, repeats=2)
    told = [latency.summary(seconds, failed) for seconds, failed in rounds]
    assert [row["repeats"] for row in told] == [1, 2]
    assert all(row["failed"] == {"ddim": "MemoryError: too large"} for row in told)
    assert all(row["seconds"].keys() == {"codi", "lcm"} for row in told)
    (ratio,) = told[1]["ratios"]
    assert ratio["least"] <= ratio["ratio"] <= ratio["greatest"] and ratio["goal"] == 1.12
    with pytest.raises(RuntimeError, match="nobody finished a round"):
        next(latency.contest({"ddim": breaks}, "cpu", warm=0, repeats=1))


def test_each_round_is_on_disk_before_the_next(tmp_path, monkeypatch):
    """Ours, on a tiny checkpoint; diffusers' ControlNet wants latent cells of 8 px, so that theirs fails there."""
    tiny: dict[str, Any] = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    tiny |= {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
    tiny["latent_channels"] = LATENT_CHANNELS
    out, seen, write = tmp_path / "latency.json", [], latency.write_json
    monkeypatch.setattr(latency, "build", lambda kind, dtype: tiny_backbone("epsilon"))
    monkeypatch.setattr(latency, "rates", lambda device, dtype: {"flop_per_second": 1e12, "bytes_per_second": 1e9})
    monkeypatch.setattr(latency, "AutoencoderTiny", lambda: AutoencoderTiny(**tiny))
    monkeypatch.setattr(latency, "write_json", lambda told, file: (write(told, file), seen.append(told["repeats"])))
    words = ["latency.py", "--size", "32", "--repeats", "2", "--warm", "0", "--skip", "ddim", "ddim-loop"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    latency.main()
    told = json.loads(out.read_text())
    assert seen == [1, 2] and told["repeats"] == 2 and told["failed"].keys() == {"lcm", "lcm-loop"}
    assert told["seconds"].keys() == told["share"].keys() == {"codi", "codi-loop", "codi-tiny", "bare"}
    flop = told["flop"]
    assert 0 < flop["codi-loop"] < min(flop["codi"], flop["codi-tiny"]) and flop["bare"] == flop["codi"]
    page = "\n".join(speed.latency_lines(told))
    assert "medians of 2 rounds" in page and "codi / bare" in page and "`codi-tiny`" in page
    assert "diffusers' ControlNet pipeline, 4 LCM steps failed: " in page


def test_a_card_s_figure_has_its_goal():
    told = {"device": "cuda", "size": 512, "batch": 1, "dtype": "bfloat16", "repeats": 3, "ratios": [],
            "machine": CARD, "seconds": {"codi-tiny": 0.031, "codi-tiny/graph": 0.0242}}  # fmt: skip
    page = "\n".join(speed.latency_lines(told))
    assert "24.2 ms, goal 25.0 ms: met" in page and "on a card" in page


def test_training_with_guidance_counts_half():
    """As in the recipes for Stable Diffusion."""
    rows = {"lcm": 10, "pe-codi": 5, "pe-codi-guided": 9}
    told = {"kind": "sd15", "size": 8, "batch": 1, "dtype": "x", "checkpointing": False, "device": "cuda", "steps": 1}
    peak = {"peak_bytes": 2**30, "peak_bytes_ratio": 1.0}
    told["rows"] = {name: {"seconds": s, "seconds_ratio": s / 10, **peak} for name, s in rows.items()}
    told["machine"] = CARD
    page = "\n".join(speed.step_lines(told))
    assert "every other update guided | 7.0 | 0.70 (missed)" in page and "| pe-codi | 5.0 | 0.50 (met)" in page


def test_what_starting_takes_is_summed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lightness, "commands", lambda folder: {name: [name] for name in speed.STARTS})
    cost = dict(zip(speed.STARTS, (0.02, 0.1, 0.4, 1.0, 2.0, 4.0), strict=True))
    monkeypatch.setattr(lightness, "seconds_of", lambda words: (cost[words[0]], cost[words[0]]))
    monkeypatch.setattr(sys, "argv", ["lightness.py", "--repeats", "2", "--out", str(tmp_path / "light.json")])
    lightness.main()
    page = "\n".join(speed.light_lines(json.loads((tmp_path / "light.json").read_text())))
    assert "| `import codi` | 0.10 | 0.10 | 0.15: met |" in page and "0.3: missed" in page and "50% of the last" in page


def test_memory_is_measured_of_the_command_itself(tmp_path):
    """In a process of its own, which fails as a whole where codi does."""
    told = big.measure(128, ["--model", "mini"])
    assert told["side"] == 128 and 100 < told["peak_mib"] < 4000
    with pytest.raises(SystemExit, match="side 64: codi upscale ended with"):
        big.measure(64, ["--model", str(tmp_path)])


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
