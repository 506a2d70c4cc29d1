"""The change of variables in float64, and the noise levels of real scheduler configs."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from codi.errors import UserError
from codi.models.backbones.transformer import flow_schedule
from codi.sampling.sampler import time_grid
from codi.schedule import (
    PREDICTIONS,
    CosineSchedule,
    DiscreteSchedule,
    FlowSchedule,
    flow_from_velocity,
    from_linear,
    from_signal_noise,
    to_linear,
    to_signal_noise,
    velocity_from_flow,
)
from tiny import randn, tiny_scheduler

LEVELS = torch.arange(1, 1001)


def discrete(prediction: str = "v_prediction", **changes) -> DiscreteSchedule:
    return DiscreteSchedule.from_config(tiny_scheduler(prediction, **changes).config)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_signal_and_noise_are_restored_at_every_level(prediction):
    schedule = discrete(prediction)
    x, eps = randn(1000, 2, 3, seed=1, dtype=torch.float64), randn(1000, 2, 3, seed=2, dtype=torch.float64)
    z = schedule.mix(x, eps, LEVELS)
    output = schedule.output(x, eps, LEVELS)
    x_back, eps_back = schedule.signal_noise(output, z, LEVELS)
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_back, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.output(x_back, eps_back, LEVELS), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_mixes_back_to_z(prediction):
    """For any output, alpha x + sigma eps is z, so a DDIM step of zero length changes nothing."""
    schedule = discrete(prediction)
    z, output = randn(1000, 2, 3, seed=3, dtype=torch.float64), randn(1000, 2, 3, seed=4, dtype=torch.float64)
    x, eps = schedule.signal_noise(output, z, LEVELS)
    torch.testing.assert_close(schedule.mix(x, eps, LEVELS), z, rtol=0, atol=1e-12)


def test_velocity_is_the_derivative_of_z():
    """With alpha = cos t, sigma = sin t: v = dz/dt."""
    schedule, t, h = CosineSchedule(), torch.linspace(0.1, 1.5, 7, dtype=torch.float64), 1e-6
    x, eps = randn(7, 3, seed=1, dtype=torch.float64), randn(7, 3, seed=2, dtype=torch.float64)
    slope = (schedule.mix(x, eps, t + h) - schedule.mix(x, eps, t - h)) / (2 * h)
    torch.testing.assert_close(schedule.output(x, eps, t), slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_variance_is_preserved_and_time_0_is_clean(zero_snr):
    schedule = discrete(rescale_betas_zero_snr=zero_snr)
    assert schedule.horizon == 1000 and len(schedule.alphas) == len(schedule.sigmas) == 1001
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1001).double(), rtol=0, atol=1e-15)
    assert schedule.alphas[0] == 1 and schedule.sigmas[0] == 0
    assert (schedule.sigmas.diff() > 0).all()
    assert (schedule.alphas[-1] == 0) == zero_snr


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_time_0_returns_the_clean_latent(prediction):
    schedule, clean = discrete(prediction), torch.tensor([0])
    x, eps = randn(2, 4, 3, 3, seed=1), randn(2, 4, 3, 3, seed=2)
    z = schedule.mix(x, eps, clean)
    assert torch.equal(z, x)
    x_back, eps_back = schedule.signal_noise(schedule.output(x, eps, clean), z, clean)
    assert torch.equal(x_back, x)
    assert eps_back.isfinite().all()
    anything, eps_back = schedule.signal_noise(randn(2, 4, 3, 3, seed=3), z, clean)
    assert torch.equal(anything, x) and eps_back.isfinite().all()


def test_shapes_and_dtypes_follow_the_latent():
    schedule = discrete()
    for like in (randn(3, 4, 5, 5), randn(3, 7).double(), randn(3, 2, 2, 2, 2).half()):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([1, 500, 1000]), like)
        assert alpha.shape == sigma.shape == (3, *[1] * (like.ndim - 1))
        assert alpha.dtype == sigma.dtype == like.dtype
    latent, _ = schedule.alpha_sigma(torch.tensor([7]), randn(3, 4, 5, 5))
    assert latent.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_levels_equal_those_of_diffusers(scheduler, beta_schedule):
    config = {"beta_schedule": beta_schedule, "num_train_timesteps": 50, "prediction_type": "v_prediction"}
    theirs = scheduler(**config)
    ours = DiscreteSchedule.from_config(theirs.config)
    assert ours.prediction == "v_prediction" and ours.horizon == 50
    torch.testing.assert_close(ours.alphas[1:] ** 2, theirs.alphas_cumprod.double(), rtol=0, atol=1e-15)


def test_zero_terminal_snr_is_respected():
    theirs = tiny_scheduler("v_prediction", rescale_betas_zero_snr=True)
    ours = DiscreteSchedule.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas[1:] ** 2, theirs.alphas_cumprod.double(), rtol=0, atol=1e-15)
    assert ours.alphas[-1] == 0 and discrete().alphas[-1] > 0


def test_epsilon_without_terminal_signal_is_refused():
    with pytest.raises(UserError, match="no signal left") as error:
        discrete("epsilon", rescale_betas_zero_snr=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prediction", ["flow", "", "eps"])
def test_unknown_prediction_is_refused(prediction):
    one = torch.ones(1)
    for attempt in (
        lambda: DiscreteSchedule(torch.tensor([0.9, 0.5]), prediction),
        lambda: to_signal_noise(one, one, one, one, prediction),
        lambda: from_signal_noise(one, one, one, one, prediction),
    ):
        with pytest.raises(UserError, match="prediction type"):
            attempt()


def test_the_network_gets_the_timestep_of_the_checkpoint():
    schedule = discrete()
    assert schedule.timestep(torch.tensor([0, 1, 2, 1000])).tolist() == [0, 0, 1, 999]
    t = torch.tensor([0.5])
    assert torch.equal(CosineSchedule().timestep(t), t)


@pytest.mark.parametrize("dt", [1, 7, 20])
def test_drawn_levels_are_uniform_on_dt_to_horizon(dt):
    schedule = discrete(num_train_timesteps=20)
    drawn = schedule.draw(20_000, dt, False, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000,) and not drawn.is_floating_point()
    counts = drawn.bincount(minlength=21)
    assert counts[:dt].sum() == 0 and len(counts) == 21
    expected = 20_000 / (21 - dt)
    assert (counts[dt:] - expected).abs().max() < 5 * math.sqrt(expected)  # five standard deviations


def test_drawn_continuous_times_are_uniform():
    schedule = CosineSchedule()
    drawn = schedule.draw(20_000, 0.3, False, torch.Generator().manual_seed(0))
    assert 0.3 <= drawn.min() < 0.301 and 1.569 < drawn.max() <= schedule.horizon
    quantiles = torch.linspace(0.3, schedule.horizon, 20_000, dtype=torch.float64)
    assert (drawn.sort().values - quantiles).abs().max() < 0.02  # Kolmogorov-Smirnov, far above its 1% point


@pytest.mark.parametrize("schedule", [discrete(), CosineSchedule()])
def test_shared_times_are_one_time_and_draws_are_seeded(schedule):
    def draw(seed, shared):
        return schedule.draw(16, 1, shared, torch.Generator().manual_seed(seed))

    assert draw(0, True).shape == (1,) and draw(0, False).shape == (16,)
    assert torch.equal(draw(3, False), draw(3, False)) and not torch.equal(draw(3, False), draw(4, False))
    assert torch.equal(draw(3, True), draw(3, True))
    assert len(draw(3, False).unique()) > 8


# ---- the linear path of flow matching


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_signal_and_noise_are_restored(shift):
    schedule, t = FlowSchedule(shift), torch.linspace(0, 1000, 101, dtype=torch.float64)
    x, eps = randn(101, 2, 3, seed=1, dtype=torch.float64), randn(101, 2, 3, seed=2, dtype=torch.float64)
    z = schedule.mix(x, eps, t)
    s = (schedule.timestep(t) / 1000).view(-1, 1, 1)
    torch.testing.assert_close(z, (1 - s) * x + s * eps, rtol=0, atol=1e-14)
    output = schedule.output(x, eps, t)
    assert torch.equal(output, eps - x)
    for restored, original in zip(schedule.signal_noise(output, z, t), (x, eps), strict=True):
        torch.testing.assert_close(restored, original, rtol=0, atol=1e-12)
    assert schedule.timestep(t)[[0, -1]].tolist() == [0, 1000] and bool((schedule.timestep(t).diff() > 0).all())


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow_prediction"])
def test_linear_and_variance_preserving_paths_convert_exactly(prediction):
    """Both directions at every level: z_lin = (1 - s) x + s eps, u = eps - x, from a variance-preserving network."""
    schedule = discrete(prediction)
    x, eps = randn(1000, 2, 3, seed=1, dtype=torch.float64), randn(1000, 2, 3, seed=2, dtype=torch.float64)
    z, (alpha, sigma) = schedule.mix(x, eps, LEVELS), schedule.alpha_sigma(LEVELS, x)
    linear, s = to_linear(z, alpha, sigma)
    torch.testing.assert_close(linear, (1 - s) * x + s * eps, rtol=0, atol=1e-14)
    torch.testing.assert_close(from_linear(linear, alpha, sigma), z, rtol=0, atol=1e-14)
    v = alpha * eps - sigma * x
    u = flow_from_velocity(v, z, alpha, sigma)
    torch.testing.assert_close(u, eps - x, rtol=0, atol=1e-12)
    torch.testing.assert_close(velocity_from_flow(u, z, alpha, sigma), v, rtol=0, atol=1e-12)
    signal_and_noise = schedule.signal_noise(schedule.output(x, eps, LEVELS), z, LEVELS)
    torch.testing.assert_close(signal_and_noise[1] - signal_and_noise[0], u, rtol=0, atol=1e-10)


def sigmas(schedule: FlowSchedule, steps: int) -> list[float]:
    return (schedule.timestep(time_grid(schedule.horizon, steps, whole=schedule.whole)) / 1000).tolist()


def test_a_static_shift_is_applied_once():
    """Where set_timesteps(4) of diffusers 0.42 gives 1, .858, .602, .0089, 0 (diffusers #13243)."""
    schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0).config, 0.0, 4)
    assert sigmas(schedule, 4) == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 4, 20])
@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({"shift": 3.0}, 0.0),
        ({"use_dynamic_shifting": True}, 0.9),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.7),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.8),
    ],
)
def test_sigmas_equal_those_of_diffusers(config, mu, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    if steps == 1 and "shift_terminal" in config:
        return  # with one step, the one sigma would be the terminal one
    evenly = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=evenly, mu=mu if config.get("use_dynamic_shifting") else None)
    computed = sigmas(flow_schedule(scheduler.config, mu, steps), steps)
    assert computed == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


def test_schedulers_of_the_wrong_kind_are_refused():
    with pytest.raises(UserError, match="has no flow shift"):
        flow_schedule(tiny_scheduler().config, 0.0, None)
    with pytest.raises(UserError, match="use_karras_sigmas is not supported"):
        flow_schedule(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config, 0.0, None)
