"""The semigroup objective where the flow map is known in closed form: data N(m, d^2)."""

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
    """The conditioning of the networks here."""

    jump: Tensor


class Exact:
    """The exact flow map: (z - alpha m) / sqrt(alpha^2 d^2 + sigma^2) is constant along the flow.

    With `blind` it returns the instantaneous prediction for any target time.
    """

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
            jump = (b * end - e * z) / torch.where(r[:, None] == t[:, None], 1.0, b * c - e * a)  # of z and the end
            x = torch.where(r[:, None] == t[:, None], x, jump)
        return self.schedule.output(x, (z - a * x) / b.clamp_min(1e-12), t)


def batch(count: int = 4000, progress: float = 0.5) -> LatentBatch:
    generator = torch.Generator().manual_seed(0)
    x = MEAN + DEVIATION * torch.randn(count, 1, dtype=torch.float64, generator=generator)
    return LatentBatch(x, Inputs(torch.zeros(count, dtype=torch.float64)), progress=progress)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_flow_map_is_a_fixed_point_and_the_denoiser_alone_is_not(schedule):
    exact, blind = Exact(schedule), Exact(schedule, blind=True)
    exact_losses = flow_map(exact, exact, batch(), schedule, torch.Generator().manual_seed(1))
    assert float(exact_losses["consistency"]) < 1e-10
    blind_losses = flow_map(blind, blind, batch(), schedule, torch.Generator().manual_seed(1))
    assert float(blind_losses["consistency"]) > 1e-3 and torch.equal(blind_losses["signal"], exact_losses["signal"])


def test_the_data_term_is_minimal_at_the_velocity_of_the_ode():
    schedule = SCHEDULES["cosine"]

    def loss_at_offset(amount: float) -> float:
        exact = Exact(schedule)
        shifted = lambda z, t, inputs: exact(z, t, inputs) + amount  # noqa: E731
        return float(flow_map(shifted, exact, batch(40_000), schedule, torch.Generator().manual_seed(1))["signal"])

    assert loss_at_offset(0) < min(loss_at_offset(0.05), loss_at_offset(-0.05))


def test_after_warm_up_a_share_of_the_images_gets_a_second_row():
    schedule, student, target = SCHEDULES["flow"], Exact(SCHEDULES["flow"]), Exact(SCHEDULES["flow"])
    early = flow_map(student, target, batch(100, 0.1), schedule, torch.Generator().manual_seed(0))
    assert early.keys() == {"signal"} and (student.rows, target.rows) == (100, 0)
    late = flow_map(student, target, batch(100), schedule, torch.Generator().manual_seed(0), share=0.5)
    assert late.keys() == {"signal", "consistency"} and (student.rows, target.rows) == (250, 100)
    sizes = [len(flow_map(student, target, batch(1), schedule, torch.Generator().manual_seed(i))) for i in range(9)]
    assert set(sizes) == {1, 2}  # with a single image the second row is drawn at random


def test_the_weight_multiplies_the_consistency_term():
    schedule, blind = SCHEDULES["cosine"], Exact(SCHEDULES["cosine"], blind=True)
    plain, weighted = (
        flow_map(blind, blind, batch(50), schedule, torch.Generator().manual_seed(0), weight=weight, weight_end=weight)
        for weight in (1.0, 10.0)
    )
    torch.testing.assert_close(weighted["consistency"], 10 * plain["consistency"])
    assert torch.equal(weighted["signal"], plain["signal"])


def test_jumps_are_fractions_and_rows_can_be_selected():
    jumps = jump_between(torch.tensor([4, 4, 4]), torch.tensor([4, 1, 0]), 8)
    assert jumps.tolist() == [[0, 0], [0.75, 0.375], [1, 0.5]]
    rows = conditioning_rows(Inputs(torch.arange(6)), slice(2, 4))
    assert rows.jump.tolist() == [2, 3]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("schedule", [SCHEDULES["cosine"], SCHEDULES["flow"]], ids=["cosine", "flow"])
def test_the_exact_map_samples_the_data_in_any_number_of_steps(schedule, steps):
    """Every sample is m + d eps of its noise; without the target time a step gives the denoiser's mean."""

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


def test_older_adapters_take_the_target_time_as_a_fraction_of_the_way():
    old, new = (HintAdapter(network_config(tiny_unet()), target_time=new, jumps=not new) for new in (False, True))
    jump = jump_between(torch.tensor([500.0]), torch.tensor([250.0]), 1000)
    for adapter, way in ((old, 0.5), (new, 0.25)):
        torch.nn.init.normal_(adapter.jump.projection.weight)  # type: ignore[union-attr]
        by_hand = SineEmbedding.forward(adapter.jump, torch.tensor([[way]]))  # type: ignore[arg-type]
        assert torch.equal(adapter.time_condition(None, jump), by_hand)  # type: ignore[arg-type]
    assert [sampler_of(info) for info in ({}, {"jumps": True}, {"jumps": False}, {"sampler": "map"})] == [
        "ddim", "renoise", "ddim", "map",
    ]  # fmt: skip


def test_the_weight_of_the_consistency_term_falls_geometrically():
    schedule, blind = SCHEDULES["flow"], Exact(SCHEDULES["flow"], blind=True)

    def loss(progress: float, **options: float) -> float:
        data = batch(500, progress)
        losses = flow_map(blind, blind, data, schedule, torch.Generator().manual_seed(0), **options)
        return float(losses["consistency"])

    plain = loss(0.2, weight=1.0, weight_end=1.0)
    for progress, weight in ((0.2, 8.0), (0.6, 4.0), (1.0, 2.0)):
        assert loss(progress, weight=8.0, weight_end=2.0, warmup=0.2) == pytest.approx(weight * plain)
    straight = SCHEDULES["cosine"]
    z, t = torch.zeros(4, 1), torch.tensor([0.0, 0.1, 1.0, math.pi / 2])
    assert linear_time(straight, t, z).flatten().tolist() == pytest.approx([0.0, 0.0912, 0.6090, 1.0], abs=1e-4)
