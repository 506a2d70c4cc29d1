"""Plain conditional diffusion training: the paper's "LDM" row and the many-step reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule
from .batch import LatentBatch, Network, guided_signal, mean_square


def finetune(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    shared_t: bool = False,
    t: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the loss {"diffusion": |output - w(z_t, c, t)|^2} in the checkpoint's own prediction space (Ho et al.
    2020; Salimans & Ho 2022 for velocity), t uniform. If the batch has guidance scales, the target is the guided
    signal."""
    x = batch.x
    t = schedule.draw(len(x), schedule.least, shared_t, generator) if t is None else t
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    z = schedule.mix(x, eps, t)
    output = student(z, schedule.timestep(t).to(z.device), batch.conditioning)
    signal = guided_signal(batch, target, z, t, schedule)
    if batch.guidance is not None:  # guidance changes both predictions: eps must match the guided signal
        alpha, sigma = schedule.alpha_sigma(t, z)
        eps = (z - alpha * signal) / sigma
    return {"diffusion": mean_square(output, schedule.output(signal, eps, t))}
