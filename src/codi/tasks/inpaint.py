"""Inpainting: a picture, a mask of what to make new and a prompt -> the picture with that part made anew."""

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
    """Given is (B, 4, H, W): the picture, then the mask, 1 = make new. The condition hides what lies under the mask."""

    masks: tuple[str, ...] = ("boxes", "strokes", "outpaint")
    """The kinds that training draws from; "objects" wants the data column `mask` (instance ids)."""

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
        """Instance ids, where masks are objects."""
        return ("mask",) if "objects" in self.masks else ()

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The picture and a random mask, (B, 4, H, W)."""
        height, width = batch.image.shape[-2:]
        ids = self._column(batch, "mask") if "objects" in self.masks else None
        mask = draw_masks(self.masks, height, width, seeds(batch, generator), ids)
        return torch.cat([batch.image, mask.to(batch.image)], 1)

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Picture (B, 1 or 3, H, W) and mask (B or 1, 1, H, W), cut at 0.5; or both in one, (B, 4, H, W).

        Raises UserError for a mask that is missing, of another size or of several channels.
        """
        if mask is None:
            if image.ndim == 4 and image.shape[1] == 4:
                return torch.cat([image[:, :3], (image[:, 3:] > 0.5).to(image)], 1)
            raise UserError("mask: missing: task inpaint needs one, white where the picture is to be made new")
        picture = colour(image, self.name)
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, len(picture)):
            raise UserError(f"mask of shape {tuple(mask.shape)}: not a mask for {len(picture)} pictures: "
                            "give (B, 1, H, W)")  # fmt: skip
        if mask.shape[-2:] != picture.shape[-2:]:
            sizes = [f"{t.shape[-1]} x {t.shape[-2]}" for t in (mask, picture)]
            raise UserError(f"mask of {sizes[0]} px: the picture has {sizes[1]}: give a mask of the same size")
        return torch.cat([picture, (mask > 0.5).to(picture).expand(len(picture), -1, -1, -1)], 1)

    def condition(self, given: Tensor) -> Tensor:
        """The picture, grey (0.5) where it is to be made new, then the mask: (B, 4, H, W)."""
        picture, mask = given[:, :3], given[:, 3:]
        return torch.cat([torch.where(mask > 0.5, 0.5, picture), mask], 1)

    def finish(self, output: Tensor, given: Tensor) -> Tensor:
        """Known pixels exactly as given; between them `output`, shifted smoothly in colour so that the two meet."""
        hole, picture = given[:, 3:].to(output) > 0.5, given[:, :3].to(output)
        seam = membrane(picture - output, (~hole).to(output))
        return torch.where(hole, (output + seam).clamp(0, 1), picture)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """PSNR in dB, at most 60, to the true picture within the hole and to the known pixels; NaN where there is no
        hole, or nothing else. The second is 60 after `finish`: it tells of the network's own output alone. Another
        filling may be as good as the true one: whether it is what was asked for only a judge can see."""
        hole = given[:, 3:] > 0.5
        return {
            "hole_psnr": region_psnr(output, batch.image, hole),
            "known_psnr": region_psnr(output, given[:, :3], ~hole),
        }
