"""Task upscale: a low-resolution image -> a plausible original, `scale` times larger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, nearest
from .base import CAP, Task
from .degradations import RealWorld, bicubic, resize, second_order

if TYPE_CHECKING:
    from ..data.batches import Batch

DEGRADATIONS = ("real", "bicubic")


@dataclass(frozen=True)
class Upscale(Task):
    """Task with a small image (B, 3, h, w) as input and its bicubic enlargement as condition; the output is
    (B, 3, scale h, scale w)."""

    scale: int = 4
    """Output pixels per input pixel along a side."""
    degradation: str = "real"
    """Degradation that makes the training input: "real" (blur, noise, JPEG; see degradations) or "bicubic"."""
    full_side: int = 256
    """Shorter side in pixels from which images get the full blur of "real"; smaller ones are blurred less. Set it to
    the training size where that crops files at their own resolution (a recipe's zoom)."""

    name: ClassVar[str] = "upscale"
    prompted: ClassVar[bool] = False
    obedience_unit: ClassVar[str] = "dB PSNR of the downscaled result to the input"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int) or not 1 <= self.scale <= 16:
            raise UserError(f"scale={self.scale}: not an upscaling factor: use a whole number from 1 to 16")
        if not isinstance(self.full_side, int) or self.full_side < 1:
            raise UserError(f"full_side={self.full_side}: not a side in pixels: use for example 256")
        if self.degradation not in DEGRADATIONS:
            hint = nearest(str(self.degradation), DEGRADATIONS)
            raise UserError(f"degradation={self.degradation}: unknown{hint}: use one of {', '.join(DEGRADATIONS)}")

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return degraded images (B, 3, H/scale, W/scale) of `batch.image`.

        Raises UserError unless H and W are multiples of scale.
        """
        height, width = batch.image.shape[-2:]
        if height % self.scale or width % self.scale:
            raise UserError(f"image of {width} x {height} px: sides are not multiples of the scale {self.scale}: "
                            f"train at a size that is")  # fmt: skip
        if self.degradation == "bicubic":
            return bicubic(batch.image, self.scale)
        return second_order(batch.image, self.scale, generator, RealWorld(full_side=self.full_side))

    def condition(self, given: Tensor) -> Tensor:
        """Return `given` bicubically enlarged to output size, (B, 3, scale h, scale w) in [0, 1]."""
        return F.interpolate(given, scale_factor=self.scale, mode="bicubic", align_corners=False).clamp(0, 1)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the PSNR in dB, at most 60, of `output`, reduced to the size of `given` by antialiased bicubic."""
        small = resize(output.float(), (given.shape[-2], given.shape[-1])).clamp(0, 1)
        error = (small - given.float()).square().mean(dim=(1, 2, 3))
        return {"input_psnr": (-10 * error.clamp_min(1e-12).log10()).clamp_max(CAP)}
