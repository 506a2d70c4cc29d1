"""What every objective is given."""

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
    """What distilled guidance is made of: `scales` (B, k), and k + 1 conditionings from full to none, each with less
    than the one before. One scale: with and without the prompt; two: prompt and picture, picture, neither."""

    scales: Tensor
    ladder: Sequence[Any]


@dataclass
class LatentBatch:
    """`x` clean latents (B, C, h, w); `conditioning` what the networks may look at (opaque to objectives);
    `image` the pictures behind `x`, (B, 3, H, W) in [0, 1], for distances that look at pixels; `guidance` where the
    conditioning names guidance scales that the student shall learn; `progress` the share of the training that is over,
    for what changes on the way."""

    x: Tensor
    conditioning: Any
    image: Tensor | None = None
    guidance: Guidance | None = None
    progress: float = 0.0


def prepared(network: Network, conditioning: Any) -> Any:
    """What `network` can compute of the conditioning once, where it is asked several times."""
    prepare = getattr(network, "prepare", None)
    return prepare(conditioning) if prepare else conditioning


def falling_step(dt: float, dt_end: float | None, progress: float) -> float:
    """A consistency's step from t to s: `dt` at the start of the training, `dt_end` (None: `dt`) at its end, geometric
    in between. Long steps carry the boundary's answer to high noise in few updates, short ones follow the ODE closely.
    Whole where `dt` is an int."""
    step = dt * ((dt if dt_end is None else dt_end) / dt) ** progress
    return max(1, round(step)) if isinstance(dt, int) else step


@torch.no_grad()
def guided_signal(batch: LatentBatch, network: Network, z: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The signal that a guided prediction at (z_t, t) is trained towards, (B, C, h, w):

        x + sum_k (g_k - 1) (x(z_t, c_k) - x(z_t, c_k+1)),        c_0 full ... c_n nothing

    whose mean is that of classifier-free guidance with scales g (Ho & Salimans 2022; the two scales of InstructPix2Pix,
    Brooks et al. 2023), while each sample keeps the data in it (model guidance, Tang et al. 2025). `network`'s own
    predictions serve. Without guidance, or where g = 1, it is x.
    """
    if batch.guidance is None:
        return batch.x
    signals = _ladder(batch.guidance, network, z, t, schedule)
    return batch.x + _push(batch.guidance, signals)


@torch.no_grad()
def guided_prediction(
    batch: LatentBatch, network: Network, z: Tensor, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """(x, eps) of `network` at (z_t, t), by classifier-free guidance where the batch asks for it:

    x = x(z_t, c_0) + sum_k (g_k - 1) (x(z_t, c_k) - x(z_t, c_k+1)),        c_0 full ... c_n nothing
    """
    timestep = schedule.timestep(t).to(z.device)
    if batch.guidance is None:
        return schedule.signal_noise(network(z, timestep, batch.conditioning), z, t)
    signals = _ladder(batch.guidance, network, z, t, schedule)
    x = signals[0] + _push(batch.guidance, signals)
    alpha, sigma = schedule.alpha_sigma(t, z)
    return x, (z - alpha * x) / sigma


def _ladder(guidance: Guidance, network: Network, z: Tensor, t: Tensor, schedule: Schedule) -> list[Tensor]:
    timestep = schedule.timestep(t).to(z.device)
    return [schedule.signal_noise(network(z, timestep, c), z, t)[0] for c in guidance.ladder]


def _push(guidance: Guidance, signals: list[Tensor]) -> Tensor:
    """sum_k (g_k - 1) (x_k - x_k+1)."""
    shape = (-1, *[1] * (signals[0].ndim - 1))
    scales = (guidance.scales.to(signals[0]) - 1).T
    pairs = zip(scales, signals, signals[1:], strict=False)
    return torch.stack([scale.reshape(shape) * (with_ - without) for scale, with_, without in pairs]).sum(0)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared L2 distance per element, in at least float32."""
    return (a.float() - b.float() if a.dtype.itemsize < 4 else a - b).square().mean()


def mean_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance per element, sqrt((a - b)^2 + c^2) - c."""
    return ((a.float() - b.float()).square() + c**2).sqrt().mean() - c
