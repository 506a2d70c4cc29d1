"""Objectives that predict where an ODE ends: decoupled, consistency and guided distillation."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from codi.models.adapter import FORMS
from codi.models.student import Conditioning, Student
from codi.objectives import OBJECTIVES
from codi.objectives.batch import Guidance, LatentBatch
from codi.objectives.codi import codi
from codi.objectives.consistency import consistency
from codi.objectives.decoupled import decoupled
from codi.objectives.guided import guided
from codi.sampling.sampler import initial_noise, sample
from codi.schedule import CosineSchedule, DiscreteSchedule
from codi.training.distill_recipe import SCALES, DistillRecipe
from test_fixed_points import M, S, denoiser, flow, gaussian_batch, network, straight
from tiny import LATENT_CHANNELS, TEXT_WIDTH, randn, seeded, tiny_scheduler, tiny_unet, tiny_vae

LEVELS, COSINE = DiscreteSchedule.from_config(tiny_scheduler().config), CosineSchedule()


@dataclass
class JumpOnly:
    """A conditioning that holds only the jump."""

    jump: Tensor | None = None


def two_predictions(instant, jump, schedule=COSINE):
    """Return a network that predicts with `jump` where the conditioning has one, else with `instant`."""
    nets = network(instant, schedule), network(jump, schedule)

    def forward(z, timestep, conditioning):
        predictions = [net(z, timestep, None) for net in nets]
        return torch.where(conditioning.jump[:, 0].bool().reshape(-1, *[1] * (z.ndim - 1)), *predictions[::-1])

    return forward


# ---- decoupled


def decoupled_losses(instant, jump, dt: float) -> dict[str, float]:
    net, batch = two_predictions(instant, jump), replace(gaussian_batch(400_000), conditioning=JumpOnly())
    t = torch.ones(1, dtype=torch.float64)
    return {k: float(v) for k, v in decoupled(net, net, batch, COSINE, seeded(1), dt=dt, dt_end=dt, t=t).items()}


def test_the_denoiser_and_the_end_of_the_flow_are_the_fixed_point_of_decoupled():
    """In the limit the consistency term is 0 and the data term is the denoiser's: the two do not conflict."""
    coarse, fine = (decoupled_losses(denoiser, flow, dt) for dt in (1e-2, 1e-3))
    assert coarse["consistency"] / 1e-4 < 3e-6
    assert coarse["consistency"] / fine["consistency"] == pytest.approx(1e4, rel=0.05)
    alpha, sigma = (float(v) for v in COSINE.alpha_sigma(torch.ones(1), torch.ones(1)))
    assert fine["signal"] == pytest.approx(S**2 / (alpha**2 * S**2 + sigma**2), rel=0.01)
    assert decoupled_losses(denoiser, straight, 1e-3)["consistency"] > 1e3 * fine["consistency"]
    assert decoupled_losses(flow, flow, 1e-3)["signal"] > 1.01 * fine["signal"]


@pytest.mark.parametrize(("progress", "step"), [(0.0, 256), (0.5, 64), (1.0, 16)])
def test_the_consistency_step_shrinks_during_training(progress, step):
    times = []

    def net(z, timestep, conditioning):
        times.append((timestep + 1, conditioning.jump[:, 0]))
        return 0.3 * z

    batch = replace(LatentBatch(randn(2, 4, 3, 3), JumpOnly()), progress=progress)
    decoupled(net, net, batch, LEVELS, seeded(), dt=256, dt_end=16, t=torch.tensor([300, 900]))
    assert [jump.tolist() for _, jump in times] == [[0, 0, 1, 1], [1, 1]]  # both predictions in one pass
    assert [t.tolist() for t, _ in times] == [[300, 900, 300, 900], [300 - step, 900 - step]]


@pytest.mark.parametrize("form", FORMS)
def test_before_training_every_target_time_gives_the_backbone_s_output_bit_for_bit(form):
    unet, vae = tiny_unet(), tiny_vae()
    adapter = FORMS[form].from_backbone(unet, vae, target_time=True)
    z, t = randn(2, LATENT_CHANNELS, 8, 8), torch.tensor([7, 900])
    read = adapter.read(torch.rand(2, 3, 32, 32, generator=seeded(2)), vae)
    conditioning = Conditioning(randn(2, 5, TEXT_WIDTH, seed=3), read)
    plain = Student(unet)(z, t, replace(conditioning, condition=None))
    for jump in (None, torch.zeros(2, 2), torch.tensor([[0.3, 0.2], [1.0, 0.9]])):
        assert torch.equal(Student(unet, adapter)(z, t, replace(conditioning, jump=jump)), plain)
    assert adapter.jump is not None
    torch.nn.init.normal_(adapter.jump.projection.weight)
    here, further = (
        Student(unet, adapter)(z, t, replace(conditioning, jump=torch.full((2, 2), u))) for u in (0.0, 0.4)
    )
    assert torch.equal(here, plain) and not torch.allclose(further, plain)


def test_both_terms_train_and_only_consistency_trains_the_jump_input():
    unet, vae = tiny_unet(), tiny_vae()
    adapter = FORMS["fused"].from_backbone(unet, vae, target_time=True)
    student = Student(unet, adapter)
    conditioning = Conditioning(
        randn(2, 5, TEXT_WIDTH), adapter.read(torch.rand(2, 3, 32, 32, generator=seeded(2)), vae)
    )
    batch, t = LatentBatch(randn(2, LATENT_CHANNELS, 8, 8), conditioning), torch.tensor([400, 900])
    losses = decoupled(student, student, batch, LEVELS, seeded(1), t=t)
    weight = adapter.jump.projection.weight
    for name, moves in (("signal", False), ("consistency", True)):
        gradients = torch.autograd.grad(losses[name], [weight, *adapter.mu], retain_graph=True, materialize_grads=True)
        assert bool(gradients[0].any()) == moves and all(g.any() for g in gradients[1:])


def test_a_perfect_jump_samples_the_data_in_any_number_of_steps():
    """For a Gaussian, mean and spread are right, and each seed draws its own noise."""

    class Perfect(Student):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.adapter = None

        def forward(self, z, timestep, conditioning, strength=1.0):
            assert conditioning.jump is not None and bool((conditioning.jump[:, 0] == 1).all())
            return network(flow, COSINE)(z, timestep, None)

    nothing = Conditioning(torch.zeros(1, 1, 1, dtype=torch.float64))
    for steps in (1, 2, 4):
        noise = torch.randn(1, steps, 1, 200_000, generator=seeded(4), dtype=torch.float64)
        x = sample(Perfect(), COSINE, noise, nothing, steps, sampler="renoise")
        assert x.shape == (1, 1, 1, 200_000)
        assert float(x.mean()) == pytest.approx(M, abs=5e-3) and float(x.std()) == pytest.approx(S, rel=5e-3)
    one, four = initial_noise((2, 4, 4), [5, 6]), initial_noise((2, 4, 4), [5, 6], 4)
    assert four.shape == (2, 8, 4, 4) and torch.equal(four[:, :2], one)
    assert not torch.equal(four[:, 2:4], four[:, :2])


# ---- consistency distillation


def test_consistency_equals_codi_with_a_teacher_ode_and_a_signal_loss():
    batch, t = gaussian_batch(1000), torch.tensor([500])
    nets = [network(f, LEVELS) for f in (straight, flow, denoiser)]
    student, target, teacher = nets
    mine = consistency(student, target, batch, LEVELS, seeded(1), teacher=teacher, dt=20, t=t)["consistency"]
    theirs = codi(
        student, target, batch, LEVELS, seeded(1), teacher=teacher, ode="teacher", consistency="signal", dt=20, t=t,
        signal_weight=0,
    )["consistency"]  # fmt: skip
    assert torch.equal(mine, theirs)
    tight, loose = (
        consistency(student, target, batch, LEVELS, seeded(1), teacher=teacher, dt=20, t=t, huber=c)["consistency"]
        for c in (1e-9, 1.0)
    )
    assert 2 * float(loose) == pytest.approx(float(mine), rel=1e-2)  # d^2 / 2c for small d, |d| for large
    assert float(tight) > float(mine)


def test_consistency_and_guided_follow_the_guided_teacher():
    """The teacher predicts 1 with the prompt and 0 without, so guidance g gives g: the target of both students."""
    scales = torch.tensor([[1.0], [3.0]])
    guidance = Guidance(scales, ["with", "without"])
    batch = LatentBatch(torch.zeros(2, 1, 2, 2, dtype=torch.float64), "with", guidance=guidance)

    def predicting(value):
        def net(z, timestep, conditioning):
            x = torch.full_like(z, 0.0 if conditioning == "without" else 1.0) * value
            alpha, sigma = LEVELS.alpha_sigma(timestep + 1, z)
            return LEVELS.output(x, (z - alpha * x) / sigma, timestep + 1)

        return net

    answer = scales.double().view(2, 1, 1, 1)
    for objective in (
        lambda net: guided(net, net, batch, LEVELS, seeded(), teacher=predicting(1.0), steps=4),
        lambda net: consistency(
            net, net, batch, LEVELS, seeded(), teacher=predicting(1.0), t=torch.tensor([300]), dt=300
        ),
    ):
        right, wrong = (float(sum(objective(predicting(value)).values())) for value in (answer, 1.0))
        assert right < 1e-12 and wrong > 1e-2


# ---- progressive distillation


@pytest.mark.parametrize("steps", [1, 4])
def test_guided_learns_two_teacher_steps_in_one(steps):
    """DDIM from the student's prediction lands where two steps of the teacher do."""
    batch = gaussian_batch(500)
    calls: list[tuple[Tensor, Tensor]] = []

    def student(z, timestep, _):
        calls.append((z, timestep + 1))
        return torch.zeros_like(z)

    index, teacher = torch.tensor([steps]), network(denoiser, LEVELS)
    guided(student, student, batch, LEVELS, seeded(1), teacher=teacher, steps=steps, index=index)
    z, t = calls[0]
    assert t.tolist() == [1000]
    middle, s = torch.tensor([1000 - 500 // steps]), torch.tensor([1000 - 1000 // steps])
    two = z
    for now, then in ((t, middle), (middle, s)):
        two = LEVELS.mix(*LEVELS.signal_noise(teacher(two, now - 1, None), two, now), then)
    (a_t, b_t), (a_s, b_s) = LEVELS.alpha_sigma(t, z), LEVELS.alpha_sigma(s, z)
    goal = (two - b_s / b_t * z) / (a_s - b_s / b_t * a_t)

    def perfect(z, timestep, _):
        return LEVELS.output(goal, (z - a_t * goal) / b_t, timestep + 1)

    torch.testing.assert_close(LEVELS.mix(goal, (z - a_t * goal) / b_t, s), two, rtol=0, atol=1e-9)
    loss = guided(perfect, perfect, batch, LEVELS, seeded(1), teacher=teacher, steps=steps, index=index)
    assert float(loss["distillation"]) < 1e-18


def test_a_teacher_with_straight_paths_is_the_fixed_point_of_guided():
    """Its steps are exact, so one equals two."""
    net = network(straight, COSINE)
    loss = guided(net, net, gaussian_batch(1000), COSINE, seeded(2), teacher=net, steps=4)
    assert float(loss["distillation"]) < 1e-18
    loss = guided(net, net, gaussian_batch(1000), COSINE, seeded(2), teacher=network(denoiser, COSINE), steps=4)
    assert float(loss["distillation"]) > 1e-4


# ---- the cost of training


@pytest.mark.parametrize("scales", [0, 1, 2])
@pytest.mark.parametrize(
    ("objective", "options"),
    [(name, {}) for name in OBJECTIVES]
    + [("codi", {"consistency_weight": 0}), ("codi", {"ode": "teacher"}), ("codi-tuned", {"ode": "teacher"})],
)
def test_the_recipe_counts_the_passes_of_the_objective(objective, options, scales):
    """A forward pass of one sample counts 1, with gradient 3."""
    passes = 0

    def net(z, timestep, conditioning):
        nonlocal passes
        passes += len(z) * (3 if torch.is_grad_enabled() else 1)
        return 0.3 * z

    batch = LatentBatch(randn(10, 4, 3, 3), JumpOnly())
    if scales:
        batch.guidance = Guidance(torch.full((10, scales), 2.0), [JumpOnly()] * (scales + 1))
    guidance = {name: [1, 4] for name in SCALES[:scales]}
    recipe = DistillRecipe(
        out="out", objective=objective, objective_options=options, guidance=guidance, guidance_share=1.0
    )
    loss = OBJECTIVES[objective].loss
    for k in range(20):  # the warm-up of a flow map takes three of them
        batch.progress = k / 20
        loss(net, net, batch, LEVELS, seeded(), **options, **({"teacher": net} if recipe.teaching else {}))
    assert recipe.passes == pytest.approx(passes / 10 / 20)


def test_consistency_weighting_and_the_averaged_target_take_effect():
    """Weighting "signal" drops the division by sigma; with `averaged` the average network gives the target."""
    x, conditioning = randn(2, 1, 4, 4), Conditioning(torch.zeros(2, 1, 1))
    mine, average = (lambda z, t, c, k=k: k * z + c.jump[:, :1, None, None] for k in (0.3, 0.6))
    batch, t = LatentBatch(x, conditioning), torch.tensor([0.7])

    def loss(**options) -> float:
        return float(
            decoupled(mine, average, batch, COSINE, seeded(1), dt=0.1, dt_end=0.1, t=t, **options)["consistency"]
        )

    sigma = math.sin(0.7)
    assert loss(consistency_weighting="signal") == pytest.approx(sigma**2 * loss(), rel=1e-5)
    assert loss(consistency_weight=5) == pytest.approx(5 * loss(), rel=1e-5)
    assert loss(averaged=True) != loss()
    own = decoupled(average, average, batch, COSINE, seeded(1), dt=0.1, dt_end=0.1, t=t)["consistency"]
    same = decoupled(average, average, batch, COSINE, seeded(1), dt=0.1, dt_end=0.1, t=t, averaged=True)["consistency"]
    assert torch.equal(own, same)
    with pytest.raises(ValueError, match="consistency_weighting 'pixel'"):
        loss(consistency_weighting="pixel")
