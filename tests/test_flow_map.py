"""The semigroup objective in a world where the flow map is known: data N(m, d^2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from codi.models.adapter import HintAdapter, network_config
from codi.models.guidance import SineEmbedding, jump_between
from codi.models.student import Conditioning, Student, conditioning_rows
from codi.objectives.batch import LatentBatch
from codi.objectives.flow_map import flow_map, linear_time
from codi.sampling.sampler import sample, sampler_of
from codi.schedule import CosineSchedule, DiscreteSchedule, FlowSchedule, Schedule
from tiny import tiny_unet

MEAN, DEVIATION = 0.7, 0.5
SCHEDULES = {
    "cosine": CosineSchedule(),
    "flow": FlowSchedule(3.0),
    "levels": DiscreteSchedule(torch.linspace(0.999, 0.01, 1000), "v_prediction"),
    "terminal": DiscreteSchedule(torch.linspace(0.999, 0.0, 1000), "v_prediction"),
}


@dataclass
class Inputs:
    """What the networks here look at."""

    jump: Tensor


class Exact:
    """The flow map itself, (z - alpha m) / sqrt(alpha^2 d^2 + sigma^2) being constant along the flow; `blind` answers
    with the instantaneous prediction, whatever the target time."""

    def __init__(self, schedule: Schedule, blind: bool = False) -> None:
        self.schedule, self.blind, self.rows = schedule, blind, 0
        if isinstance(schedule, DiscreteSchedule):
            self.time = lambda timestep: timestep + 1
        elif isinstance(schedule, FlowSchedule):
            shifted = lambda s: 1000 * s / (schedule.shift - (schedule.shift - 1) * s)  # noqa: E731
            self.time = lambda timestep: shifted(timestep / 1000)
        else:
            self.time = lambda timestep: timestep

    def __call__(self, z: Tensor, timestep: Tensor, inputs: Inputs) -> Tensor:
        self.rows += len(z)
        t = self.time(timestep)
        a, b = self.schedule.alpha_sigma(t, z)
        variance = a**2 * DEVIATION**2 + b**2
        x = MEAN + a * DEVIATION**2 * (z - a * MEAN) / variance  # the denoiser
        r = (1 - inputs.jump[:, 0].double()) * t
        r = r.round() if self.schedule.whole else r
        if not self.blind and (r != t).any():
            c, e = self.schedule.alpha_sigma(r, z)
            end = c * MEAN + ((c**2 * DEVIATION**2 + e**2) / variance).sqrt() * (z - a * MEAN)
            jump = (b * end - e * z) / torch.where(r[:, None] == t[:, None], 1.0, b * c - e * a)  # of z and end
            x = torch.where(r[:, None] == t[:, None], x, jump)
        return self.schedule.output(x, (z - a * x) / b.clamp_min(1e-12), t)


def batch(count: int = 4000, progress: float = 0.5) -> LatentBatch:
    generator = torch.Generator().manual_seed(0)
    x = MEAN + DEVIATION * torch.randn(count, 1, dtype=torch.float64, generator=generator)
    return LatentBatch(x, Inputs(torch.zeros(count, dtype=torch.float64)), progress=progress)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_flow_map_is_a_fixed_point_and_the_denoiser_alone_is_not(schedule):
    exact, blind = Exact(schedule), Exact(schedule, blind=True)
    found = flow_map(exact, exact, batch(), schedule, torch.Generator().manual_seed(1))
    assert float(found["consistency"]) < 1e-10
    other = flow_map(blind, blind, batch(), schedule, torch.Generator().manual_seed(1))
    assert float(other["consistency"]) > 1e-3 and torch.equal(other["signal"], found["signal"])


def test_the_data_term_is_least_at_the_velocity_of_the_ode():
    schedule = SCHEDULES["cosine"]

    def off_by(amount: float) -> float:
        exact = Exact(schedule)
        shifted = lambda z, t, inputs: exact(z, t, inputs) + amount  # noqa: E731
        return float(flow_map(shifted, exact, batch(40_000), schedule, torch.Generator().manual_seed(1))["signal"])

    assert off_by(0) < min(off_by(0.05), off_by(-0.05))


def test_first_the_data_term_alone_then_two_more_passes_for_half_of_the_rows():
    schedule, student, target = SCHEDULES["flow"], Exact(SCHEDULES["flow"]), Exact(SCHEDULES["flow"])
    early = flow_map(student, target, batch(100, 0.1), schedule, torch.Generator().manual_seed(0))
    assert early.keys() == {"signal"} and (student.rows, target.rows) == (100, 0)
    late = flow_map(student, target, batch(100), schedule, torch.Generator().manual_seed(0))
    assert late.keys() == {"signal", "consistency"} and (student.rows, target.rows) == (200, 100)
    sizes = [len(flow_map(student, target, batch(1), schedule, torch.Generator().manual_seed(i))) for i in range(9)]
    assert set(sizes) == {1}  # of one image either row, now this and now that


def test_weight_multiplies_the_rows_that_jump():
    schedule, blind = SCHEDULES["cosine"], Exact(SCHEDULES["cosine"], blind=True)
    one, ten = (
        flow_map(blind, blind, batch(50), schedule, torch.Generator().manual_seed(0), weight=weight, weight_end=weight)
        for weight in (1.0, 10.0)
    )
    torch.testing.assert_close(ten["consistency"], 10 * one["consistency"])
    assert torch.equal(ten["signal"], one["signal"])


def test_shares_and_rows():
    found = jump_between(torch.tensor([4, 4, 4]), torch.tensor([4, 1, 0]), 8)
    assert found.tolist() == [[0, 0], [0.75, 0.375], [1, 0.5]]
    part = conditioning_rows(Inputs(torch.arange(6)), slice(2, 4))
    assert part.jump.tolist() == [2, 3]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("schedule", [SCHEDULES["cosine"], SCHEDULES["flow"]], ids=["cosine", "flow"])
def test_the_exact_map_samples_the_data_in_any_number_of_steps(schedule, steps):
    """Every latent is m + d eps of its own noise; without the target time a step is the denoiser's mean."""

    class Network(Student):
        def __init__(self, exact: Exact) -> None:
            torch.nn.Module.__init__(self)
            self.adapter, self.exact = None, exact

        def forward(self, z, timestep, conditioning, strength=1.0):
            jump = conditioning.jump if conditioning.jump is not None else torch.zeros(len(z), 2)
            return self.exact(z.flatten(1), timestep, Inputs(jump)).view_as(z)

    noise = torch.randn(50, 1, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    nothing = Conditioning(torch.zeros(50, 1, 1, dtype=torch.float64))
    x = sample(Network(Exact(schedule)), schedule, noise, nothing, steps, sampler="map")
    torch.testing.assert_close(x, MEAN + DEVIATION * noise, rtol=0, atol=1e-6)
    mean = sample(Network(Exact(schedule)), schedule, noise, nothing, 1, sampler="ddim")
    torch.testing.assert_close(mean, torch.full_like(mean, MEAN), rtol=0, atol=1e-6)


def test_adapters_of_before_give_the_target_time_as_a_share_of_the_way():
    old, new = (HintAdapter(network_config(tiny_unet()), target_time=new, jumps=not new) for new in (False, True))
    jump = jump_between(torch.tensor([500.0]), torch.tensor([250.0]), 1000)
    for adapter, way in ((old, 0.5), (new, 0.25)):
        torch.nn.init.normal_(adapter.jump.projection.weight)  # type: ignore[union-attr]
        by_hand = SineEmbedding.forward(adapter.jump, torch.tensor([[way]]))  # type: ignore[arg-type]
        assert torch.equal(adapter.time_condition(None, jump), by_hand)  # type: ignore[arg-type]
    assert [sampler_of(info) for info in ({}, {"jumps": True}, {"jumps": False}, {"sampler": "map"})] == [
        "ddim", "renoise", "ddim", "map",
    ]  # fmt: skip


def test_the_weight_of_the_map_falls_geometrically_and_low_noise_counts_little():
    schedule, blind = SCHEDULES["flow"], Exact(SCHEDULES["flow"], blind=True)

    def loss(progress: float, **options: float) -> float:
        given = batch(500, progress)
        found = flow_map(blind, blind, given, schedule, torch.Generator().manual_seed(0), **options)
        return float(found["consistency"])

    plain = loss(0.2, weight=1.0, weight_end=1.0)
    for progress, weight in ((0.2, 8.0), (0.6, 4.0), (1.0, 2.0)):
        assert loss(progress, weight=8.0, weight_end=2.0, warmup=0.2) == pytest.approx(weight * plain)
    straight = SCHEDULES["cosine"]
    z, t = torch.zeros(4, 1), torch.tensor([0.0, 0.1, 1.0, math.pi / 2])
    assert linear_time(straight, t, z).flatten().tolist() == pytest.approx([0.0, 0.0912, 0.6090, 1.0], abs=1e-4)
