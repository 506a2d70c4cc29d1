r"""Conditional diffusion distillation (CoDi, CVPR 2024, arXiv 2310.01407), one training step.

    t ~ (dt, T],  s = t - dt,  z_t = alpha_t x + sigma_t eps
    x_t, e_t = prediction of w_theta(z_t, c, t)                       online network
    z_s      = alpha_s x_t + sigma_s e_t                              one DDIM step of the adapted model itself
    e_s      = noise prediction of w_theta-(z_s, c, s)                average network, no gradient
    loss     = d_eps(e_t, e_s) + d_x(x, x_t)

Every argument's default is the paper's choice, except that its boundary scaling is off, because x = alpha z - sigma v
meets the boundary condition already and the scaling halves a pretrained network's signal prediction at high noise.
The paper also allows t = dt; then s = 0, where z_s has no noise for e_s to predict. So noise predictions are compared
only for s at or above the lowest noise level; signal predictions also at s = 0, where x(z_0, 0) = z_0.

The code that the authors released differs: s = t - dt on a grid of dt, z_s by the frozen backbone without the
condition, and d(x_t, x_s) in place of d_eps. That is `on_grid`, ode "teacher" and consistency "signal".

If the batch has guidance scales, x in the data term is the guided signal (see batch.guided_signal), and the network,
which has the scales as an input, learns to predict the guided result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..schedule import Schedule
from .batch import LatentBatch, Network, guided_signal, mean_square
from .distances import SignalDistance, latent


def codi(
    student: Network,
    target: Network,
    batch: LatentBatch,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    *,
    dt: float = 1,
    shared_t: bool = True,
    on_grid: bool = False,
    consistency: str = "noise",
    ode: str = "own",
    teacher: Network | None = None,
    d_x: SignalDistance = latent,
    boundary: bool = False,
    consistency_weight: float = 1.0,
    signal_weight: float = 1.0,
    signal_weighting: str = "signal",
    t: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the losses {"consistency", "signal"} of one batch; a weight of 0 leaves its term out.

    `student` trains, `target` is its average. `dt` in schedule time (levels of T for a checkpoint). `shared_t`: one
    time for the whole batch. `on_grid`: times are multiples of `dt`, which divides the horizon. `consistency`: compare
    "noise" or "signal" predictions. `ode`: the model that computes z_s, the adapted one ("own") or a frozen `teacher`
    ("teacher": the paper's "distilling PF-ODE" ablation). `d_x`: see distances. `signal_weighting`: "signal" compares
    x, which weighs time t by sigma_t^2 relative to a velocity network's own loss, so that the last steps of a sampler
    are hardly trained; "velocity" divides both sides by sigma_t. `t`: fixed times instead of drawn ones. Raises
    ValueError for an unknown `consistency`, `signal_weighting` or `ode`, or a missing teacher.
    """
    _require_known(consistency, signal_weighting, ode, teacher)
    x, c = batch.x, batch.conditioning
    if t is None:
        least = schedule.least if on_grid else dt + (schedule.least if consistency == "noise" else 0)
        t = schedule.draw(len(x), least, shared_t, generator)
        t = ((t / dt).ceil().to(t.dtype) * dt).clamp_max(schedule.horizon) if on_grid else t
    s = t - dt
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    z_t = schedule.mix(x, eps, t)

    def predict(network: Network, z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        prediction = schedule.signal_noise(network(z, schedule.timestep(time).to(z.device), c), z, time)
        return schedule.boundary_scaling(prediction[0], z, time) if boundary else prediction

    x_t, e_t = predict(student, z_t, t)
    losses: dict[str, Tensor] = {}
    if consistency_weight:
        with torch.no_grad():
            path = (x_t, e_t) if ode == "own" else predict(teacher, z_t, t)  # type: ignore[arg-type]
            x_s, e_s = predict(target, schedule.mix(*path, s), s)
        a, b = (e_t, e_s) if consistency == "noise" else (x_t, x_s)
        losses["consistency"] = consistency_weight * mean_square(a, b)
    if signal_weight:
        goal = replace(batch, x=guided_signal(batch, target, z_t, t, schedule))
        if signal_weighting == "velocity":
            sigma = schedule.alpha_sigma(t, x_t)[1]
            x_t, goal = x_t / sigma, replace(goal, x=goal.x / sigma)
        losses["signal"] = signal_weight * d_x(x_t, goal)
    return losses


def _require_known(consistency: str, signal_weighting: str, ode: str, teacher: Network | None) -> None:
    if consistency not in ("noise", "signal"):
        raise ValueError(f"consistency {consistency!r}: use 'noise' or 'signal'")
    if signal_weighting not in ("signal", "velocity"):
        raise ValueError(f"signal_weighting {signal_weighting!r}: use 'signal' or 'velocity'")
    if ode not in ("own", "teacher") or (ode == "teacher" and teacher is None):
        raise ValueError(f"ode {ode!r}: use 'own', or 'teacher' together with a teacher network")
