"""The comparison of model layouts: all predictions are compared as velocities."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import bakeoff  # noqa: E402
import vae as vae_benchmark  # noqa: E402

from codi.training.unet import new_scheduler  # noqa: E402
from tiny import rand  # noqa: E402


def test_v_prediction_converts_to_the_velocity_of_the_linear_path():
    alphas_cumprod = new_scheduler().alphas_cumprod
    level, t = bakeoff.levels(6, alphas_cumprod)
    assert bool((t.diff() > 0).all()) and float((t - (torch.arange(6) + 0.5) / 6).abs().max()) < 0.01
    x, eps = rand(6, 4, 8, 8), rand(6, 4, 8, 8)
    alpha, sigma = (v[:, None, None, None] for v in (alphas_cumprod[level].sqrt(), (1 - alphas_cumprod[level]).sqrt()))

    def unet(z, timestep, features):
        assert torch.equal(timestep, level)
        torch.testing.assert_close(z, alpha * x + sigma * eps, atol=1e-4, rtol=1e-4)
        return SimpleNamespace(sample=alpha * eps - sigma * x)

    def tokenizer(texts, **_):
        return SimpleNamespace(input_ids=torch.zeros(len(texts), 2, dtype=torch.long))

    pipe = SimpleNamespace(unet=unet, tokenizer=tokenizer, text_encoder=lambda tokens: [tokens])
    time = t[:, None, None, None]
    u = bakeoff.velocity(pipe, (1 - time) * x + time * eps, t, level, [""] * 6)
    torch.testing.assert_close(u, eps - x, atol=1e-4, rtol=1e-4)


def test_training_figures_are_read_from_the_last_checkpoint(tmp_path):
    assert bakeoff.trained(tmp_path) == {"images_trained": None, "seconds_trained": None}
    for step, images in ((8, 16), (9, 64)):
        folder = tmp_path / "training" / "ldm" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(f'{{"progress": {{"images": {images}, "seconds": 2.5}}}}')
    assert bakeoff.trained(tmp_path) == {"images_trained": 64, "seconds_trained": 2.5}


def test_vae_judge_compares_five_resolutions():
    judge, image = vae_benchmark.Judge(), rand(2, 3, 64, 64)
    assert [m.shape[-1] for m in judge.maps(image)] == [128, 64, 32, 16, 8]
    assert float(judge(image, image).max()) == 0 and float(judge(image, image.flip(-1)).min()) > 0
