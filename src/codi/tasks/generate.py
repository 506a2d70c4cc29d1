"""Task generate: a prompt alone. The adapter, without a condition, makes a text-to-image model a few-step one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import Task

if TYPE_CHECKING:
    from ..data.batches import Batch


@dataclass(frozen=True)
class Generate(Task):
    """Task with only a size as input: an image without channels, (B, 0, H, W). Only an external judge can score it."""

    name: ClassVar[str] = "generate"

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return an image without channels, (B, 0, H, W)."""
        return batch.image[:, :0]

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `image` (B, 0, H, W), which only holds the size. Raises UserError for an image with channels or a
        mask."""
        self._refuse_mask(mask)
        if image.ndim != 4 or image.shape[1]:
            raise UserError(f"image of shape {tuple(image.shape)}: task generate takes no picture: leave it out, "
                            "or use task edit")  # fmt: skip
        return image

    def condition(self, given: Tensor) -> Tensor:
        """Return zeros (B, 3, H, W)."""
        return given.new_zeros(given.shape[0], self.condition_channels, *given.shape[-2:])
