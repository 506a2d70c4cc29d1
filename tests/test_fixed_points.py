"""Fixed points of CoDi's consistency loss on Gaussian data, in float64, on the cosine and linear noise paths."""

import numpy as np
import pytest
import torch
from torch import Tensor

from codi.objectives.batch import LatentBatch
from codi.objectives.codi import codi
from codi.objectives.finetune import finetune
from codi.schedule import CosineSchedule, DiscreteSchedule, FlowSchedule, Schedule
from tiny import randn, seeded, tiny_scheduler

LEVELS = DiscreteSchedule.from_config(tiny_scheduler().config)


COSINE, LINEAR = CosineSchedule(), FlowSchedule()


# ---- Gaussian data N(M, S^2), alpha = cos t, sigma = sin t. Functions return x(z), which determines eps.

M, S = 0.7, 0.5


def straight(z, alpha, sigma):
    """x = m + s eps: the straight-line coupling of noise and data."""
    return M + S * (z - alpha * M) / (alpha * S + sigma)


def flow(z, alpha, sigma):
    """The end point of the data's probability-flow ODE through (z, t)."""
    return M + S * (z - alpha * M) / (alpha**2 * S**2 + sigma**2) ** 0.5


def denoiser(z, alpha, sigma):
    """E[x | z]."""
    return M + alpha * S**2 * (z - alpha * M) / (alpha**2 * S**2 + sigma**2)


def network(function, schedule: Schedule):
    """Return a network whose output encodes x = function(z) exactly."""

    def forward(z: Tensor, timestep: Tensor, conditioning) -> Tensor:
        t = timestep + 1 if isinstance(schedule, DiscreteSchedule) else timestep  # t = 1000 s in FlowSchedule()
        alpha, sigma = schedule.alpha_sigma(t, z)
        x = function(z, alpha, sigma)
        return schedule.output(x, (z - alpha * x) / sigma, t)

    return forward


def gaussian_batch(count: int, seed: int = 0) -> LatentBatch:
    return LatentBatch(M + S * randn(1, 1, 1, count, seed=seed, dtype=torch.float64), None)


def table_cell(function, ode: str, consistency: str, dt: float, schedule: Schedule = COSINE, at: float = 1.0) -> float:
    """Return codi's mean squared consistency error / dt^2 at t = `at`, on 400,000 samples."""
    f, teacher = network(function, schedule), network(denoiser, schedule)
    options = {"dt": dt, "ode": ode, "teacher": teacher, "consistency": consistency, "signal_weight": 0.0}
    t = torch.tensor([at], dtype=torch.float64)
    losses = codi(f, f, gaussian_batch(400_000), schedule, seeded(1), t=t, **options)
    assert losses.keys() == {"consistency"}
    return float(losses["consistency"]) / dt**2


def by_quadrature(function, ode: str, consistency: str, dt: float) -> float:
    """Return the same value without codi's code, by Gauss-Hermite quadrature over z_t."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    (a, b), (a_s, b_s) = ((np.cos(t), np.sin(t)) for t in (1.0, 1.0 - dt))
    z = a * M + (a**2 * S**2 + b**2) ** 0.5 * nodes
    x_t = function(z, a, b)
    path = x_t if ode == "own" else denoiser(z, a, b)
    z_s = a_s * path + b_s * (z - a * path) / b
    x_s = function(z_s, a_s, b_s)
    error = x_t - x_s if consistency == "signal" else (z - a * x_t) / b - (z_s - a_s * x_s) / b_s
    return float((weights * error**2).sum() / weights.sum()) / dt**2


NONZERO = [
    (straight, "teacher", "noise", 0.069),
    (straight, "teacher", "signal", 0.017),
    (flow, "own", "noise", 0.023),
    (flow, "own", "signal", 0.055),
    (flow, "teacher", "noise", 0.24),
]


@pytest.mark.parametrize(("function", "ode", "consistency", "expected"), NONZERO)
def test_functions_that_are_not_fixed_points_have_the_expected_error(function, ode, consistency, expected):
    error = table_cell(function, ode, consistency, dt=1e-4)
    assert error == pytest.approx(expected, rel=0.03)
    assert error == pytest.approx(by_quadrature(function, ode, consistency, dt=1e-4), rel=0.01)


@pytest.mark.parametrize("consistency", ["noise", "signal"])
@pytest.mark.parametrize("dt", [0.3, 1e-4])
def test_straight_coupling_is_a_fixed_point_of_its_own_ode(consistency, dt):
    """The error is 0 for any dt, in both spaces, because its DDIM step is exact."""
    assert table_cell(straight, "own", consistency, dt) * dt**2 < 1e-28


@pytest.mark.parametrize("consistency", ["noise", "signal"])
@pytest.mark.parametrize("dt", [300.0, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_coupling_is_a_fixed_point_of_its_own_ode_on_the_linear_path(consistency, dt, shift):
    schedule = FlowSchedule(shift)

    def exact(z: Tensor, timestep: Tensor, conditioning) -> Tensor:
        s = (timestep / 1000).to(z)
        x = straight(z, 1 - s, s)
        return (z - x) / s  # u = eps - x, of z = (1 - s) x + s eps

    t, options = torch.tensor([700.0], dtype=torch.float64), {"consistency": consistency, "signal_weight": 0.0}
    losses = codi(exact, exact, gaussian_batch(10_000), schedule, seeded(1), t=t, dt=dt, **options)
    assert float(losses["consistency"]) < 1e-28


def test_flow_end_point_is_a_fixed_point_of_the_teachers_ode_on_the_linear_path():
    """In signal space error^2 / dt^2 falls as dt^2. The straight coupling is not a fixed point."""
    coarse, fine = (table_cell(flow, "teacher", "signal", dt, LINEAR, 600.0) for dt in (10.0, 1.0))
    assert coarse / fine == pytest.approx(100, rel=0.1)
    assert table_cell(straight, "teacher", "signal", 1.0, LINEAR, 600.0) > 50 * fine


def test_flow_end_point_is_a_fixed_point_of_the_denoisers_ode_in_signal_space():
    """Its error is 0 in the limit: that of one Euler step is O(dt^2), so error^2 / dt^2 falls as dt^2."""
    coarse, fine = (table_cell(flow, "teacher", "signal", dt) for dt in (1e-2, 1e-3))
    assert coarse < 2e-6
    assert coarse / fine == pytest.approx(100, rel=0.05)


def test_exact_denoiser_minimizes_both_data_terms():
    """Its loss is the posterior variance, and any change increases it."""
    t, batch = torch.tensor([400]), gaussian_batch(400_000, seed=4)
    alpha, sigma = (float(v) for v in LEVELS.alpha_sigma(t, batch.x))
    total = alpha**2 * S**2 + sigma**2

    def losses(function) -> tuple[float, float]:
        f = network(function, LEVELS)
        diffusion = finetune(f, f, batch, LEVELS, seeded(5), t=t)["diffusion"]
        signal = codi(f, f, batch, LEVELS, seeded(5), t=t, consistency_weight=0)["signal"]
        return float(diffusion), float(signal)

    exact = losses(denoiser)
    assert exact[0] == pytest.approx(S**2 / total, rel=0.01)  # of v: that of x over sigma^2
    assert exact[1] == pytest.approx(S**2 * sigma**2 / total, rel=0.01)
    for offset, scale in ((0.02, 1.0), (-0.02, 1.0), (0.0, 1.03), (0.0, 0.97)):
        worse = losses(lambda z, a, b, o=offset, k=scale: k * denoiser(z, a, b) + o)
        assert worse[0] > exact[0] and worse[1] > exact[1]


def test_exact_denoiser_minimizes_the_flow_loss():
    """With u = eps - x and z = (1 - s) x + s eps, |u - u_hat|^2 = |x - x_hat|^2 / s^2."""
    t, batch = torch.tensor([400.0], dtype=torch.float64), gaussian_batch(400_000, seed=4)
    alpha, sigma = (float(v) for v in LINEAR.alpha_sigma(t, batch.x))
    variance = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2)

    def loss(function) -> float:
        f = network(function, LINEAR)
        return float(finetune(f, f, batch, LINEAR, seeded(5), t=t)["diffusion"])

    exact = loss(denoiser)
    assert exact == pytest.approx(variance / sigma**2, rel=0.01)
    for offset, scale in ((0.02, 1.0), (-0.02, 1.0), (0.0, 1.03), (0.0, 0.97)):
        assert loss(lambda z, a, b, o=offset, k=scale: k * denoiser(z, a, b) + o) > exact
