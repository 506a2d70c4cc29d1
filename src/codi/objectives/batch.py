"""What every objective is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# (z_t, timestep, conditioning) -> network output. A Student, or any function of that form.
Network = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass
class LatentBatch:
    """`x` clean latents (B, C, h, w); `conditioning` what the networks may look at (opaque to objectives);
    `image` the pictures behind `x`, (B, 3, H, W) in [0, 1], for distances that look at pixels."""

    x: Tensor
    conditioning: Any
    image: Tensor | None = None


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Squared L2 distance per element, in at least float32."""
    return (a.float() - b.float() if a.dtype.itemsize < 4 else a - b).square().mean()
