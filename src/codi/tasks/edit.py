"""Task edit: an image and an instruction -> the edited image (the data format of InstructPix2Pix)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Task, region_psnr

if TYPE_CHECKING:
    from ..data.batches import Batch

SAME = 0.02  # pixels that differ by less in every channel count as equal: five 8-bit levels, an allowance for JPEG


@dataclass(frozen=True)
class Edit(Task):
    """Task with the unedited image (B, 3, H, W) as input, which is also the condition."""

    name: ClassVar[str] = "edit"
    prompt_column: ClassVar[str] = "instruction"
    obedience_unit: ClassVar[str] = "dB PSNR to the exact edited picture inside the change"

    @property
    def columns(self) -> tuple[str, ...]:
        """Column of the edited image."""
        return ("edited_image",)

    def truth(self, batch: Batch) -> Tensor:
        """Return the edited image, (B, 3, H, W)."""
        return self._column(batch, "edited_image")

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the unedited image, (B, 3, H, W)."""
        return batch.image

    def condition(self, given: Tensor) -> Tensor:
        """Return `given`, (B, 3, H, W)."""
        return given

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the PSNR in dB to the edited image over the pixels that the edit changes and over those that it does
        not, each at most 60; NaN for a sample without such pixels."""
        truth = self.truth(batch)
        changed = ((truth - batch.image).abs() > SAME).any(1, keepdim=True)
        return {
            "psnr_inside": region_psnr(output, truth, changed),
            "psnr_outside": region_psnr(output, truth, ~changed),
        }
