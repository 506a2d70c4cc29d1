r"""Few-step objectives that were tried against `flow_map` and are no part of the library: for arena.py.

All have the form of codi.objectives, and are written for the linear path's u = eps - x (schedule.to_linear).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from codi.models.guidance import jump_between
from codi.objectives.batch import LatentBatch, Network, falling_step, mean_square
from codi.objectives.flow_map import linear_time, velocity
from codi.schedule import Schedule

Losses = dict[str, Tensor]


def central(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    h: float = 0.005,
    power: float = 0.5,
    instant: float = 0.5,
    ends: float = 0.5,
    warmup: float = 0.15,
) -> Losses:
    """MeanFlow's target without a derivative (TiM, AnyFlow): u -> v - (t - r) [u(z_t+h) - u(z_t-h)] / 2h along the
    data's own line z_t = alpha_t x + sigma_t eps, each error divided by its size to the `power`."""
    x, count = batch.x, len(batch.x)
    eps = torch.randn(x.shape, generator=generator)
    first = count if batch.progress < warmup else round(instant * count)
    rest = torch.arange(count) >= first
    t = schedule.draw(count, schedule.least, False, generator)
    r = schedule.between(torch.zeros_like(t), t, torch.rand(count, generator=generator, dtype=torch.float64))
    r = torch.where(torch.rand(count, generator=generator) < ends, torch.zeros_like(r), r)
    r = torch.where(rest, r, t)

    def at(time: Tensor) -> Tensor:
        inputs = replace(batch.conditioning, jump=jump_between(time, r.clamp(max=time), schedule.horizon))
        return velocity(student, schedule.mix(x, eps, time), time, inputs, schedule)

    u, goal = at(t), eps - x
    if first < count:
        with torch.no_grad():
            step = h * schedule.horizon
            later, earlier = (t + step).clamp(max=schedule.horizon), (t - step).clamp_min(schedule.least)
            span = linear_time(schedule, later, x) - linear_time(schedule, earlier, x)
            way = linear_time(schedule, t, x) - linear_time(schedule, r, x)
            slope = (at(later) - at(earlier)) / span.clamp_min(1e-6)
            goal = torch.where(rest.reshape(-1, *[1] * (x.ndim - 1)), goal - way * slope, goal)
    error = (u - goal).square().flatten(1).sum(1)
    scaled = error / (error.detach() + 0.01) ** power
    losses = {"signal": error[:first].mean() / x[0].numel()}
    if first < count:
        losses["consistency"] = scaled[first:].mean() / x[0].numel() ** (1 - power)
    return losses


def tuning(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    dt: float,
    dt_end: float,
) -> Losses:
    """Consistency tuning on the data (ECT, Geng et al. 2024), conditional and in one stage: z_s has the same x and eps
    as z_t, the average network answers there, and the step t - s falls over the training. |x_t - x_s|^2."""
    x, c = batch.x, batch.conditioning
    t = schedule.draw(len(x), schedule.least, False, generator)
    s = (t - falling_step(dt, dt_end, batch.progress)).clamp_min(0)
    eps = torch.randn(x.shape, generator=generator)

    def signal(network: Network, time: Tensor) -> Tensor:
        z = schedule.mix(x, eps, time)
        return schedule.signal_noise(network(z, schedule.timestep(time), c), z, time)[0]

    with torch.no_grad():
        goal = signal(target, s)
    return {"consistency": mean_square(signal(student, t), goal)}
