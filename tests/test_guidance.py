"""Distilled guidance: its training target in closed form, scale 1 as no guidance, and a network that learns it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from codi.models.adapter import FORMS, LoraAdapter
from codi.models.guidance import GuidanceEmbedding
from codi.models.student import Conditioning, Student
from codi.objectives.batch import Guidance, LatentBatch, guided_signal
from codi.objectives.codi import codi
from codi.objectives.finetune import finetune
from codi.sampling.sampler import sample
from codi.schedule import DiscreteSchedule, Schedule
from codi.training import ema
from tiny import (
    DOWNSCALE,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    rand,
    randn,
    seeded,
    tiny_lora,
    tiny_scheduler,
    tiny_unet,
    tiny_vae,
)

LEVELS = DiscreteSchedule.from_config(tiny_scheduler().config)
EPSILON = DiscreteSchedule.from_config(tiny_scheduler("epsilon").config)


# ---- the Gaussian world: a conditioning is the (mean, spread) of its data

FULL, LESS, NONE = (0.7, 0.5), (0.2, 0.8), (-0.4, 1.1)


def denoiser(z: Tensor, alpha: Tensor, sigma: Tensor, c: tuple[float, float]) -> Tensor:
    """E[x | z, c] for data N(mean, spread^2)."""
    mean, spread = c
    return mean + alpha * spread**2 * (z - alpha * mean) / (alpha**2 * spread**2 + sigma**2)


def exact(schedule: Schedule):
    """Return a perfectly trained network, for any conditioning."""

    def forward(z: Tensor, timestep: Tensor, c: tuple[float, float]) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(timestep + 1, z)
        x = denoiser(z, alpha, sigma, c)
        return schedule.output(x, (z - alpha * x) / sigma, timestep + 1)

    return forward


def guided(z: Tensor, t: Tensor, schedule: Schedule, scales: tuple[float, ...]) -> Tensor:
    """Return the exact prediction with classifier-free guidance.

    Ho & Salimans (2022) for one scale; Brooks et al. (2023), eq. 3, for text and image.
    """
    alpha, sigma = schedule.alpha_sigma(t, z)
    full, less, none = (denoiser(z, alpha, sigma, c) for c in (FULL, LESS, NONE))
    if len(scales) == 1:
        return less + scales[0] * (full - less)
    text, image = scales
    return none + image * (less - none) + text * (full - less)


def lattice() -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, eps, weights), each (144, 1, 1, 1): Gauss-Hermite nodes of x ~ N(FULL) and eps ~ N(0, 1)."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(12))
    x, eps = torch.meshgrid(FULL[0] + FULL[1] * nodes, nodes, indexing="ij")
    shape = (-1, 1, 1, 1)
    return x.reshape(shape), eps.reshape(shape), torch.outer(weights, weights).reshape(shape)


LADDERS = {
    "none": ((1.0,), [FULL, LESS]),
    "text": ((3.0,), [FULL, LESS]),
    "less than none": ((0.4,), [FULL, LESS]),
    "text and image": ((4.0, 1.6), [FULL, LESS, NONE]),
}


@pytest.mark.parametrize("schedule", [LEVELS, EPSILON], ids=["v", "eps"])
@pytest.mark.parametrize(("scales", "ladder"), LADDERS.values(), ids=LADDERS)
def test_the_mean_of_the_target_is_classifier_free_guidance(scales, ladder, schedule):
    """The best prediction from z_t, here a line by weighted least squares, is the guided exact prediction."""
    x, eps, weights = lattice()
    batch = LatentBatch(x, FULL, guidance=Guidance(torch.tensor([scales]).expand(len(x), -1), ladder))
    for level in (50, 400, 950):
        t = torch.tensor([level])
        z = schedule.mix(x, eps, t)
        target = guided_signal(batch, exact(schedule), z, t, schedule)
        assert target.dtype == torch.float64
        columns = torch.stack([torch.ones_like(z), z]).flatten(1).T
        root = weights.flatten().sqrt()
        line = torch.linalg.lstsq(columns * root[:, None], (target.flatten() * root)[:, None]).solution
        expected = guided(z, t, schedule, tuple(float(torch.tensor(s)) for s in scales)).flatten()
        torch.testing.assert_close((columns @ line).flatten(), expected, rtol=0, atol=1e-9)


def test_without_guidance_the_target_is_the_data():
    x, eps, _ = lattice()
    t = torch.tensor([400])
    z = LEVELS.mix(x, eps, t)
    plain = LatentBatch(x, FULL)
    assert guided_signal(plain, exact(LEVELS), z, t, LEVELS) is x
    unit_scales = replace(plain, guidance=Guidance(torch.ones(len(x), 2), [FULL, LESS, NONE]))
    assert torch.equal(guided_signal(unit_scales, exact(LEVELS), z, t, LEVELS), x)


def test_each_sample_has_its_own_scales():
    x, eps, _ = lattice()
    scales, t = 1 + 3 * rand(len(x), 2, dtype=torch.float64), torch.tensor([400])
    z = LEVELS.mix(x, eps, t)
    batch = LatentBatch(x, FULL, None, Guidance(scales, [FULL, LESS, NONE]))
    together = guided_signal(batch, exact(LEVELS), z, t, LEVELS)
    for i in range(0, len(x), 29):
        at = slice(i, i + 1)
        alone = LatentBatch(x[at], FULL, None, Guidance(scales[at], [FULL, LESS, NONE]))
        torch.testing.assert_close(guided_signal(alone, exact(LEVELS), z[at], t, LEVELS), together[at])


@pytest.mark.parametrize("schedule", [LEVELS, EPSILON], ids=["v", "eps"])
@pytest.mark.parametrize("objective", ["codi", "codi by velocity", "finetune"])
def test_the_losses_are_minimal_at_classifier_free_guidance(objective, schedule):
    scales, t, count = (3.0, 1.5), torch.tensor([600]), 200_000
    x = FULL[0] + FULL[1] * randn(1, 1, 1, count, seed=4, dtype=torch.float64)
    batch = LatentBatch(x, FULL, guidance=Guidance(torch.tensor([scales]), [FULL, LESS, NONE]))

    def loss(scale: float, offset: float) -> float:
        def student(z: Tensor, timestep: Tensor, _) -> Tensor:
            x = scale * guided(z, t, schedule, scales) + offset
            alpha, sigma = schedule.alpha_sigma(t, z)
            return schedule.output(x, (z - alpha * x) / sigma, t)

        if objective == "finetune":
            return float(finetune(student, exact(schedule), batch, schedule, seeded(5), t=t)["diffusion"])
        weighting = "velocity" if "velocity" in objective else "signal"
        options = {"consistency_weight": 0.0, "signal_weighting": weighting, "t": t}
        return float(codi(student, exact(schedule), batch, schedule, seeded(5), **options)["signal"])

    best = loss(1, 0)
    for scale, offset in ((1, 0.03), (1, -0.03), (1.03, 0), (0.97, 0)):
        assert loss(scale, offset) > best


# ---- the scales as input


def trained(adapter, seed: int = 3):
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.startswith(("mu.", "guidance.")) or "controlnet_" in name:
                p.copy_(0.3 * randn(*p.shape, seed=seed))
    return adapter


def test_the_embedding_is_0_at_1_and_odd_around_it():
    embedding = GuidanceEmbedding(2, 5)
    scales = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1 / 3, 1.0], [3.0, 2.0]])
    assert not embedding(scales).any()  # before training
    torch.nn.init.normal_(embedding.projection.weight, generator=seeded())
    none, text, image, less, _ = embedding(scales)
    assert not none.any() and text.all() and image.all() and not torch.allclose(text, image)
    torch.testing.assert_close(less, -text)
    assert embedding(torch.tensor([[0.0, 1e6]])).isfinite().all()
    assert embedding(scales).shape == (5, 5) and embedding.half()(scales).dtype == torch.float16


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_guidance_1_is_exactly_no_guidance_after_training(form):
    unet, vae = tiny_unet(), tiny_vae()
    adapter = trained(FORMS[form].from_backbone(unet, vae, 3, 2))
    student = Student(tiny_lora(unet), adapter)
    condition = adapter.read(rand(2, 3, 8 * DOWNSCALE, 8 * DOWNSCALE), vae)
    plain = Conditioning(randn(2, 5, TEXT_WIDTH, seed=1), condition)
    z, timestep = randn(2, LATENT_CHANNELS, 8, 8), torch.tensor([700])
    expected = student(z, timestep, plain)
    assert torch.equal(student(z, timestep, replace(plain, guidance=torch.ones(2, 2))), expected)
    for scales in ([3.0, 1.0], [1.0, 3.0]):
        guided_conditioning = replace(plain, guidance=torch.tensor([scales, [1.0, 1.0]]))
        for conditioning in (guided_conditioning, student.prepare(guided_conditioning)):
            output = student(z, timestep, conditioning)
            assert not torch.allclose(output[0], expected[0])  # the first sample has guidance, the second has not
            torch.testing.assert_close(output[1], expected[1], rtol=0, atol=1e-6)
        # At strength 0 guidance has no effect.
        assert torch.equal(student(z, timestep, guided_conditioning, 0.0), unet(z, timestep, plain.text).sample)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_an_adapter_without_guidance_ignores_it(form):
    unet, vae = tiny_unet(), tiny_vae()
    adapter = FORMS[form].from_backbone(unet, vae, 3, 0)
    if isinstance(adapter, LoraAdapter):  # it always has one scale, which has no effect before training
        assert adapter.guidance is not None and adapter.guidance.scales == 1
    else:
        assert adapter.guidance is None
    condition = adapter.read(rand(2, 3, 32, 32), vae)
    plain = Conditioning(randn(2, 5, TEXT_WIDTH, seed=1), condition)
    z, guided_conditioning = randn(2, LATENT_CHANNELS, 8, 8), replace(plain, guidance=torch.full((2, 1), 4.0))
    student, timestep = Student(unet, trained(adapter) if adapter.guidance is None else adapter), torch.tensor([9])
    assert torch.equal(student(z, timestep, guided_conditioning), student(z, timestep, plain))


@torch.no_grad()
def test_guidance_costs_one_forward_pass_per_step():
    unet, vae = tiny_unet(), tiny_vae()
    adapter = trained(FORMS["fused"].from_backbone(unet, vae, 3, 1))
    batches: list[int] = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    condition = adapter.read(rand(2, 3, 32, 32), vae)
    conditioning = Conditioning(randn(2, 5, TEXT_WIDTH, seed=1), condition, guidance=torch.full((2, 1), 4.0))
    result = sample(Student(unet, adapter), LEVELS, randn(2, LATENT_CHANNELS, 8, 8), conditioning, 4)
    assert batches == [2, 2, 2, 2] and result.isfinite().all()


# ---- learning guidance


def test_a_student_learns_the_direction_of_guidance():
    """The prompt means +X, no prompt -X: guided by g the prediction is X + 2 (g - 1) X. After some training the
    output moves along (with - without) prompt, further for larger g; both predictions come from the student itself."""
    unet = tiny_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    student = Student(unet, LoraAdapter.from_backbone(unet, tiny_vae()))
    average = ema.average_copy(student)
    count, t = 4, torch.tensor([700])
    empty = torch.arange(count).view(-1, 1, 1) % 4 == 0
    prompt, meaning = randn(1, 5, TEXT_WIDTH, seed=1).repeat(count, 1, 1), randn(1, 4, 1, 1, seed=3) / 2
    nothing = torch.zeros(count, 0, 8, 8)
    with_, without = (Conditioning(text, nothing) for text in (prompt, torch.zeros_like(prompt)))
    conditioning = Conditioning(prompt.where(~empty, torch.tensor(0.0)), nothing)
    x = torch.where(empty[..., None], -meaning, meaning).expand(count, LATENT_CHANNELS, 2, 2)
    # Like mu, the zero weights have far to go: at the network's rate, guided predictions would leak into plain ones.
    guidance = list(student.adapter.guidance.parameters())  # type: ignore[union-attr]
    groups = [{"params": list(unet.parameters())}, {"params": guidance, "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(200):
        generator = seeded(step)
        scales = torch.where(empty[..., 0], 1.0, 1 + 2 * torch.rand(count, 1, generator=generator))
        batch = LatentBatch(x, conditioning)
        if step % 2:
            batch = LatentBatch(
                x, replace(conditioning, guidance=scales), None, Guidance(scales, [conditioning, without])
            )
        loss = codi(student, average, batch, LEVELS, generator, t=t, consistency_weight=0)["signal"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(average, student, ema.warmed_decay(0.9, step))
    z, timestep = randn(count, LATENT_CHANNELS, 2, 2, seed=9), LEVELS.timestep(t)

    def signal(conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            return LEVELS.signal_noise(average(z, timestep, conditioning), z, t)[0]

    plain = signal(with_)
    direction = plain - signal(without)
    shares = []
    for scale in (1.0, 1.5, 2.0, 3.0):
        moved = signal(replace(with_, guidance=torch.full((count, 1), scale))) - plain
        shares.append(float((moved * direction).sum() / direction.square().sum()))
        if scale > 1:
            assert torch.cosine_similarity(moved.flatten(), direction.flatten(), dim=0) > 0.8
    assert shares[0] == 0 and 0 < shares[1] < shares[2] < shares[3]
    assert shares[3] == pytest.approx(2, abs=0.8)  # g - 1
