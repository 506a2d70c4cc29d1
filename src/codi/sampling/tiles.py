"""Choice of the tiles for upscaling, aligned to whole latent cells; `tiling` cuts and blends them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .sampler import initial_noise
from .tiling import covered_size, cut, starts, upscaled_bands

# Tiles of a small backbone's training size hold too little context: 256 px crops of two photographs, enlarged x4 by a
# backbone of 16 px, gained 0.2 and 1.4 dB of PSNR with tiles of 64 px instead (two steps, seed 0).
MIN_SIDE = 64
STRIP = 16  # rows of noise that are drawn together
OVERLAP = 4  # a tile overlaps its neighbours by side / OVERLAP


def alignment(downscale: int, scale: int) -> int:
    """Return the period, in input pixels, at which an image enlarged `scale` times aligns with latent cells of
    `downscale` output pixels."""
    return downscale // math.gcd(downscale, scale)


@dataclass(frozen=True)
class Tiles:
    """Tiles of at most `side` input pixels a side, enlarged `scale` times. A latent cell has `downscale` output pixels
    along a side, a token of the network `patch` cells."""

    side: int
    scale: int
    downscale: int
    patch: int = 1

    @classmethod
    def choose(
        cls, side: int | None, image: Tensor, scale: int, downscale: int, trained_size: int, patch: int = 1
    ) -> Tiles | None:
        """Return the tiles for an input image; None if it is not tiled.

        `side` 0 never tiles; None tiles images of more than 1.5 times the backbone's `trained_size`, in output pixels,
        in tiles of that size (at least MIN_SIDE input pixels). Raises UserError for a side not aligned to tokens.
        """
        align = alignment(downscale * patch, scale)
        if side is None:
            side = max(2, max(trained_size // scale, MIN_SIDE) // align) * align
            return cls(side, scale, downscale, patch) if max(image.shape[-2:]) > 1.5 * side else None
        if side and (side % align or side < 2 * align):
            raise UserError(
                f"tile {side}: not a multiple of {align} from {2 * align} up: use {max(2, side // align) * align}"
            )
        return cls(side, scale, downscale, patch) if side else None

    @property
    def align(self) -> int:
        """Input pixels that the corners of tiles are multiples of."""
        return alignment(self.downscale * self.patch, self.scale)

    @property
    def overlap(self) -> int:
        """Overlap of neighbouring tiles, in input pixels."""
        return max(self.align, self.side // OVERLAP // self.align * self.align)

    def shape(self, image: Tensor) -> tuple[int, int]:
        """Return the (height, width) of tiles for an image; a side shorter than a tile is only rounded to `align`."""
        height, width = (min(self.side, math.ceil(side / self.align) * self.align) for side in image.shape[-2:])
        return height, width

    def batches(self, image: Tensor, batch: int) -> int:
        """Return the number of batches, of at most `batch` tiles of one row, that cover one image."""
        shape = self.shape(image)
        covered = covered_size(image.shape[-2], image.shape[-1], shape, self.align)
        rows, columns = (len(starts(*pair, self.overlap, self.align)) for pair in zip(covered, shape, strict=True))
        return rows * math.ceil(columns / batch)

    def bands(
        self,
        make: Callable[[Tensor, Tensor, list[str]], Tensor],
        image: Tensor,
        prompt: str,
        seed: int,
        channels: int,
        batch: int,
        fields: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the enlargement of an image (1, C, h, w) from the top, in bands (1, 3, rows, scale w).

        `make(noise, tiles, prompts)` enlarges at most `batch` tiles at a time; noise has `fields` times `channels`
        channels.
        """
        shape = self.shape(image)
        width = covered_size(image.shape[-2], image.shape[-1], shape, self.align)[1]
        ratio = self.scale / self.downscale

        def run(low: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            # One noise field for the whole image, so that neighbouring tiles agree where they overlap.
            first = corners[0][0]
            field = noise_rows(
                (channels, round(width * ratio)), seed, round(first * ratio), round(shape[0] * ratio), fields
            )
            noise = cut(field, [(y - first, x) for y, x in corners], shape, ratio)
            return make(noise, low, [prompt] * len(low))

        return upscaled_bands(run, image, self.scale, shape, self.overlap, batch, self.align)

    def enlarged(self, enlarge: Callable[[Tensor], Tensor], image: Tensor, first: int, end: int) -> Tensor:
        """Return rows `first` to `end` of `enlarge(image)`, (1, 3, end - first, scale w), without computing the others.

        A row of `enlarge(image)` may depend on two more input rows above and below, not on any further away.
        """
        above, below = max(0, first // self.scale - 2), -(-end // self.scale) + 2
        return enlarge(image[:, :, above:below])[:, :, first - above * self.scale : end - above * self.scale]


def noise_rows(shape: tuple[int, int], seed: int, first: int, count: int, fields: int = 1) -> Tensor:
    """Return `count` rows from row `first` of an unbounded field of N(0, I): (1, fields C, count, w), `shape` (C, w).

    Any rows can be drawn without those above them.
    """
    channels, width = shape
    strips = range(first // STRIP, -(-(first + count) // STRIP))
    keys = [np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1 for number in strips]
    noise = torch.cat([initial_noise((channels, STRIP, width), [key], fields) for key in keys], dim=2)
    return noise[:, :, first - strips[0] * STRIP :][:, :, :count]
