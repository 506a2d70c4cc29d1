"""Base class of tasks: the user's input, the condition, the target image and the scores of an output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.batches import Batch

CAP = 60.0  # dB: rounding to 8 bits alone limits PSNR to about this, so higher values mean nothing


class Task(ABC):
    """Interface of a task for training, sampling and evaluation; its options are the fields of a frozen dataclass.

    Images are (B, C, H, W) in [0, 1]. The task's input has two sources: `given` derives it from a training sample,
    `bring` from what a caller passes. Both return the same format, which `condition` turns into the adapter's input.
    """

    name: ClassVar[str]
    """Name for `get_task`."""
    condition_channels: ClassVar[int] = 3
    """C of `condition`: 3 for an image, more where maps follow it."""
    prompted: ClassVar[bool] = True
    """Flag: the task takes prompts. Without them it is also trained and evaluated without prompts."""
    prompt_column: ClassVar[str] = "text"
    """The field of a batch that holds the prompts."""
    takes_mask: ClassVar[bool] = False
    """Flag: the task takes a mask besides the image."""
    obedience_unit: ClassVar[str] = ""
    """Name and unit of the first score of `obedience`, for tables; "" where there is none."""
    scale: int = 1
    """Output pixels per input pixel along a side."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Image columns of the data, besides the image itself, that training and evaluation need."""
        return ()

    def prompts(self, batch: Batch) -> list[str]:
        """Return one prompt per sample, "" for each if the task takes none."""
        return list(getattr(batch, self.prompt_column)) if self.prompted else [""] * len(batch.image)

    def truth(self, batch: Batch) -> Tensor:
        """Return the target image, (B, 3, H, W)."""
        return batch.image

    @abstractmethod
    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the task's input, derived from training samples.

        The same generator state gives the same bytes, and a sample does not depend on the others of its batch.
        """

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convert a caller's image to the format of `given`; an output of `given` is returned unchanged.

        A grey image is repeated to three channels. Raises UserError for a mask that the task does not take or for
        another number of channels.
        """
        self._refuse_mask(mask)
        return colour(image, self.name)

    @abstractmethod
    def condition(self, given: Tensor) -> Tensor:
        """Return the adapter's input (B, condition_channels, H, W) at output size."""

    def finish(self, output: Tensor, given: Tensor) -> Tensor:
        """Return the final image for the network's `output` (B, 3, H, W)."""
        return output

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return scores (B,) by name of how well `output` (B, 3, H, W) follows the condition: higher is better, the
        first is the headline.

        NaN for a sample without anything to measure (`means` leaves it out); {} for a task that only an external
        model can score.
        """
        return {}

    def measured(self) -> Task:
        """Return the task as it is evaluated, without training augmentation."""
        return self

    def config(self) -> dict[str, Any]:
        """Return the options as JSON values: get_task(name, **config) rebuilds the task."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _column(self, batch: Batch, column: str) -> Tensor:
        if column not in batch.extras:
            raise UserError(f"{column}: task {self.name} needs this column of the data: read it, or add it to the data")
        return batch.extras[column]

    def _refuse_mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            raise UserError(f"mask: task {self.name} takes none: leave it out, or use task inpaint")


def means(figures: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of each score over the samples that are not NaN; omit a score that is NaN everywhere."""
    averages = {name: float(values.double().nanmean()) for name, values in figures.items()}
    return {name: value for name, value in averages.items() if value == value}


def colour(image: Tensor, name: str) -> Tensor:
    """Expand (B, 1 or 3, H, W) to (B, 3, H, W). Raises UserError for other channels; `name` is the task's."""
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise UserError(f"image of shape {tuple(image.shape)}: task {name} takes pictures: give (B, 3, H, W)")
    return image.expand(-1, 3, -1, -1)


def seeds(batch: Batch, generator: torch.Generator) -> list[int]:
    """Return one seed per sample. Everything random about a sample follows from its own seed, not from the batch."""
    return torch.randint(2**62, (len(batch.image),), generator=generator).tolist()


def region_psnr(output: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """Return the PSNR in dB (B,) of (B, 3, H, W) over the pixels that `region` (B, 1, H, W) marks, at most 60; NaN if
    it marks none."""
    inside = region.to(output.device).bool().expand_as(output)
    error = (output.float() - truth.to(output.device).float()).square().where(inside, 0).sum((1, 2, 3))
    error = error / inside.sum((1, 2, 3))  # 0 / 0 is NaN
    return (-10 * error.clamp_min(1e-12).log10()).clamp_max(CAP)
