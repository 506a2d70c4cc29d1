"""The example that explains the method: its table of fixed points, and that all of its code runs."""

import runpy
from pathlib import Path

import pytest
import torch

TOY = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "toy.py"))


def test_fixed_points_match_the_closed_form():
    """Rows: straight coupling, end of the ODE; columns: own ODE in noise and signal, the denoiser's in both."""
    computed = [values for _, values in TOY["fixed_points"]()]
    expected = [[0, 0, 0.069, 0.017], [0.023, 0.055, 0.24, 0]]
    for values, row in zip(computed, expected, strict=True):
        assert values == pytest.approx(row, abs=2e-3, rel=0.02)


def test_every_method_trains_and_samples(tmp_path):
    samples = {}
    for name, (net, sampler) in TOY["methods"](10).items():
        samples[name] = {
            n: sampler(net, torch.zeros(16).long(), n, torch.Generator().manual_seed(0)) for n in (1, 2, 4)
        }
        assert all(x.shape == (16, 2) and x.isfinite().all() for x in samples[name].values())
    assert {"fine-tuned (DDIM)", "GD-II", "CM-II", "CoDi (paper)", "decoupled"} <= set(samples)
    TOY["picture"](samples, torch.zeros(16, 2), tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000
