r"""Our own: one network, one stage, two questions, so that no output must be mean and sample at once.

CoDi's one prediction is pulled two ways: where noise is high, the data term wants the conditional mean, consistency a
sample. Here the network is told which one is asked for, by the share r of the way to the clean latent (Conditioning's
`jump`; its input is zero at first, so that before training both answers are the backbone's):

    instant, r = 0    where does the ODE point now: trained by the data term alone, which is the condition adaptation
    jump,    r = 1    where does the ODE end: trained by consistency alone, along the ODE of `instant`

    t ~ (0, T],  s = max(t - step, 0),  z_t = alpha_t x + sigma_t eps
    x_i, e_i = prediction of w_theta(z_t, c, t, instant)
    z_s      = alpha_s x_i + sigma_s e_i                               one DDIM step of the adapted model itself
    loss     = |x - x_i|^2 / sigma_t^2 + |x(w_theta(z_t, c, t, jump)) - x(w_theta(z_s, c, s, jump))|^2 / sigma_t^2

with z_s and the answer there held fixed, and x(z_0, 0) = z_0 exactly, as sigma_0 = 0. The fixed point of
the second term is the end of the probability-flow ODE of `instant` (consistency models, Song et al. 2023), of the first
the denoiser: both are right. The step falls from `dt` to `dt_end` over the training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.guidance import jump_between
from ..models.student import cat_conditionings
from ..schedule import Schedule
from .batch import LatentBatch, Network, falling_step, guided_signal, mean_square, prepared


def decoupled(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    dt: float = 250,
    dt_end: float = 25,
    shared_t: bool = False,
    consistency_weight: float = 1.0,
    consistency_weighting: str = "velocity",
    signal_weight: float = 1.0,
    averaged: bool = False,
    t: Tensor | None = None,
) -> dict[str, Tensor]:
    """Named losses {"consistency", "signal"} of one batch, whose conditioning has a field `jump`.

    `student` trains; `target`, its average, serves guidance. The answer at z_s is the student's own, without gradient:
    an average network's carries the boundary's answer to high noise more slowly, but where `consistency_weight` is
    large only that is stable (`averaged`). `dt` and `dt_end` in schedule time (levels of T for a checkpoint): see
    batch.falling_step. `shared_t`: one time for the whole batch. Both terms weigh noise levels as a velocity network's
    own loss does; `consistency_weighting` "signal" weighs jumps from all of them alike. `t`: fixed times instead of
    drawn ones. Raises ValueError for an unknown `consistency_weighting`.

    Weight 5, "signal" and `averaged` make one step much better and four steps worse (see the suite's
    decoupled/one-step): one network has to share its few updates between the two questions.
    """
    if consistency_weighting not in ("signal", "velocity"):
        raise ValueError(f"consistency_weighting {consistency_weighting!r}: use 'signal' or 'velocity'")
    x, c = batch.x, prepared(student, batch.conditioning)
    t = schedule.draw(len(x), schedule.least, shared_t, generator) if t is None else t
    s = (t - falling_step(dt, dt_end, batch.progress)).clamp_min(0)
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    z_t = schedule.mix(x, eps, t)

    def predict(network: Network, z: Tensor, time: Tensor, asked: Any) -> tuple[Tensor, Tensor]:
        return schedule.signal_noise(network(z, schedule.timestep(time).to(z.device), asked), z, time)

    def aimed(time: Tensor, end: Tensor) -> Any:
        jump = jump_between(time.clamp_min(schedule.least), end, schedule.horizon).expand(len(x), 2)
        return replace(c, jump=jump.to(x.device))

    both = cat_conditionings(aimed(t, t), aimed(t, 0 * t))
    twice = torch.cat([z_t, z_t]), t.expand(len(x)).repeat(2), both
    (x_i, x_j), (e_i, _) = (both.chunk(2) for both in predict(student, *twice))
    with torch.no_grad():
        end, _ = predict(target if averaged else student, schedule.mix(x_i, e_i, s), s, aimed(s, 0 * s))
    goal = guided_signal(batch, target, z_t, t, schedule)
    sigma = schedule.alpha_sigma(t, x)[1]
    scale = sigma if consistency_weighting == "velocity" else torch.ones_like(sigma)
    return {
        "consistency": consistency_weight * mean_square(x_j / scale, end / scale),
        "signal": signal_weight * mean_square(x_i / sigma, goal / sigma),
    }
