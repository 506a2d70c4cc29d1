"""CoDi's loss and plain diffusion training: by hand in float64, then on tiny real networks."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from codi.models.adapter import FORMS
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student
from codi.objectives.batch import Guidance, LatentBatch
from codi.objectives.codi import codi
from codi.objectives.consistency import consistency
from codi.objectives.distances import latent
from codi.objectives.finetune import finetune
from codi.schedule import PREDICTIONS, DiscreteSchedule
from tiny import DOWNSCALE, LATENT_CHANNELS, TEXT_WIDTH, rand, randn, seeded, tiny_scheduler, tiny_unet, tiny_vae

LEVELS = DiscreteSchedule.from_config(tiny_scheduler().config)


# ---- by hand, on recording networks


class Recorder:
    """A network with the fixed output a z + b that records its inputs."""

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b
        self.z: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, z: Tensor, timestep: Tensor, conditioning) -> Tensor:
        assert conditioning == "conditioning"
        self.z.append(z)
        self.timesteps.append(timestep)
        return self.a * z + self.b


def recorders() -> tuple[Recorder, Recorder, Recorder]:
    return Recorder(0.3, 0.1), Recorder(0.5, -0.2), Recorder(-0.4, 0.05)


def float64_batch(count: int = 3) -> LatentBatch:
    return LatentBatch(randn(count, 4, 3, 3, seed=2, dtype=torch.float64), "conditioning")


@pytest.mark.parametrize("ode", ["own", "teacher"])
@pytest.mark.parametrize("consistency", ["noise", "signal"])
def test_one_step_equals_a_computation_by_hand(consistency, ode):
    student, target, teacher = recorders()
    batch, t, dt = float64_batch(), torch.tensor([300, 620, 11]), 10
    losses = codi(
        student, target, batch, LEVELS, seeded(3), dt=dt, consistency=consistency, ode=ode, teacher=teacher, t=t
    )
    (a_t, b_t), (a_s, b_s) = (LEVELS.alpha_sigma(time, batch.x) for time in (t, t - dt))
    z_t = a_t * batch.x + b_t * torch.randn(batch.x.shape, generator=seeded(3), dtype=torch.float64)
    v = 0.3 * z_t + 0.1
    x_t, e_t = a_t * z_t - b_t * v, a_t * v + b_t * z_t
    v_path = v if ode == "own" else -0.4 * z_t + 0.05
    z_s = a_s * (a_t * z_t - b_t * v_path) + b_s * (a_t * v_path + b_t * z_t)
    v_s = 0.5 * z_s - 0.2
    x_s, e_s = a_s * z_s - b_s * v_s, a_s * v_s + b_s * z_s
    expected = (e_t - e_s) if consistency == "noise" else (x_t - x_s)
    torch.testing.assert_close(losses["consistency"], expected.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["signal"], (x_t - batch.x).square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.z[0], z_t, rtol=0, atol=1e-14)
    torch.testing.assert_close(target.z[0], z_s, rtol=0, atol=1e-12)
    assert torch.equal(student.timesteps[0], t - 1) and torch.equal(target.timesteps[0], t - dt - 1)
    assert len(teacher.z) == (ode == "teacher")


def test_the_paper_s_choices_are_the_defaults():
    default = codi(*recorders()[:2], float64_batch(), LEVELS, seeded(3))
    spelled_out = codi(
        *recorders()[:2], float64_batch(), LEVELS, seeded(3), dt=1, shared_t=True, consistency="noise", ode="own",
        d_x=latent, consistency_weight=1.0, signal_weight=1.0, signal_weighting="signal",
    )  # fmt: skip
    assert default.keys() == {"consistency", "signal"}
    assert all(torch.equal(default[name], spelled_out[name]) for name in default)
    again, reseeded = (codi(*recorders()[:2], float64_batch(), LEVELS, seeded(seed))["signal"] for seed in (3, 4))
    assert torch.equal(default["signal"], again) and not torch.equal(default["signal"], reseeded)


@pytest.mark.parametrize("consistency", ["noise", "signal"])
@pytest.mark.parametrize("dt", [1, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_the_times_of_a_batch_lie_dt_apart(shared, dt, consistency):
    student, target, _ = recorders()
    for seed in range(200):
        codi(student, target, float64_batch(4), LEVELS, seeded(seed), dt=dt, shared_t=shared, consistency=consistency)
    timesteps, target_timesteps = torch.stack(student.timesteps), torch.stack(target.timesteps)
    assert timesteps.shape == (200, 1 if shared else 4)
    assert shared or (timesteps.diff(dim=1) != 0).any(dim=1).all()
    # The network gets t - 1, and the number of the first level where s = 0 is below it.
    assert torch.equal(target_timesteps, (timesteps - dt).clamp_min(0))
    # With a noise loss s = 0 does not occur: a clean latent has no noise.
    assert (
        timesteps.min() >= dt - (consistency == "signal")
        and timesteps.max() <= 999
        and timesteps.max() - timesteps.min() > 850 - dt
    )


def test_times_on_a_grid_are_its_multiples():
    student, target, _ = recorders()
    for seed in range(100):
        codi(student, target, float64_batch(4), LEVELS, seeded(seed), dt=50, shared_t=False, on_grid=True)
    times = 1 + torch.stack(student.timesteps).flatten()
    levels, counts = times.unique(return_counts=True)
    assert levels.tolist() == list(range(50, 1001, 50)) and counts.min() >= 5
    assert torch.equal(1 + torch.stack(target.timesteps).flatten(), (times - 50).clamp_min(1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("boundary", [False, True])
def test_every_time_gives_a_finite_loss_and_gradient(prediction, boundary):
    schedule = DiscreteSchedule.from_config(tiny_scheduler(prediction).config)
    weight = torch.tensor(0.5, requires_grad=True)
    x = randn(1, 4, 3, 3)
    for t in (1, 2, 500, 999, 1000):
        losses = codi(
            lambda z, *_: weight * z, lambda z, *_: 0.4 * z, LatentBatch(x, None), schedule, seeded(t),
            t=torch.tensor([t]), boundary=boundary,
        )  # fmt: skip
        weight.grad = None
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert all(loss.isfinite() for loss in losses.values())
        assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0


def test_weights_scale_their_terms_and_0_omits_them():
    def run(**weights):
        student, target, _ = recorders()
        losses = codi(student, target, float64_batch(), LEVELS, seeded(3), **weights)
        return losses, len(target.z)

    plain, _ = run()
    scaled, _ = run(consistency_weight=3.0, signal_weight=0.1)
    torch.testing.assert_close(scaled["consistency"], 3 * plain["consistency"])
    torch.testing.assert_close(scaled["signal"], 0.1 * plain["signal"])
    only_signal, target_calls = run(consistency_weight=0.0)
    assert only_signal.keys() == {"signal"} and target_calls == 0
    assert torch.equal(only_signal["signal"], plain["signal"])
    only_consistency, _ = run(signal_weight=0.0)
    assert only_consistency.keys() == {"consistency"}
    assert torch.equal(only_consistency["consistency"], plain["consistency"])


@pytest.mark.parametrize(
    "wrong", [{"consistency": "both"}, {"signal_weighting": "both"}, {"ode": "theirs"}, {"ode": "teacher"}]
)
def test_unknown_options_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        codi(*recorders()[:2], float64_batch(), LEVELS, seeded(), **wrong)


# ---- boundary scaling


def test_boundary_scaling_has_its_closed_form():
    t = torch.tensor([0, 1, 2, 500, 999, 1000])
    x, z = randn(6, 4, 2, 2, seed=1, dtype=torch.float64), randn(6, 4, 2, 2, seed=2, dtype=torch.float64)
    scaled, eps = LEVELS.boundary_scaling(x, z, t)
    assert torch.equal(scaled[0], z[0]) and not eps[0].any()
    assert scaled.isfinite().all() and eps.isfinite().all()
    torch.testing.assert_close(LEVELS.mix(scaled, eps, t), z, rtol=0, atol=1e-12)
    # u = t / T, sd = 0.5: at T, c_skip = .25 / 1.25 = 0.2 and c_out = 0.5 / sqrt(1.25).
    torch.testing.assert_close(scaled[5], 0.2 * z[5] + 0.5 / 1.25**0.5 * x[5])
    torch.testing.assert_close(scaled[3], 0.5 * z[3] + 0.5**0.5 * 0.5 * x[3])


def test_in_the_unit_of_the_authors_release_boundary_scaling_is_the_identity():
    """The release uses the unit of diffusers' LCM: 10 times the level, numbered from 0."""
    scheduler = LCMScheduler()
    for level in range(1, 1000):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(level)))
        assert skip <= 0.0025 / level**2 + 1e-7 and 1 - out <= 0.00125 / level**2 + 1e-7


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_signals_at_the_clean_end_are_compared_with_the_teacher_s(prediction):
    """At t = dt, x(z_0, 0) = z_0 for any output of the target network, so the loss is |x_t - x_T|^2."""
    schedule = DiscreteSchedule(LEVELS.alphas[1:].square(), prediction)
    batch, t = float64_batch(), torch.tensor([20])
    student, target, teacher = recorders()
    loss = consistency(student, target, batch, schedule, seeded(3), teacher=teacher, dt=20, t=t)["consistency"]
    z_t = student.z[0]
    x_t, x_teacher = (schedule.signal_noise(net(z_t, t, batch.conditioning), z_t, t)[0] for net in (student, teacher))
    torch.testing.assert_close(loss, (x_t - x_teacher).square().mean(), rtol=1e-12, atol=0)


def test_codi_uses_the_boundary_scaling_for_both_networks():
    student, target, _ = recorders()
    batch, t = float64_batch(), torch.tensor([600])
    losses = codi(student, target, batch, LEVELS, seeded(3), dt=50, t=t, boundary=True)
    z = student.z[0]
    x_t, e_t = LEVELS.boundary_scaling(LEVELS.signal_noise(student(z, t, batch.conditioning), z, t)[0], z, t)
    s, z_s = t - 50, LEVELS.mix(x_t, e_t, t - 50)
    e_s = LEVELS.boundary_scaling(LEVELS.signal_noise(target(z_s, s, batch.conditioning), z_s, s)[0], z_s, s)[1]
    torch.testing.assert_close(losses["consistency"], (e_t - e_s).square().mean())
    torch.testing.assert_close(losses["signal"], (x_t - batch.x).square().mean())


# ---- plain diffusion training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_finetune_equals_a_computation_by_hand(prediction):
    schedule = DiscreteSchedule.from_config(tiny_scheduler(prediction).config)
    student, target, _ = recorders()
    batch, t = float64_batch(), torch.tensor([1, 500, 1000])
    loss = finetune(student, target, batch, schedule, seeded(6), t=t)
    assert loss.keys() == {"diffusion"} and not target.z
    alpha, sigma = (v.view(3, 1, 1, 1) for v in (schedule.alphas[t], schedule.sigmas[t]))
    eps = torch.randn(batch.x.shape, generator=seeded(6), dtype=torch.float64)
    z = alpha * batch.x + sigma * eps
    truth = {"epsilon": eps, "v_prediction": alpha * eps - sigma * batch.x, "sample": batch.x}[prediction]
    torch.testing.assert_close(loss["diffusion"], (0.3 * z + 0.1 - truth).square().mean(), rtol=1e-12, atol=0)
    assert torch.equal(student.timesteps[0], t - 1)


@pytest.mark.parametrize("guided", [False, True])
def test_codi_s_data_term_by_velocity_is_the_loss_of_a_velocity_network(guided):
    """|x_t - x|^2 / sigma_t^2 = |v_t - v|^2, so both give every noise level the same weight."""
    for t in (torch.tensor([1, 500, 1000]), torch.tensor([300])):
        student, target, _ = recorders()
        batch = float64_batch()
        if guided:  # the network takes any conditioning
            batch = replace(batch, guidance=Guidance(torch.tensor([[2.0], [3.0], [1.0]]), [0.0, 1.0]))
            target = numeric_network
        fine = finetune(student, target, batch, LEVELS, seeded(6), t=t)["diffusion"]
        options: dict[str, Any] = {"t": t, "consistency_weight": 0}
        signal = codi(student, target, batch, LEVELS, seeded(6), signal_weighting="velocity", **options)["signal"]
        torch.testing.assert_close(signal, fine, rtol=1e-9, atol=0)
        if len(t) == 1:
            plain = codi(student, target, batch, LEVELS, seeded(6), **options)["signal"]
            torch.testing.assert_close(plain, fine * LEVELS.sigmas[t].square().squeeze(), rtol=1e-9, atol=0)


def numeric_network(z: Tensor, timestep: Tensor, conditioning: float) -> Tensor:
    return 0.2 * z + conditioning


@pytest.mark.parametrize("shared", [False, True])
def test_finetune_draws_all_levels(shared):
    student, target, _ = recorders()
    for seed in range(200):
        finetune(student, target, float64_batch(4), LEVELS, seeded(seed), shared_t=shared)
    timesteps = torch.stack(student.timesteps)
    assert timesteps.shape == (200, 1 if shared else 4) and timesteps.min() < 30 and timesteps.max() > 970


# ---- real networks


def tiny_students(form: str, full: bool) -> tuple[Student, Student, LatentBatch]:
    """Return (student, target, batch). `full`: the backbone trains too. Form lora: its low-rank updates train."""
    unet, vae = tiny_unet(), tiny_vae()
    unet.requires_grad_(full)
    updated = add_lora(unet, 2, "generate") if form == "lora" else unet
    student = Student(updated, FORMS[form].from_backbone(unet, vae))
    assert student.adapter is not None
    condition = student.adapter.read(rand(2, 3, 6 * DOWNSCALE, 6 * DOWNSCALE), vae)
    batch = LatentBatch(randn(2, LATENT_CHANNELS, 6, 6), Conditioning(randn(2, 5, TEXT_WIDTH, seed=1), condition))
    return student, copy.deepcopy(student), batch


@pytest.mark.parametrize("ode", ["own", "teacher"])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_student_gets_gradients(form, ode):
    student, target, batch = tiny_students(form, full=True)
    teacher = copy.deepcopy(target)
    sum(codi(student, target, batch, LEVELS, seeded(), ode=ode, teacher=teacher).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in [*target.parameters(), *teacher.parameters()])
    reached = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == ({"network"} if form == "lora" else {"network", "adapter"})


@pytest.mark.parametrize(
    "form, full",
    [
        ("fused", False),
        ("fused", True),
        ("controlnet", False),
        ("controlnet", True),
        ("lora", False),
    ],
)
@pytest.mark.parametrize("objective", [codi, finetune])
def test_only_full_training_changes_the_backbone(objective, form, full):
    """Parameter-efficient training leaves the backbone's bytes unchanged, full training does not."""
    student, target, batch = tiny_students(form, full)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    target_before = {name: p.detach().clone() for name, p in target.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        sum(objective(student, target, batch, LEVELS, seeded(step)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    same = {name: torch.equal(before[name], p) for name, p in student.named_parameters()}
    assert all(same[name] != full for name in same if name.startswith("network.") and "lora_" not in name)
    trained = "lora_" if form == "lora" else "adapter."
    assert not any(same[name] for name in same if trained in name) and any(trained in name for name in same)
    assert all(torch.equal(target_before[name], p) for name, p in target.named_parameters())


def test_a_few_steps_lower_the_loss():
    student, target, batch = tiny_students("fused", full=False)
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-2)
    history = []
    for _ in range(12):
        losses = codi(student, target, batch, LEVELS, seeded(1), t=torch.tensor([700]))
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        history.append(float(losses["signal"].detach()))
    assert history[-1] < 0.95 * history[0]
