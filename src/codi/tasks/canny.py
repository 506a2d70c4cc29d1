"""Task canny: an edge map and a prompt -> an image with these edges."""

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
    """Task with an edge map (B, 1, H, W) of 0 and 1 as input; the condition repeats it to three channels."""

    low: float = 100.0
    """Gradient, in 8-bit levels, above which a pixel continues an edge."""
    high: float = 200.0
    """Gradient, in 8-bit levels, above which a pixel starts an edge."""

    jitter: float = 0.0
    """Random change of the thresholds in training, so that maps made with other thresholds work too: both thresholds of
    a sample are multiplied by one factor from 1 / (1 + jitter) to 1 + jitter. `obedience` uses `low` and `high` alone,
    so evaluate with jitter 0."""

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
        """Return the task without jitter of the thresholds."""
        return replace(self, jitter=0.0)

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the edges of the image, (B, 1, H, W)."""
        if not self.jitter:
            return edges(batch.image, self.low, self.high)
        span = math.log1p(self.jitter)
        factors = [math.exp(np.random.default_rng(seed).uniform(-span, span)) for seed in seeds(batch, generator)]
        pairs = zip(batch.image.split(1), factors, strict=True)
        return torch.cat([edges(picture, self.low * factor, self.high * factor) for picture, factor in pairs])

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the edges of an image (three channels), or an edge map (one channel) thresholded at 0.5."""
        self._refuse_mask(mask)
        if image.ndim == 4 and image.shape[1] == 1:
            edge_map = (image > 0.5).float()
            if edge_map.numel() and edge_map.mean() > 0.5:
                warnings.warn("the edge map is mostly white, and white marks edges: invert black lines on white",
                              stacklevel=2)  # fmt: skip
            return edge_map
        return edges(colour(image, self.name), self.low, self.high)

    def condition(self, given: Tensor) -> Tensor:
        """Return the edge map in three channels, (B, 3, H, W) of 0 and 1."""
        return given.expand(-1, 3, -1, -1)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the F1 score in [0, 1] of the edges of `output`, detected at the same thresholds. An edge pixel
        matches if the other map has one at the same place or among its eight neighbours."""
        return {"edge_f1": edge_f1(edges(output, self.low, self.high), given)}


def edges(image: Tensor, low: float, high: float) -> Tensor:
    """Detect edges by Canny (1986) in the grey image: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) of 0 and 1. Thresholds are
    in 8-bit levels of the gradient (L1 norm of 3 x 3 Sobel, as in OpenCV)."""
    levels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    maps = [cv2.Canny(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY), low, high) for rgb in levels]
    return torch.from_numpy(np.stack(maps))[:, None].float().div(255).to(image.device)


def dilate(edge_pixels: Tensor) -> Tensor:
    """Dilate a map (B, 1, H, W) of 0 and 1 by one pixel in all eight directions."""
    return F.max_pool2d(edge_pixels.float(), 3, stride=1, padding=1)


def edge_f1(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the F1 score (B,) of two edge maps (B, 1, H, W) at 1 px tolerance; 1 if both are empty, 0 if one is."""
    predicted, target = predicted.float(), target.to(predicted.device).float()

    def matched_share(edge_pixels: Tensor, reference: Tensor) -> Tensor:
        return (edge_pixels * dilate(reference)).sum((1, 2, 3)) / edge_pixels.sum((1, 2, 3)).clamp_min(1)

    precision, recall = matched_share(predicted, target), matched_share(target, predicted)
    score = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    return torch.where((predicted.sum((1, 2, 3)) + target.sum((1, 2, 3))) == 0, 1.0, score)
