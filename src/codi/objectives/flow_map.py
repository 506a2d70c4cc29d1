r"""One-stage conditional flow maps by the semigroup property: one network with a target time.

On the linear path (z = (1 - s) x + s eps; schedule.to_linear maps every other path to it) the flow of the probability
ODE from s to r <= s is X_{s->r}(z) = z - (s - r) u(z, s, r), with u(z, s, s) the instantaneous velocity. Going to a
time m between and on from there is the same as going directly (Boffi et al., 2025; SplitMeanFlow, 2025):

    rows r = s   u(z, s, s)  ->  eps - x                                       the data term: adapts to the condition
    rows r < s   u(z, s, r)  ->  [(s - m) u1 + (m - r) u2] / (s - r)           no gradient, of the average network
                 u1 = u-(z, s, m),   z_m = z - (s - m) u1,   u2 = u-(z_m, m, r)

    loss = mean w(s) |u - target|^2 over rows r = s  +  weight * the same over rows r < s,      w(s) = (1 + p) s^p

With p = 0 the error is one of u, with p = 2 one of x; p = 1 lies between: few steps look little at low noise. The
weight falls over the training: large at first, so that the map is learned soon, small in the end, so that its rows do
not spoil the accuracy of the others, which many steps show.

The network gets the target time as `jump` (Conditioning). In terms of its (x, eps) at z_t a step to r is
alpha_r x + sigma_r eps, so DDIM samples it, on any path. Both terms regress u; there is no derivative and no division
by a small step, so it suits bf16. Every image is a row r = s, as in plain fine-tuning: the data term is the adaptation.
A share of the images is also a row r < s, which costs 3 passes of the network and 2 of the average one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.guidance import jump_between
from ..models.student import cat_conditionings, conditioning_rows
from ..schedule import Schedule
from .batch import LatentBatch, Network, guided_signal, mean_square, prepared


def flow_map(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    weight: float = 10.0,
    weight_end: float = 1.0,
    power: float = 0.0,
    share: float = 0.3,
    ends: float = 0.5,
    noisiest: float = 0.3,
    warmup: float = 0.15,
) -> dict[str, Tensor]:
    """Return the losses {"signal", "consistency"} of one batch, whose conditioning has a field `jump`.

    `student` trains, `target` is its average. Every image has a row r = t; a `share` of the images has a row r < t too.
    Of these a share `ends` has r = 0 and a share `noisiest` starts from pure noise, t = T. Their weight falls from
    `weight` to `weight_end`, geometrically, after the first `warmup` of the training, which has none of them: a map is
    learned of an ODE that is there. `power`: p.
    """
    count = len(batch.x)
    uniform = torch.rand(5, 2 * count, generator=generator, dtype=torch.float64)
    extra = 0 if batch.progress < warmup else int(share * count + float(uniform[0, 0]))  # rounded at random
    x, conditioning = batch.x, batch.conditioning
    if extra:
        x = torch.cat([x, x[:extra]])
        conditioning = cat_conditionings(conditioning, conditioning_rows(conditioning, slice(extra)))
    uniform = uniform[:, : len(x)]
    data, maps = slice(count), slice(count, None)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    is_map = torch.arange(len(x)) >= count
    t = schedule.draw(len(x), schedule.least, False, generator)
    t = torch.where(is_map & (uniform[1] < noisiest), torch.full_like(t, schedule.horizon), t)
    r = torch.where(uniform[2] < ends, torch.zeros_like(t), schedule.between(torch.zeros_like(t), t, uniform[3]))
    r = torch.where(is_map, r, t)
    z = schedule.mix(x, noise, t)
    u = velocity(student, z, t, _with_target_time(conditioning, t, r, schedule, x), schedule)
    scale = ((1 + power) * linear_time(schedule, t, x) ** power).sqrt()

    goal = (noise - x)[data] + guidance_push(target, batch, z[data], t[data], schedule)
    losses = {"signal": mean_square(scale[data] * u[data], scale[data] * goal)}
    if extra:
        times = t[maps], schedule.between(r[maps], t[maps], uniform[4][maps]), r[maps]
        goal = two_steps(target, z[maps], times, conditioning_rows(conditioning, maps), schedule)
        current = weight * (weight_end / weight) ** ((batch.progress - warmup) / (1 - warmup))
        losses["consistency"] = current * mean_square(scale[maps] * u[maps], scale[maps] * goal)
    return losses


def velocity(network: Network, z: Tensor, t: Tensor, conditioning: Any, schedule: Schedule) -> Tensor:
    """Return u = eps - x, that of the linear path, of the network's prediction at (z_t, t)."""
    x, eps = schedule.signal_noise(network(z, schedule.timestep(t).to(z.device), conditioning), z, t)
    return eps - x


@torch.no_grad()
def guidance_push(target: Network, batch: LatentBatch, z: Tensor, t: Tensor, schedule: Schedule) -> Tensor | float:
    """Return the change of u at z_t by the batch's guidance: (x - guided x) / s at s of the linear path."""
    if batch.guidance is None:
        return 0.0
    signal = guided_signal(batch, target, z, t, schedule)
    return (batch.x - signal) / linear_time(schedule, t, batch.x)


@torch.no_grad()
def two_steps(
    network: Network, z: Tensor, times: tuple[Tensor, Tensor, Tensor], conditioning: Any, schedule: Schedule
) -> Tensor:
    """Return the mean velocity from t to r of the network's two steps t -> m -> r, for `times` (t, m, r)."""
    t, m, r = times
    c = prepared(network, conditioning)
    u1, z_m = step(network, z, t, m, c, schedule)
    u2, _ = step(network, z_m, m, r, c, schedule)
    s_t, s_m, s_r = (linear_time(schedule, time, z) for time in times)
    part = (s_t - s_m) / (s_t - s_r).clamp_min(1e-12)
    return part * u1 + (1 - part) * u2


def step(
    network: Network, z: Tensor, t: Tensor, r: Tensor, conditioning: Any, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Return the mean velocity from t to r and z_r = alpha_r x + sigma_r eps. With t = 0, z_r = z."""
    conditioned = _with_target_time(conditioning, t.clamp_min(schedule.least), r, schedule, z)
    x, eps = schedule.signal_noise(network(z, schedule.timestep(t).to(z.device), conditioned), z, t)
    return eps - x, schedule.mix(x, eps, r)


def _with_target_time(conditioning: Any, t: Tensor, r: Tensor, schedule: Schedule, like: Tensor) -> Any:
    """Return the conditioning for steps from t to r, on the device of `like`."""
    return replace(conditioning, jump=jump_between(t, r, schedule.horizon).clamp(0, 1).to(like.device))


def linear_time(schedule: Schedule, t: Tensor, like: Tensor) -> Tensor:
    """Return s = sigma / (alpha + sigma), the time of the linear path, shaped to broadcast against `like`."""
    alpha, sigma = schedule.alpha_sigma(t, like)
    return sigma / (alpha + sigma)
