"""What a task is: the image a user brings, the condition made of it, the result wanted, and how it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.batches import Batch

CAP = 60.0  # dB; the rounding of an 8-bit picture alone costs this much, so beyond it nothing is measured


class Task(ABC):
    """What training, sampling and evaluation ask of a task; its options are the fields of a frozen dataclass.

    Images are (B, C, H, W) in [0, 1]. A task answers for two people: `given` makes from a training sample what a user
    would bring, `bring` takes what a user really brought; both return the same thing, which `condition` turns into the
    adapter's input.
    """

    name: ClassVar[str]
    """As get_task knows it."""
    condition_channels: ClassVar[int] = 3
    """C of `condition`: 3 are a picture, more are maps after it."""
    prompted: ClassVar[bool] = True
    """Whether users say what to make: a task without prompts is trained and measured without them."""
    prompt_column: ClassVar[str] = "text"
    """The field of a batch that holds the prompts."""
    takes_mask: ClassVar[bool] = False
    """Whether users bring a mask too."""
    obedience_unit: ClassVar[str] = ""
    """What the first figure of `obedience` is and its unit, for tables; "" where there is none."""
    scale: int = 1
    """Output pixels per given pixel along a side."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The picture columns of the data, beside the picture itself, that training and measuring need."""
        return ()

    def prompts(self, batch: Batch) -> list[str]:
        """One prompt a sample; "" each where users give none."""
        return list(getattr(batch, self.prompt_column)) if self.prompted else [""] * len(batch.image)

    def truth(self, batch: Batch) -> Tensor:
        """What the result should be, (B, 3, H, W)."""
        return batch.image

    @abstractmethod
    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """What a user would bring, made from a training sample. The same generator state gives the same bytes, and a
        sample does not depend on its neighbours."""

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """What a caller passes, as `given` would have it; what `given` returned comes back as it is.

        Raises UserError for a mask where none is taken or for channels that are no picture (grey is repeated).
        """
        self._refuse(mask)
        return colour(image, self.name)

    @abstractmethod
    def condition(self, given: Tensor) -> Tensor:
        """The adapter's input (B, condition_channels, H, W) at output size."""

    def finish(self, output: Tensor, given: Tensor) -> Tensor:
        """What reaches the user of the network's `output` (B, 3, H, W)."""
        return output

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """How well `output` (B, 3, H, W) does as asked: named figures (B,), higher is better, the first the headline.

        NaN for a sample in which there is nothing to measure (`means` leaves it out); {} for a task that only an
        outside judge can measure.
        """
        return {}

    def measured(self) -> Task:
        """The task without what augments its training: what figures are taken with."""
        return self

    def config(self) -> dict[str, Any]:
        """The options, JSON-able: get_task(name, **config) rebuilds the task."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _column(self, batch: Batch, column: str) -> Tensor:
        if column not in batch.extras:
            raise UserError(f"{column}: task {self.name} needs this column of the data: read it, or add it to the data")
        return batch.extras[column]

    def _refuse(self, mask: Tensor | None) -> None:
        if mask is not None:
            raise UserError(f"mask: task {self.name} takes none: leave it out, or use task inpaint")


def means(figures: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each figure over the samples that have it; a figure that no sample has is left out."""
    averages = {name: float(values.double().nanmean()) for name, values in figures.items()}
    return {name: value for name, value in averages.items() if value == value}


def colour(image: Tensor, name: str) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W). Raises UserError for other channels; `name` is the task's."""
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise UserError(f"image of shape {tuple(image.shape)}: task {name} takes pictures: give (B, 3, H, W)")
    return image.expand(-1, 3, -1, -1)


def seeds(batch: Batch, generator: torch.Generator) -> list[int]:
    """A seed for each sample, from which everything drawn for it follows: so samples do not depend on one another."""
    return torch.randint(2**62, (len(batch.image),), generator=generator).tolist()


def region_psnr(output: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """PSNR in dB (B,) of (B, 3, H, W) within the pixels that `region` (B, 1, H, W) marks, at most 60; NaN for none."""
    inside = region.to(output.device).bool().expand_as(output)
    error = (output.float() - truth.to(output.device).float()).square().where(inside, 0).sum((1, 2, 3))
    error = error / inside.sum((1, 2, 3))  # 0 / 0 is NaN
    return (-10 * error.clamp_min(1e-12).log10()).clamp_max(CAP)
