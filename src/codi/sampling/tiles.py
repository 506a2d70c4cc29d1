"""Which tiles an upscaled picture is made of, on whole latent cells; `tiling` cuts and blends them."""

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

# Tiles of a small backbone's own size see too little: 256 px crops of two photographs, enlarged x4 by a backbone of
# 16 px, gained 0.2 and 1.4 dB of PSNR with tiles of 64 px instead (two steps, seed 0).
LEAST = 64
STRIP = 16  # rows of noise that are drawn together
OVERLAP = 4  # a tile overlaps its neighbours by side / OVERLAP


def alignment(downscale: int, scale: int) -> int:
    """Input pixels after which a picture enlarged `scale` times meets a whole latent cell of `downscale` pixels."""
    return downscale // math.gcd(downscale, scale)


@dataclass(frozen=True)
class Tiles:
    """Tiles of at most `side` input pixels a side, enlarged `scale` times into latent cells of `downscale` pixels,
    `patch` of which along a side are a token of the network."""

    side: int
    scale: int
    downscale: int
    patch: int = 1

    @classmethod
    def choose(
        cls, side: int | None, given: Tensor, scale: int, downscale: int, own: int, patch: int = 1
    ) -> Tiles | None:
        """The tiles asked for; None for none. `side` None tiles pictures of more than 1.5 times the backbone's `own`
        output size (LEAST input pixels at least). Raises UserError for a side off the tokens."""
        align = alignment(downscale * patch, scale)
        if side is None:
            side = max(2, max(own // scale, LEAST) // align) * align
            return cls(side, scale, downscale, patch) if max(given.shape[-2:]) > 1.5 * side else None
        if side and (side % align or side < 2 * align):
            raise UserError(
                f"tile {side}: not a multiple of {align} from {2 * align} up: use {max(2, side // align) * align}"
            )
        return cls(side, scale, downscale, patch) if side else None

    @property
    def align(self) -> int:
        """Tiles start at multiples of this, in input pixels."""
        return alignment(self.downscale * self.patch, self.scale)

    @property
    def overlap(self) -> int:
        """With the neighbours, in input pixels."""
        return max(self.align, self.side // OVERLAP // self.align * self.align)

    def shape(self, given: Tensor) -> tuple[int, int]:
        """Return the (height, width) of the tiles of a picture: no more than covers it, if it is thin."""
        height, width = (min(self.side, math.ceil(side / self.align) * self.align) for side in given.shape[-2:])
        return height, width

    def batches(self, given: Tensor, batch: int) -> int:
        """How many of at most `batch` tiles, of one row each, cover one picture of `given`."""
        shape = self.shape(given)
        covered = covered_size(given.shape[-2], given.shape[-1], shape, self.align)
        rows, columns = (len(starts(*pair, self.overlap, self.align)) for pair in zip(covered, shape, strict=True))
        return rows * math.ceil(columns / batch)

    def bands(
        self,
        make: Callable[[Tensor, Tensor, list[str]], Tensor],
        given: Tensor,
        prompt: str,
        seed: int,
        channels: int,
        batch: int,
        fields: int = 1,
    ) -> Iterator[Tensor]:
        """A picture (1, C, h, w) -> bands (1, 3, rows, scale w) of its enlargement, from the top, by
        `make(noise, tiles, prompts)` on at most `batch` tiles at a time; noise has `channels`, in so many `fields`."""
        shape = self.shape(given)
        width = covered_size(given.shape[-2], given.shape[-1], shape, self.align)[1]
        ratio = self.scale / self.downscale

        def run(low: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            # One noise field for the whole picture, so that neighbouring tiles agree where they overlap.
            first = corners[0][0]
            field = noise_rows(
                (channels, round(width * ratio)), seed, round(first * ratio), round(shape[0] * ratio), fields
            )
            noise = cut(field, [(y - first, x) for y, x in corners], shape, ratio)
            return make(noise, low, [prompt] * len(low))

        return upscaled_bands(run, given, self.scale, shape, self.overlap, batch, self.align)

    def enlarged(self, enlarge: Callable[[Tensor], Tensor], given: Tensor, first: int, end: int) -> Tensor:
        """Rows `first` to `end` of `enlarge(given)`, (1, 3, end - first, scale w), where no row depends on others that
        are further off than two of `given`."""
        above, below = max(0, first // self.scale - 2), -(-end // self.scale) + 2
        return enlarge(given[:, :, above:below])[:, :, first - above * self.scale : end - above * self.scale]


def noise_rows(shape: tuple[int, int], seed: int, first: int, count: int, fields: int = 1) -> Tensor:
    """(1, fields C, count, w): rows from `first` on of a field of N(0, I), `shape` (C, w), that has no end below: any
    part of it can be drawn alone."""
    channels, width = shape
    strips = range(first // STRIP, -(-(first + count) // STRIP))
    keys = [np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1 for number in strips]
    drawn = torch.cat([initial_noise((channels, STRIP, width), [key], fields) for key in keys], dim=2)
    return drawn[:, :, first - strips[0] * STRIP :][:, :, :count]
