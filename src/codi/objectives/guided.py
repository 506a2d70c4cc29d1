r"""Guided and progressive distillation (GD; Salimans & Ho, ICLR 2022; Meng et al., CVPR 2023), one training step.

A student that takes `steps` steps learns to match in one of them two steps of its frozen teacher. From a time t on
the student's grid, t' is half a step and s a whole step later:

    z_t' = DDIM step of the teacher from z_t,   z_s = DDIM step of the teacher from z_t' x~   = (z_s - (sigma_s /
    sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)      one DDIM step with x~ leads to z_s loss = max(1,
    alpha_t^2 / sigma_t^2) |x(w_theta(z_t, c, t)) - x~|^2

Training has several phases; each takes the student of the previous one as teacher and halves the number of steps. If
the batch has guidance scales, the teacher is guided, and the student, which has the scales as an input, learns to
predict the guided result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule
from .batch import LatentBatch, Network, guided_prediction


def guided(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    teacher: Network,
    steps: int = 4,
    shared_t: bool = False,
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the loss {"distillation"} of one batch. `steps`: the number of the student's steps, half of the teacher's;
    both evenly spaced. `index`: the steps to train, from 1 (the last one in sampling) to `steps`, instead of drawn
    ones. `target` is not used."""
    x, c = batch.x, batch.conditioning
    if index is None:
        u = torch.rand(1 if shared_t else len(x), generator=generator, dtype=torch.float64)
        index = 1 + (u * steps).long().clamp_max(steps - 1)
    t, middle, s = (schedule.at((index - back) / steps) for back in (0, 0.5, 1))
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    z_t = schedule.mix(x, eps, t)
    with torch.no_grad():
        z = schedule.mix(*guided_prediction(batch, teacher, z_t, t, schedule), middle)
        z_s = schedule.mix(*guided_prediction(batch, teacher, z, middle, schedule), s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.alpha_sigma(time, x) for time in (t, s))
    goal = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
    x_t, _ = schedule.signal_noise(student(z_t, schedule.timestep(t).to(z_t.device), c), z_t, t)
    weight = (alpha_t / sigma_t).square().clamp_min(1)
    return {"distillation": (weight * (x_t - goal).square()).mean()}
