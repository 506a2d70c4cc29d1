"""Samplers, first in closed form, then on tiny real networks; and the moving average."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codi.models.adapter import FORMS, FusedAdapter, LoraAdapter
from codi.models.student import Conditioning, Student
from codi.sampling.sampler import initial_noise, predict, sample, time_grid
from codi.schedule import CosineSchedule, DiscreteSchedule, Schedule
from codi.training import ema
from tiny import DOWNSCALE, LATENT_CHANNELS, TEXT_WIDTH, rand, randn, tiny_lora, tiny_scheduler, tiny_unet, tiny_vae

LEVELS = DiscreteSchedule.from_config(tiny_scheduler().config)
ZERO_SNR = DiscreteSchedule.from_config(tiny_scheduler(rescale_betas_zero_snr=True).config)
EPSILON = DiscreteSchedule.from_config(tiny_scheduler("epsilon").config)
M, S = 0.7, 0.5  # the data of the Gaussian world


class Formula(Student):
    """A student whose signal prediction is `x(z, alpha, sigma, conditioning)`, and which records its batch sizes."""

    def __init__(self, schedule: Schedule, x: Callable[..., Tensor]) -> None:
        nn.Module.__init__(self)
        self.schedule, self.x, self.adapter = schedule, x, None
        self.batches: list[int] = []

    def forward(self, z: Tensor, timestep: Tensor, conditioning: Conditioning, strength: float = 1.0) -> Tensor:
        self.batches.append(len(z))
        t = timestep + 1 if isinstance(self.schedule, DiscreteSchedule) else timestep
        alpha, sigma = self.schedule.alpha_sigma(t, z)
        x = self.x(z, alpha, sigma, conditioning)
        return self.schedule.output(x, (z - alpha * x) / sigma, t)


def denoiser(z: Tensor, alpha: Tensor, sigma: Tensor, _: Any) -> Tensor:
    """E[x | z] for data N(M, S^2)."""
    return M + alpha * S**2 * (z - alpha * M) / (alpha**2 * S**2 + sigma**2)


NOTHING = Conditioning(torch.zeros(1, 1, 1))

# ---- the Gaussian world


@pytest.mark.parametrize("schedule", [LEVELS, ZERO_SNR, EPSILON, CosineSchedule()], ids=["v", "zero snr", "eps", "cos"])
def test_ddim_converges_to_the_end_of_the_probability_flow(schedule):
    """x = m + s (z_T - alpha_T m) / sqrt(alpha_T^2 s^2 + sigma_T^2), and Euler's error is of first order."""
    z = randn(1, 1, 1, 500, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([schedule.horizon]), z)
    exact = M + S * (z - alpha * M) / (alpha**2 * S**2 + sigma**2).sqrt()
    student = Formula(schedule, denoiser)
    errors = [float((sample(student, schedule, z, NOTHING, n) - exact).abs().max()) for n in (1, 4, 16, 64, 256)]
    assert all(later < 0.75 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.35 * errors[-2] < 0.03


@pytest.mark.parametrize("schedule", [LEVELS, ZERO_SNR, CosineSchedule()], ids=["v", "zero snr", "cos"])
def test_sampling_applies_boundary_scaling_as_training_does(schedule):
    """A network whose scaled signal is the denoiser's gives the samples of the denoiser."""
    z = randn(1, 1, 1, 50, dtype=torch.float64)

    def unscaled(z: Tensor, alpha: Tensor, sigma: Tensor, _: Any) -> Tensor:
        t = schedule.horizon if isinstance(schedule, CosineSchedule) else 1000
        u = (torch.atan2(sigma, alpha) if isinstance(schedule, CosineSchedule) else levels[sigma.item()]) / t
        return (denoiser(z, alpha, sigma, _) - 0.25 / (u**2 + 0.25) * z) * (u**2 + 0.25) ** 0.5 / (0.5 * u)

    levels = {} if isinstance(schedule, CosineSchedule) else {v.item(): k for k, v in enumerate(schedule.sigmas)}
    plain, bounded = Formula(schedule, denoiser), Formula(schedule, unscaled)
    for steps in (1, 4):
        same = sample(plain, schedule, z, NOTHING, steps), sample(bounded, schedule, z, NOTHING, steps, boundary=True)
        torch.testing.assert_close(*same, rtol=0, atol=1e-9)


def test_many_steps_give_the_mean_and_spread_of_the_data():
    z = randn(1, 1, 1, 20_000, seed=1, dtype=torch.float64)
    z = (z - z.mean()) / z.std()
    few, many = (sample(Formula(ZERO_SNR, denoiser), ZERO_SNR, z, NOTHING, steps) for steps in (2, 1000))
    assert float(many.mean()) == pytest.approx(M, abs=1e-3)
    assert float(many.std()) == pytest.approx(S, abs=3e-3)
    assert float(few.std()) < 0.8 * S  # too few steps give the mean


def test_a_self_consistent_student_needs_one_step():
    """Straight paths: every number of steps ends at the same point."""

    def straight(z: Tensor, alpha: Tensor, sigma: Tensor, _: Any) -> Tensor:
        return M + S * (z - alpha * M) / (alpha * S + sigma)

    z = randn(1, 1, 1, 100, dtype=torch.float64)
    one = sample(Formula(LEVELS, straight), LEVELS, z, NOTHING, 1)
    for steps in (2, 4, 50):
        torch.testing.assert_close(
            sample(Formula(LEVELS, straight), LEVELS, z, NOTHING, steps), one, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("schedule", [LEVELS, EPSILON], ids=["v", "eps"])
def test_one_step_is_the_prediction_itself(schedule):
    z, student = randn(2, 4, 3, 3), Formula(schedule, denoiser)
    x, eps = predict(student, schedule, z, torch.tensor([1000]), NOTHING)
    assert torch.equal(sample(student, schedule, z, NOTHING, 1), x)
    torch.testing.assert_close(schedule.mix(x, eps, torch.tensor([1000])), z, rtol=0, atol=1e-5)


# ---- guidance


def towards_the_prompt(z: Tensor, alpha: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the mean of the prompt's features: 1 with a prompt, 0 without."""
    return conditioning.text.mean((1, 2)).view(-1, 1, 1, 1).to(z).expand_as(z)


PROMPT, BLANK = Conditioning(torch.ones(3, 2, 2)), Conditioning(torch.zeros(3, 2, 2))


@pytest.mark.parametrize("schedule", [LEVELS, EPSILON], ids=["v", "eps"])
@pytest.mark.parametrize("steps", [1, 4])
def test_guidance_goes_towards_the_prompt_and_beyond(schedule, steps):
    """The prediction without a prompt is 0 and with one 1: with guidance g it is g."""
    z, student = randn(3, 1, 2, 2, dtype=torch.float64), Formula(schedule, towards_the_prompt)
    for scale in (0.0, 0.5, 1.0, 2.0, 7.5):
        result = sample(student, schedule, z, PROMPT, steps, scale, BLANK)
        torch.testing.assert_close(result, torch.full_like(z, scale), rtol=0, atol=1e-9)


def test_guidance_1_is_no_guidance_and_costs_nothing():
    z, student = randn(3, 1, 2, 2), Formula(LEVELS, towards_the_prompt)
    plain = sample(student, LEVELS, z, PROMPT, 4)
    assert student.batches == [3] * 4
    assert torch.equal(sample(student, LEVELS, z, PROMPT, 4, 1.0, BLANK), plain) and student.batches == [3] * 8
    assert torch.equal(sample(student, LEVELS, z, PROMPT, 4, 5.0, None), plain) and student.batches == [3] * 12
    sample(student, LEVELS, z, PROMPT, 4, 5.0, BLANK)
    assert student.batches == [3] * 12 + [6] * 4


def test_each_sample_may_have_its_own_time():
    z, student, t = randn(3, 1, 2, 2), Formula(LEVELS, towards_the_prompt), torch.tensor([10, 500, 1000])
    for scale, unconditional in ((1.0, None), (3.0, BLANK)):
        x, _ = predict(student, LEVELS, z, t, PROMPT, scale, unconditional)
        torch.testing.assert_close(x, torch.full_like(z, scale), rtol=0, atol=1e-4)


# ---- tiny real networks


def tiny_student(form: str, count: int = 3) -> tuple[Student, Conditioning, Conditioning]:
    """Return (student with a trained-like adapter, conditioning, the same without the prompt)."""
    unet, vae = tiny_unet(), tiny_vae()
    adapter = FORMS[form].from_backbone(unet, vae)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.startswith(("mu.", "entry.2.")) or "controlnet_" in name:
                p.copy_(0.3 * rand(*p.shape))
    condition = adapter.read(rand(count, 3, 6 * DOWNSCALE, 6 * DOWNSCALE), vae)
    features, blank = randn(count, 5, TEXT_WIDTH, seed=1), randn(1, 5, TEXT_WIDTH, seed=2).repeat(count, 1, 1)
    unet = tiny_lora(unet) if isinstance(adapter, LoraAdapter) else unet
    return Student(unet, adapter).eval(), Conditioning(features, condition), Conditioning(blank, condition)


def rows_of(conditioning: Conditioning, index: slice) -> Conditioning:
    assert conditioning.condition is not None
    return Conditioning(conditioning.text[index], conditioning.condition[index])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_guidance_of_a_network_equals_the_formula(form):
    student, conditioning, blank = tiny_student(form)
    z, t = randn(3, LATENT_CHANNELS, 6, 6), torch.tensor([600])
    with_, without = (student(z, t - 1, c) for c in (conditioning, blank))
    expected = LEVELS.signal_noise(without + 3 * (with_ - without), z, t)
    prediction = predict(student, LEVELS, z, t, conditioning, 3.0, blank)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_an_image_does_not_depend_on_its_batch(form, guidance_scale):
    student, conditioning, blank = tiny_student(form)
    seeds = [11, 12, 13]
    noise = initial_noise((LATENT_CHANNELS, 6, 6), seeds)
    together = sample(student, LEVELS, noise, conditioning, 2, guidance_scale, blank)
    for i, seed in enumerate(seeds):
        row, alone = slice(i, i + 1), initial_noise((LATENT_CHANNELS, 6, 6), [seed])
        assert torch.equal(alone, noise[row])
        result = sample(student, LEVELS, alone, rows_of(conditioning, row), 2, guidance_scale, rows_of(blank, row))
        torch.testing.assert_close(result, together[row], rtol=0, atol=1e-5)
    assert torch.equal(sample(student, LEVELS, noise, conditioning, 2, guidance_scale, blank), together)


@pytest.mark.parametrize(("form", "guidance_scale", "runs"), [
    ("fused", 1.0, 1), ("fused", 2.0, 2), ("controlnet", 1.0, 4), ("controlnet", 2.0, 4),
])  # fmt: skip
def test_the_condition_encoder_runs_once_or_at_every_step(form, guidance_scale, runs):
    """The fused form once per picture (and once for the blank prompt), a ControlNet at every step."""
    student, conditioning, blank = tiny_student(form)
    assert student.adapter is not None
    encoder = student.adapter.encoder if isinstance(student.adapter, FusedAdapter) else student.adapter.net
    calls = []
    encoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    z = randn(3, LATENT_CHANNELS, 6, 6)
    result = sample(student, LEVELS, z, conditioning, 4, guidance_scale, blank)
    assert len(calls) == runs
    assert conditioning.prepared is None and blank.prepared is None  # the caller's conditionings are unchanged
    # Without the cache, in a student that prepares at every step, the image is the same.
    student.prepare = lambda c: c  # type: ignore[method-assign]
    forward = student.forward
    student.forward = lambda z, t, c, s=1.0: forward(z, t, prepare_uncached(student, c), s)  # type: ignore[method-assign]
    again = sample(student, LEVELS, z, conditioning, 4, guidance_scale, blank)
    torch.testing.assert_close(again, result, rtol=0, atol=1e-5)


def prepare_uncached(student: Student, conditioning: Conditioning) -> Conditioning:
    return Student.prepare(student, conditioning)


@pytest.mark.parametrize("form", FORMS)
def test_strength_0_samples_the_backbone(form):
    student, conditioning, _ = tiny_student(form)
    z = randn(3, LATENT_CHANNELS, 6, 6)
    backbone = sample(Student(student.network), LEVELS, z, Conditioning(conditioning.text), 2)
    assert torch.equal(sample(student, LEVELS, z, conditioning, 2, strength=0.0), backbone)
    assert not torch.allclose(sample(student, LEVELS, z, conditioning, 2), backbone)


def test_sampling_builds_no_graph_and_keeps_the_dtype():
    student, conditioning, _ = tiny_student("fused")
    result = sample(student, LEVELS, randn(3, LATENT_CHANNELS, 6, 6), conditioning, 2)
    assert not result.requires_grad and result.dtype == torch.float32 and result.isfinite().all()


# ---- grid, noise, callback


@pytest.mark.parametrize(
    ("steps", "grid"),
    [(1, [1000, 0]), (2, [1000, 500, 0]), (3, [1000, 667, 333, 0]), (4, [1000, 750, 500, 250, 0])],
)
def test_the_time_grid_is_even(steps, grid):
    assert time_grid(1000, steps).tolist() == grid


def test_every_grid_falls_from_noise_to_clean():
    for steps in (1, 7, 50, 333, 1000):
        grid = time_grid(1000, steps)
        assert len(grid) == steps + 1 and grid[0] == 1000 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert not grid.is_floating_point()
    smooth = time_grid(CosineSchedule.horizon, 4)
    torch.testing.assert_close(smooth, torch.pi / 8 * torch.tensor([4.0, 3, 2, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize("horizon", [1000, CosineSchedule.horizon], ids=["levels", "cosine"])
def test_a_shift_moves_the_grid_towards_noise(horizon):
    """u = s v / (s v + 1 - v): above 1 more of the times are noisy, below 1 fewer; 1 changes nothing."""
    for steps in (1, 2, 4, 50, 333, 1000):
        plain = time_grid(horizon, steps)
        assert torch.equal(time_grid(horizon, steps, 1.0), plain)
        for shift in (0.2, 1.5, 3.0, 12.0):
            grid = time_grid(horizon, steps, shift)
            assert len(grid) == steps + 1 and grid[0] == horizon and grid[-1] == 0 and (grid.diff() < 0).all()
            assert grid.dtype == plain.dtype
            assert (grid >= plain).all() if shift > 1 else (grid <= plain).all()
    assert time_grid(1000, 4, 3.0).tolist() == [1000, 900, 750, 500, 0]
    assert time_grid(1000, 2, 1 / 3).tolist() == [1000, 250, 0]


def test_sampling_follows_the_shifted_grid():
    z, student, times = randn(1, 1, 2, 2), Formula(LEVELS, denoiser), []
    shifted = sample(
        student,
        LEVELS,
        z,
        NOTHING,
        4,
        grid=time_grid(LEVELS.horizon, 4, 3.0),
        callback=lambda i, t, latent, x: times.append(t),
    )  # type: ignore[func-returns-value]
    assert times == [1000, 900, 750, 500]
    plain = sample(student, LEVELS, z, NOTHING, 4)
    assert torch.equal(
        sample(student, LEVELS, z, NOTHING, 4, grid=time_grid(LEVELS.horizon, 4)), plain
    ) and not torch.equal(shifted, plain)


def test_noise_depends_only_on_its_seed():
    noise = initial_noise((4, 8, 8), [3, 5, 3])
    assert noise.shape == (3, 4, 8, 8) and torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], randn(4, 8, 8, seed=5))
    state = torch.get_rng_state()
    initial_noise((4, 8, 8), [1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callback_sees_every_step_and_may_replace_the_latent():
    z, student = randn(1, 1, 2, 2), Formula(LEVELS, denoiser)
    calls: list[tuple[int, int, Tensor, Tensor]] = []
    result = sample(student, LEVELS, z, NOTHING, 4, callback=lambda *step: calls.append(step))  # type: ignore[func-returns-value]
    assert [(i, t) for i, t, _, _ in calls] == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert torch.equal(calls[-1][2], result) and torch.equal(calls[-1][3], result)
    start = z
    for (_, t, latent, x), s in zip(calls, (750, 500, 250, 0), strict=True):
        x_t, eps = predict(student, LEVELS, start, torch.tensor([t]), NOTHING)
        assert torch.equal(x, x_t) and torch.equal(latent, LEVELS.mix(x_t, eps, torch.tensor([s])))
        start = latent

    def replace(i: int, t: int, latent: Tensor, x: Tensor) -> Tensor | None:
        return torch.full_like(latent, 9.0) if i == 1 else None

    replaced = sample(student, LEVELS, z, NOTHING, 4, callback=replace)
    x, eps = predict(student, LEVELS, torch.full_like(z, 9.0), torch.tensor([500]), NOTHING)
    x, _ = predict(student, LEVELS, LEVELS.mix(x, eps, torch.tensor([250])), torch.tensor([250]), NOTHING)
    assert torch.equal(replaced, x)
    last = sample(student, LEVELS, z, NOTHING, 2, callback=lambda i, t, latent, x: -latent if i == 1 else None)
    assert torch.equal(last, -sample(student, LEVELS, z, NOTHING, 2))


# ---- the moving average


def test_the_average_has_its_closed_form():
    online = nn.Linear(1, 1, bias=False).double()
    average = ema.average_copy(online)
    start, values = float(average.weight), [2.0, -1.0, 5.0]
    expected = start
    for value in values:
        with torch.no_grad():
            online.weight.fill_(value)
        ema.update(average, online, 0.9)
        expected = 0.9 * expected + 0.1 * value
        assert float(average.weight) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    ema.update(average, online, 0.0)
    assert torch.equal(average.weight, online.weight)
    with torch.no_grad():
        online.weight.fill_(7.0)
    ema.update(average, online, 1.0)
    assert float(average.weight) == 5.0


def test_the_average_of_half_precision_weights_is_kept_in_float32():
    average = nn.Linear(1, 1, bias=False).requires_grad_(False)
    online = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        average.weight.fill_(1.0)
        online.weight.fill_(2.0)
    ema.update(average, online.half(), 0.9999)
    assert average.weight.dtype == torch.float32 and float(average.weight) == pytest.approx(1.0001, abs=1e-7)


def test_the_decay_warms_up():
    assert ema.warmed_decay(0.999, 0) == pytest.approx(0.1)
    assert ema.warmed_decay(0.999, 10) == pytest.approx(0.55)
    assert ema.warmed_decay(0.999, 10**6) == 0.999
    decays = [ema.warmed_decay(0.99, n) for n in range(2000)]
    assert decays == sorted(decays) and decays[-1] == 0.99
    assert ema.warmed_decay(0.0, 5) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_the_average_shares_what_is_frozen_and_copies_what_trains(form):
    student, conditioning, _ = tiny_student(form)
    for name, p in student.network.named_parameters():
        p.requires_grad_("lora_" in name)
    average = ema.average_copy(student.train())
    assert not average.training and student.training and not any(p.requires_grad for p in average.parameters())
    for (name, a), p in zip(average.named_parameters(), student.parameters(), strict=True):
        assert (a is p) == (name.startswith("network.") and "lora_" not in name) and torch.equal(a, p)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert trained  # averaging left the student's own flags unchanged
    shared = {name: p for name, p in student.network.named_parameters() if not p.requires_grad}
    z, t = randn(3, LATENT_CHANNELS, 6, 6), torch.tensor([500])
    with torch.no_grad():
        before, frozen = average(z, t, conditioning), {name: p.clone() for name, p in shared.items()}
        for p in trained:
            p.add_(0.1 * randn(*p.shape, seed=3))
        assert torch.equal(average(z, t, conditioning), before)
        ema.update(average, student, 0.5)
        assert not torch.equal(average(z, t, conditioning), before)
    assert frozen and all(torch.equal(p, frozen[name]) for name, p in shared.items())
    assert not any(p.requires_grad for p in average.parameters())
