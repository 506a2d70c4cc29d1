"""Edges: an edge map and a prompt -> a picture with these edges."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .base import Task, colour, seeds

if TYPE_CHECKING:
    from ..data.batches import Batch


@dataclass(frozen=True)
class Canny(Task):
    """Given is an edge map (B, 1, H, W) of 0 and 1; the condition repeats it to three channels."""

    low: float = 100.0
    """Gradient, in 8-bit levels, above which a pixel continues an edge."""
    high: float = 200.0
    """Gradient above which a pixel begins one."""

    jitter: float = 0.0
    """How far training strays from the thresholds, so that users may: both of a sample are multiplied by one factor
    from 1 / (1 + jitter) to 1 + jitter. Obedience knows `low` and `high` alone: measure without."""

    name: ClassVar[str] = "canny"
    obedience_unit: ClassVar[str] = "F1 of the result's edges to the given ones, 1 px tolerance"

    def __post_init__(self) -> None:
        for option, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 255:
                raise UserError(f"{option}={value}: not an edge threshold: use a number from 0 to 255")
        if self.low > self.high:
            raise UserError(f"low={self.low:g}: above high={self.high:g}: give the smaller threshold as low")
        if not self.jitter >= 0:
            raise UserError(f"jitter={self.jitter}: below 0: use 0 for none, 1 for up to twice the thresholds")

    def measured(self) -> Canny:
        """With the plain thresholds."""
        return replace(self, jitter=0.0)

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The edges of the picture, (B, 1, H, W)."""
        if not self.jitter:
            return edges(batch.image, self.low, self.high)
        span = math.log1p(self.jitter)
        factors = [math.exp(np.random.default_rng(seed).uniform(-span, span)) for seed in seeds(batch, generator)]
        pictures = zip(batch.image.split(1), factors, strict=True)
        return torch.cat([edges(one, self.low * factor, self.high * factor) for one, factor in pictures])

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Three channels are a picture, whose edges are found; one channel is an edge map, cut at 0.5."""
        self._refuse(mask)
        if image.ndim == 4 and image.shape[1] == 1:
            drawn = (image > 0.5).float()
            if drawn.numel() and drawn.mean() > 0.5:
                warnings.warn("the edge map is mostly white, and white marks edges: invert black lines on white",
                              stacklevel=2)  # fmt: skip
            return drawn
        return edges(colour(image, self.name), self.low, self.high)

    def condition(self, given: Tensor) -> Tensor:
        """(B, 3, H, W) of 0 and 1."""
        return given.expand(-1, 3, -1, -1)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """F1 in [0, 1] of the edges of `output`, found at the same thresholds; an edge pixel counts as found where the
        other map has one among its eight neighbours or at the same place."""
        return {"edge_f1": edge_f1(edges(output, self.low, self.high), given)}


def edges(image: Tensor, low: float, high: float) -> Tensor:
    """Canny (1986) of the grey picture: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) of 0 and 1, thresholds in 8-bit levels
    of the gradient (L1 norm of 3 x 3 Sobel, as OpenCV has it)."""
    levels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    found = [cv2.Canny(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY), low, high) for rgb in levels]
    return torch.from_numpy(np.stack(found))[:, None].float().div(255).to(image.device)


def widen(marks: Tensor) -> Tensor:
    """Marks (B, 1, H, W) of 0 and 1, grown by one pixel to all eight sides."""
    return F.max_pool2d(marks.float(), 3, stride=1, padding=1)


def edge_f1(found: Tensor, wanted: Tensor) -> Tensor:
    """F1 (B,) of two edge maps (B, 1, H, W) at 1 px tolerance; 1 where both are empty, 0 where one is."""
    found, wanted = found.float(), wanted.to(found.device).float()

    def share(marks: Tensor, others: Tensor) -> Tensor:
        return (marks * widen(others)).sum((1, 2, 3)) / marks.sum((1, 2, 3)).clamp_min(1)

    precision, recall = share(found, wanted), share(wanted, found)
    score = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    return torch.where((found.sum((1, 2, 3)) + wanted.sum((1, 2, 3))) == 0, 1.0, score)
