"""The benchmarks of speed and memory: full-size models for the command, and the page of figures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the scripts import one another

import big  # noqa: E402
import flags  # noqa: E402
import latency  # noqa: E402
import lightness  # noqa: E402
import speed  # noqa: E402
import train_step  # noqa: E402

from shell import make_adapter  # noqa: E402
from tiny import LATENT_CHANNELS, tiny_backbone, tiny_checkpoint  # noqa: E402

CARD = {"gpu": "a card", "threads": 1, "cpus": 1}


def test_full_size_models_run_the_upscale_command(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(big, "build", lambda kind: tiny_backbone())
    options = big.full_size("sd15", tmp_path)
    source = big.picture(24, tmp_path / "in.png")
    result = shell("upscale", source, "-o", tmp_path / "out.png", "--steps", 1, *options)
    assert (result.code, result.err) == (0, "")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (96, 96)


def test_every_inference_flag_is_timed(tmp_path, monkeypatch):
    model, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "flags.json"
    ways = ["plain", "fused", "channels-last", "bfloat16", "plain-attention"]
    command = ["flags.py", "--model", model, "--adapter", make_adapter(tmp_path / "adapter", "upscale"), "--size", 32]
    command += ["--steps", 1, "--threads", torch.get_num_threads(), "--repeats", 1, "--warm", 0, "--out", out, "--ways"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, *ways]])
    flags.main()
    results = json.loads(out.read_text())
    assert list(results["ratios"]) == ways and results["ratios"]["plain"] == 1 and min(results["seconds"].values()) > 0
    assert "`fuse_lora()`" in "\n".join(speed.flag_lines(results))


@pytest.mark.parametrize("name", train_step.CONTESTANTS)
def test_every_contestant_takes_its_step(name):
    """LCM's student takes the guidance scale as a condition, so it is another network than its teacher."""
    backbone = tiny_backbone()
    before = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    step = train_step.CONTESTANTS[name](backbone, False)
    text = torch.randn(2, 3, backbone.unet.config["cross_attention_dim"])
    step(torch.randn(2, LATENT_CHANNELS, 8, 8), {"text": text, "added": None}, torch.zeros_like(text))
    after = backbone.unet.state_dict()
    moved = any(not torch.equal(before[key], after[key]) for key in before)
    assert moved == (name == "codi")


def test_a_failing_contestant_is_named_and_the_others_continue():
    def fail():
        raise MemoryError("too\nlarge")

    rounds = latency.contest({"codi": lambda: None, "lcm": lambda: None, "ddim": fail}, "cpu", warm=1, repeats=2)
    summaries = [latency.summary(seconds, failed) for seconds, failed in rounds]
    assert [row["repeats"] for row in summaries] == [1, 2]
    assert all(row["failed"] == {"ddim": "MemoryError: too large"} for row in summaries)
    assert all(row["seconds"].keys() == {"codi", "lcm"} for row in summaries)
    (ratio,) = summaries[1]["ratios"]
    assert ratio["least"] <= ratio["ratio"] <= ratio["greatest"] and ratio["goal"] == 1.12
    with pytest.raises(RuntimeError, match="no contestant finished a round"):
        next(latency.contest({"ddim": fail}, "cpu", warm=0, repeats=1))


def test_each_round_is_written_before_the_next(tmp_path, monkeypatch):
    """Our pipeline on a tiny checkpoint; diffusers' ControlNet needs latent cells of 8 px, so LCM's rows fail here."""
    tiny: dict[str, Any] = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    tiny |= {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
    tiny["latent_channels"] = LATENT_CHANNELS
    out, written, write = tmp_path / "latency.json", [], latency.write_json
    monkeypatch.setattr(latency, "build", lambda kind, dtype: tiny_backbone("epsilon"))
    monkeypatch.setattr(latency, "rates", lambda device, dtype: {"flop_per_second": 1e12, "bytes_per_second": 1e9})
    monkeypatch.setattr(latency, "AutoencoderTiny", lambda: AutoencoderTiny(**tiny))
    monkeypatch.setattr(
        latency, "write_json", lambda result, file: (write(result, file), written.append(result["repeats"]))
    )
    command = ["latency.py", "--size", "32", "--repeats", "2", "--warm", "0", "--skip", "ddim", "ddim-loop"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    latency.main()
    result = json.loads(out.read_text())
    assert written == [1, 2] and result["repeats"] == 2 and result["failed"].keys() == {"lcm", "lcm-loop"}
    assert result["seconds"].keys() == result["share"].keys() == {"codi", "codi-loop", "codi-tiny", "bare"}
    flop = result["flop"]
    assert 0 < flop["codi-loop"] < min(flop["codi"], flop["codi-tiny"]) and flop["bare"] == flop["codi"]
    page = "\n".join(speed.latency_lines(result))
    assert "medians of 2 rounds" in page and "codi / bare" in page and "`codi-tiny`" in page
    assert "diffusers' ControlNet pipeline, 4 LCM steps failed: " in page


def test_a_gpu_figure_is_compared_with_its_goal():
    result = {"device": "cuda", "size": 512, "batch": 1, "dtype": "bfloat16", "repeats": 3, "ratios": [],
            "machine": CARD, "seconds": {"codi-tiny": 0.031, "codi-tiny/graph": 0.0242}}  # fmt: skip
    page = "\n".join(speed.latency_lines(result))
    assert "24.2 ms, goal 25.0 ms: met" in page and "on a card" in page


def test_guidance_counts_for_every_other_update():
    """As in the recipes for Stable Diffusion, every other update uses guidance."""
    rows = {"lcm": 10, "pe-codi": 5, "pe-codi-guided": 9}
    result = {"kind": "sd15", "size": 8, "batch": 1, "dtype": "x", "checkpointing": False, "device": "cuda", "steps": 1}
    peak = {"peak_bytes": 2**30, "peak_bytes_ratio": 1.0}
    result["rows"] = {name: {"seconds": s, "seconds_ratio": s / 10, **peak} for name, s in rows.items()}
    result["machine"] = CARD
    page = "\n".join(speed.step_lines(result))
    assert "every other update guided | 7.0 | 0.70 (missed)" in page and "| pe-codi | 5.0 | 0.50 (met)" in page


def test_start_up_times_are_summarized(tmp_path, monkeypatch):
    monkeypatch.setattr(lightness, "commands", lambda folder: {name: [name] for name in speed.STARTS})
    cost = dict(zip(speed.STARTS, (0.02, 0.1, 0.4, 1.0, 2.0, 4.0), strict=True))
    monkeypatch.setattr(lightness, "seconds_of", lambda command: (cost[command[0]], cost[command[0]]))
    monkeypatch.setattr(sys, "argv", ["lightness.py", "--repeats", "2", "--out", str(tmp_path / "light.json")])
    lightness.main()
    page = "\n".join(speed.light_lines(json.loads((tmp_path / "light.json").read_text())))
    assert "| `import codi` | 0.10 | 0.10 | 0.15: met |" in page
    assert "0.3: missed" in page and "50% of the last row" in page


def test_peak_memory_is_that_of_the_command_process(tmp_path):
    """The command runs in a process of its own; its failure fails the measurement."""
    result = big.measure(128, ["--model", "mini"])
    assert result["side"] == 128 and 100 < result["peak_mib"] < 4000
    with pytest.raises(SystemExit, match="side 64: codi upscale ended with"):
        big.measure(64, ["--model", str(tmp_path)])


def test_the_committed_page_matches_the_results():
    """A figure that misses its goal says so."""
    page = speed.page(speed.RESULTS)
    assert page == (speed.ROOT / "docs" / "speed.md").read_text()
    assert page.count("## ") == len([1 for _, pattern, _ in speed.PARTS if list(speed.RESULTS.glob(pattern))])
    assert (speed.met(1.2, 1.22), speed.met(1.22, 1.22), speed.met(1.03, 1.02, most=True)) == (
        "missed",
        "met",
        "missed",
    )
