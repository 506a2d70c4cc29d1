"""Task inpaint: an image, a mask and a prompt -> the image with the masked part generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .base import Task, colour, region_psnr, seeds
from .blending import membrane
from .masks import KINDS, draw_masks

if TYPE_CHECKING:
    from ..data.batches import Batch


@dataclass(frozen=True)
class Inpaint(Task):
    """Task with (B, 4, H, W) as input: the image, then the mask, 1 = generate. The condition hides the masked part."""

    masks: tuple[str, ...] = ("boxes", "strokes", "outpaint")
    """Kinds of masks that training draws from; "objects" needs the data column `mask` (instance ids)."""

    name: ClassVar[str] = "inpaint"
    condition_channels: ClassVar[int] = 4
    takes_mask: ClassVar[bool] = True
    obedience_unit: ClassVar[str] = "dB PSNR to the true picture within the hole"

    def __post_init__(self) -> None:
        kinds = self.masks.split(",") if isinstance(self.masks, str) else self.masks
        object.__setattr__(self, "masks", tuple(kinds))  # lists come from JSON and YAML
        if not self.masks:
            raise UserError(f"masks: none: use some of {', '.join(KINDS)}")
        for kind in self.masks:
            if kind not in KINDS:
                raise UserError(
                    f"masks={kind}: unknown kind{nearest(str(kind), KINDS)}: use some of {', '.join(KINDS)}"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """Column of instance ids, if masks are objects."""
        return ("mask",) if "objects" in self.masks else ()

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the image and a random mask, (B, 4, H, W)."""
        height, width = batch.image.shape[-2:]
        ids = self._column(batch, "mask") if "objects" in self.masks else None
        mask = draw_masks(self.masks, height, width, seeds(batch, generator), ids)
        return torch.cat([batch.image, mask.to(batch.image)], 1)

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Join an image (B, 1 or 3, H, W) and a mask (B or 1, 1, H, W) to (B, 4, H, W); `image` may already hold both.

        The mask is thresholded at 0.5. Raises UserError for a mask that is missing, of another size or of several
        channels.
        """
        if mask is None:
            if image.ndim == 4 and image.shape[1] == 4:
                return torch.cat([image[:, :3], (image[:, 3:] > 0.5).to(image)], 1)
            raise UserError("mask: missing: task inpaint needs one, white where the picture is to be repainted")
        picture = colour(image, self.name)
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, len(picture)):
            raise UserError(f"mask of shape {tuple(mask.shape)}: not a mask for {len(picture)} pictures: "
                            "give (B, 1, H, W)")  # fmt: skip
        if mask.shape[-2:] != picture.shape[-2:]:
            sizes = [f"{t.shape[-1]} x {t.shape[-2]}" for t in (mask, picture)]
            raise UserError(f"mask of {sizes[0]} px: the picture has {sizes[1]}: give a mask of the same size")
        return torch.cat([picture, (mask > 0.5).to(picture).expand(len(picture), -1, -1, -1)], 1)

    def condition(self, given: Tensor) -> Tensor:
        """Return the image, grey (0.5) under the mask, then the mask: (B, 4, H, W)."""
        picture, mask = given[:, :3], given[:, 3:]
        return torch.cat([torch.where(mask > 0.5, 0.5, picture), mask], 1)

    def finish(self, output: Tensor, given: Tensor) -> Tensor:
        """Return the known pixels unchanged and `output` in the hole, its colors shifted smoothly to hide the seam."""
        hole, picture = given[:, 3:].to(output) > 0.5, given[:, :3].to(output)
        seam = membrane(picture - output, (~hole).to(output))
        return torch.where(hole, (output + seam).clamp(0, 1), picture)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the PSNR in dB, at most 60, to the true image in the hole and to the input outside it; NaN if there
        are no such pixels. After `finish` the second is 60: it measures the raw output of the network. Another fill may
        be as good as the true one: only an external judge can score that."""
        hole = given[:, 3:] > 0.5
        return {
            "hole_psnr": region_psnr(output, batch.image, hole),
            "known_psnr": region_psnr(output, given[:, :3], ~hole),
        }
