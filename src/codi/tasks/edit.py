"""Editing: a picture and an instruction -> the picture after it (the data form of InstructPix2Pix)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Task, region_psnr

if TYPE_CHECKING:
    from ..data.batches import Batch

SAME = 0.02  # two pixels that differ by less in every channel are the same: five 8-bit levels, for what JPEG does


@dataclass(frozen=True)
class Edit(Task):
    """Given is the picture before, (B, 3, H, W), which is the condition as it stands."""

    name: ClassVar[str] = "edit"
    prompt_column: ClassVar[str] = "instruction"
    obedience_unit: ClassVar[str] = "dB PSNR to the exact edited picture inside the change"

    @property
    def columns(self) -> tuple[str, ...]:
        """The picture after the edit."""
        return ("edited_image",)

    def truth(self, batch: Batch) -> Tensor:
        """The picture after the edit, (B, 3, H, W)."""
        return self._column(batch, "edited_image")

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The picture before the edit, (B, 3, H, W)."""
        return batch.image

    def condition(self, given: Tensor) -> Tensor:
        """`given`, (B, 3, H, W)."""
        return given

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """PSNR in dB to the edited picture where the edit changes it and where it does not, each at most 60; NaN for a
        sample that has no such pixels (a change of everything, an edit that changes nothing)."""
        truth = self.truth(batch)
        changed = ((truth - batch.image).abs() > SAME).any(1, keepdim=True)
        return {
            "psnr_inside": region_psnr(output, truth, changed),
            "psnr_outside": region_psnr(output, truth, ~changed),
        }
