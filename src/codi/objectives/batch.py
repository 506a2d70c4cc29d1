"""The training batch that every objective takes, and helpers that objectives share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule

# (z_t, timestep, conditioning) -> network output. A Student, or any function of that form.
Network = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass
class Guidance:
    """Inputs for guidance distillation: `scales` (B, k), and `ladder`, k + 1 conditionings from full to none, each with
    one condition less than the one before. For one scale: with the prompt, without; for two: prompt and picture,
    picture, neither."""

    scales: Tensor
    ladder: Sequence[Any]


@dataclass
class LatentBatch:
    """A training batch: `x` clean latents (B, C, h, w); `conditioning` the networks' further input (opaque to
    objectives); `image` the pictures encoded in `x`, (B, 3, H, W) in [0, 1], for distances between pixels; `guidance`
    if the conditioning has guidance scales that the student learns; `progress` the completed fraction of the training,
    for settings that change during it."""

    x: Tensor
    conditioning: Any
    image: Tensor | None = None
    guidance: Guidance | None = None
    progress: float = 0.0


def prepared(network: Network, conditioning: Any) -> Any:
    """Return the conditioning with everything that `network` can compute once for several calls."""
    prepare = getattr(network, "prepare", None)
    return prepare(conditioning) if prepare else conditioning


def falling_step(dt: float, dt_end: float | None, progress: float) -> float:
    """Return the step from t to s of a consistency loss: `dt` at the start of the training, `dt_end` (None: `dt`) at
    its end, geometric in between. Long steps carry the boundary condition to high noise in few updates; short ones
    follow the ODE closely. An int if `dt` is."""
    step = dt * ((dt if dt_end is None else dt_end) / dt) ** progress
    return max(1, round(step)) if isinstance(dt, int) else step


@torch.no_grad()
def guided_signal(batch: LatentBatch, network: Network, z: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the regression target (B, C, h, w) for a guided signal prediction at (z_t, t):

        x + sum_k (g_k - 1) (x(z_t, c_k) - x(z_t, c_k+1)),        c_0 full ... c_n nothing

    whose mean is that of classifier-free guidance with scales g (Ho & Salimans 2022; the two scales of InstructPix2Pix,
    Brooks et al. 2023), while each target still contains its data sample x (model guidance, Tang et al. 2025). The
    predictions x(z_t, c) are those of `network`. Without guidance, or for g = 1, the target is x.
    """
    if batch.guidance is None:
        return batch.x
    signals = _ladder_signals(batch.guidance, network, z, t, schedule)
    return batch.x + _guidance_term(batch.guidance, signals)


@torch.no_grad()
def guided_prediction(
    batch: LatentBatch, network: Network, z: Tensor, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Return (x, eps) predicted by `network` at (z_t, t), with classifier-free guidance if the batch has scales:

    x = x(z_t, c_0) + sum_k (g_k - 1) (x(z_t, c_k) - x(z_t, c_k+1)),        c_0 full ... c_n nothing
    """
    timestep = schedule.timestep(t).to(z.device)
    if batch.guidance is None:
        return schedule.signal_noise(network(z, timestep, batch.conditioning), z, t)
    signals = _ladder_signals(batch.guidance, network, z, t, schedule)
    x = signals[0] + _guidance_term(batch.guidance, signals)
    alpha, sigma = schedule.alpha_sigma(t, z)
    return x, (z - alpha * x) / sigma


def _ladder_signals(guidance: Guidance, network: Network, z: Tensor, t: Tensor, schedule: Schedule) -> list[Tensor]:
    """Return the signal that `network` predicts with each conditioning of the ladder."""
    timestep = schedule.timestep(t).to(z.device)
    return [schedule.signal_noise(network(z, timestep, c), z, t)[0] for c in guidance.ladder]


def _guidance_term(guidance: Guidance, signals: list[Tensor]) -> Tensor:
    """Return sum_k (g_k - 1) (x_k - x_k+1)."""
    shape = (-1, *[1] * (signals[0].ndim - 1))
    scales = (guidance.scales.to(signals[0]) - 1).T
    pairs = zip(scales, signals, signals[1:], strict=False)
    return torch.stack([scale.reshape(shape) * (with_ - without) for scale, with_, without in pairs]).sum(0)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared L2 distance per element, in at least float32."""
    return (a.float() - b.float() if a.dtype.itemsize < 4 else a - b).square().mean()


def mean_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return the pseudo-Huber distance per element, sqrt((a - b)^2 + c^2) - c."""
    return ((a.float() - b.float()).square() + c**2).sqrt().mean() - c
