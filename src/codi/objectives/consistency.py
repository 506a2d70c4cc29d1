r"""Consistency distillation (CM, Song et al., ICML 2023), and its latent form LCM (Luo et al., 2023), one step.

    z_t = alpha_t x + sigma_t eps,  s = max(t - dt, 0)
    x_T, e_T = prediction of a frozen teacher at (z_t, c, t)           guided if the batch has guidance scales
    z_s      = alpha_s x_T + sigma_s e_T                               one DDIM step of the teacher
    loss     = d(x(w_theta(z_t, c, t)), x(w_theta-(z_s, c, s)))        average network, no gradient

The boundary condition x(z_0, 0) = z_0 holds exactly for any network, so s = 0 is allowed: there the target is the
teacher's x_T itself. In the paper's tables: CM-II distils a fine-tuned teacher; CM-I distils
text-to-image first and is fine-tuned after; LCM takes a skipping step of `dt` = 20 along the guided ("augmented") ODE
with the Huber distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule
from .batch import LatentBatch, Network, falling_step, guided_prediction, mean_huber, mean_square


def consistency(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    teacher: Network,
    dt: float = 1,
    dt_end: float | None = None,
    shared_t: bool = False,
    huber: float = 0.0,
    t: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the loss {"consistency"} of one batch. `huber`: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c (LCM:
    0.001); 0 takes squared L2. `dt`, `dt_end` in schedule time: see batch.falling_step; `t`: fixed times instead of
    drawn ones."""
    x, c = batch.x, batch.conditioning
    t = schedule.draw(len(x), schedule.least, shared_t, generator) if t is None else t
    s = (t - falling_step(dt, dt_end, batch.progress)).clamp_min(0)
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    z_t = schedule.mix(x, eps, t)
    x_t, _ = schedule.signal_noise(student(z_t, schedule.timestep(t).to(z_t.device), c), z_t, t)
    with torch.no_grad():
        z_s = schedule.mix(*guided_prediction(batch, teacher, z_t, t, schedule), s)
        x_s, _ = schedule.signal_noise(target(z_s, schedule.timestep(s).to(z_s.device), c), z_s, s)
    return {"consistency": mean_huber(x_t, x_s, huber) if huber else mean_square(x_t, x_s)}
