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
    conditioning names guidance scales that the student shall learn."""

    x: Tensor
    conditioning: Any
    image: Tensor | None = None
    guidance: Guidance | None = None


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
    timestep = schedule.timestep(t).to(z.device)
    signals = [schedule.signal_noise(network(z, timestep, c), z, t)[0] for c in batch.guidance.ladder]
    target = batch.x
    for k, (with_, without) in enumerate(zip(signals, signals[1:], strict=False)):
        scale = batch.guidance.scales[:, k].to(z).reshape(-1, *[1] * (z.ndim - 1))
        target = target + (scale - 1) * (with_ - without)
    return target


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared L2 distance per element, in at least float32."""
    return (a.float() - b.float() if a.dtype.itemsize < 4 else a - b).square().mean()
