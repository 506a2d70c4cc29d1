"""The example that teaches the method: its table of fixed points, and that everything in it still runs."""

import runpy
from pathlib import Path

import pytest
import torch

TOY = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "toy.py"))


def test_fixed_points_are_those_of_the_closed_form():
    """Rows: straight coupling, end of the ODE; columns: own ODE in noise and signal, the denoiser's in both."""
    found = [values for _, values in TOY["fixed_points"]()]
    expected = [[0, 0, 0.069, 0.017], [0.023, 0.055, 0.24, 0]]
    for values, wanted in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted, abs=2e-3, rel=0.02)


def test_every_method_trains_and_samples(tmp_path):
    made = {}
    for name, (net, sampler) in TOY["methods"](10).items():
        made[name] = {n: sampler(net, torch.zeros(16).long(), n, torch.Generator().manual_seed(0)) for n in (1, 2, 4)}
        assert all(x.shape == (16, 2) and x.isfinite().all() for x in made[name].values())
    assert {"fine-tuned (DDIM)", "GD-II", "CM-II", "CoDi (paper)", "decoupled"} <= set(made)
    TOY["picture"](made, torch.zeros(16, 2), tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000
