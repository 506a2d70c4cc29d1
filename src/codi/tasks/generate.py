"""Generation: a prompt alone. The adapter without a condition makes any text-to-image model a few-step one."""

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
    """Nothing is given but a size: an image without channels, (B, 0, H, W). What was asked for only a judge can see."""

    name: ClassVar[str] = "generate"

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """(B, 0, H, W)."""
        return batch.image[:, :0]

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """`image` (B, 0, H, W), which only says the size. Raises UserError for a picture or a mask."""
        self._refuse(mask)
        if image.ndim != 4 or image.shape[1]:
            raise UserError(f"image of shape {tuple(image.shape)}: task generate takes no picture: leave it out, "
                            "or use task edit")  # fmt: skip
        return image

    def condition(self, given: Tensor) -> Tensor:
        """Zeros (B, 3, H, W)."""
        return given.new_zeros(given.shape[0], self.condition_channels, *given.shape[-2:])
