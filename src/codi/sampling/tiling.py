"""Images of any size through a model of one size: overlapping tiles, blended without visible seams.

Tiles form a grid, so the weight of a tile is the product of a weight along y and one along x. Weights that sum to one
along each axis sum to exactly one everywhere, without an image of accumulated weights.

Diffusion starts from noise, and tiles that start from different noise disagree where they overlap. Use one noise field
for the whole image, and cut it like the tiles:

    size = covered_size(h, w, tile, align=2)                      # low-resolution pixels, a bit more than (h, w)
    field = torch.randn(1, 4, size[0] * 4 // 8, size[1] * 4 // 8, generator=generator)         # x4, latents of f = 8
    run = lambda low, corners: sample(low, noise=cut(field, corners, tile, 4 / 8))
    picture = join(upscaled_bands(run, low, tile=tile, align=2), 4 * h)     # align: corners stay on whole latent cells
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import UserError

BAND = 2**19  # most pixels of a band: later steps copy bands, and their memory should not grow with the width
Corner = tuple[int, int]
Side = int | tuple[int, int]  # size of a tile in low-resolution pixels: of a square, or (height, width)
Run = Callable[[Tensor, list[Corner]], Tensor]
"""Function of low tiles (n, C, tile, tile) and their (y, x) in low-resolution pixels; returns
(n, C', scale * tile, scale * tile)."""


@torch.no_grad()
def upscaled_bands(
    run: Run,
    low: Tensor,
    scale: int = 4,
    tile: Side = 64,
    overlap: int = 16,
    batch: int = 4,
    align: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Yield the enlargement (1, C', scale h, scale w) of `low` (1, C, h, w) from the top, in bands
    (1, C', rows, scale w) of float32 on the CPU, by `run` on at most `batch` tiles of one row at a time.

    Tiles have `tile` low-resolution pixels, overlap by at least `overlap`, and start at multiples of `align`. A side
    shorter than a tile, or that aligned tiles do not fill, is padded by mirroring, and the padding cut off again; a
    side that a single tile fills needs no overlap.
    `progress(done, total)` is called after each batch, with numbers of tiles. Memory: one row of tiles and a batch; it
    grows with the width.

    Raises UserError if the numbers do not fit each other.
    """
    _check(max(_sides(tile)), overlap, batch, align)
    height, width = low.shape[-2:]
    padded = mirror_pad(low, covered_size(height, width, tile, align))
    (rows, weights_y), (columns, weights_x) = (
        _axis(length, side, overlap, align, scale) for length, side in zip(padded.shape[-2:], _sides(tile), strict=True)
    )
    high, wide = (side * scale for side in _sides(tile))
    sums: Tensor | None = None
    for number, (y, wy) in enumerate(zip(rows, weights_y, strict=True)):
        for first in range(0, len(columns), batch):
            part = [(y, x) for x in columns[first : first + batch]]
            tiles = run(cut(padded, part, tile), part).float().cpu()
            if tiles.shape[0] != len(part) or tuple(tiles.shape[-2:]) != (high, wide):
                raise ValueError(f"run gave {tuple(tiles.shape)} for {len(part)} tiles of {tile} px at scale {scale}")
            if sums is None:
                sums = torch.zeros(1, tiles.shape[1], high, width * scale)
            for (_, x), wx, piece in zip(part, weights_x[first : first + batch], tiles, strict=True):
                window = sums[0, :, :, x * scale : x * scale + wide]  # narrower than a tile at mirrored padding
                w = window.shape[-1]
                window += piece[:, :, :w] * (wy[:, None] * wx[:w])
            if progress is not None:
                progress(number * len(columns) + first + len(part), len(rows) * len(columns))
        assert sums is not None  # there is always a tile
        below = rows[number + 1] if number + 1 < len(rows) else height
        finished = (below - y) * scale
        for band in sums[:, :, :finished].split(max(1, BAND // sums.shape[-1]), dim=2):
            yield band.clone()
        # Move the rows that the next row of tiles overlaps to the top, and clear the rest.
        sums[:, :, : high - finished] = sums[:, :, finished:].clone()
        sums[:, :, high - finished :] = 0


def join(bands: Iterator[Tensor], height: int) -> Tensor:
    """Join bands to the whole image of `height` rows, (1, C, height, W). Memory: the image and a band."""
    out, done = torch.empty(0), 0
    for band in bands:
        if not done:
            out = band.new_empty(*band.shape[:2], height, band.shape[-1])
        out[:, :, done : done + band.shape[2]] = band
        done += band.shape[2]
    return out


def _sides(tile: Side) -> tuple[int, int]:
    return (tile, tile) if isinstance(tile, int) else tile


def _axis(side: int, tile: int, overlap: int, align: int, scale: int) -> tuple[list[int], Tensor]:
    """Return where tiles start along one axis of `side` pixels, and their weights."""
    if side != tile:
        _check(tile, overlap, 1, align)
    first = starts(side, tile, overlap, align)
    return first, feather(first, tile, scale)


def covered_size(height: int, width: int, tile: Side, align: int = 1) -> tuple[int, int]:
    """Return the smallest size (height, width) that covers the image and that aligned tiles fill exactly: the size of a
    noise field for `cut`."""

    def covered(side: int, tile: int) -> int:
        return tile + max(0, math.ceil((side - tile) / align) * align)

    high, wide = _sides(tile)
    return covered(height, high), covered(width, wide)


def starts(side: int, tile: int, overlap: int, align: int = 1) -> list[int]:
    """Return the first pixels of evenly spread tiles that cover `side` (one of covered_size), from 0 to side - tile."""
    if side == tile:
        return [0]
    steps = (side - tile) // align
    gaps = math.ceil(steps / ((tile - overlap) // align))
    return [i * steps // gaps * align for i in range(gaps + 1)]


def feather(first: list[int], tile: int, scale: int) -> Tensor:
    """Return weights (n, tile * scale) of tiles that start at `first` along one axis: smooth, positive, summing to 1.

    Ramps are `sin^2`, as long as the shortest overlap, without a ramp at the image's border; where three tiles overlap,
    their weights are normalized.
    """
    overlap = min((tile - (b - a) for a, b in zip(first, first[1:], strict=False)), default=0)
    ramp = max(1, overlap * scale)
    rise = (
        (((torch.arange(tile * scale, dtype=torch.float64) + 0.5) / ramp).clamp_max(1) * (math.pi / 2)).sin().square()
    )
    windows = [torch.ones_like(rise) for _ in first]
    total = torch.zeros((first[-1] + tile) * scale, dtype=torch.float64)
    for i, (start, window) in enumerate(zip(first, windows, strict=True)):
        if i > 0:
            window *= rise
        if i < len(first) - 1:
            window *= rise.flip(0)
        total[start * scale : (start + tile) * scale] += window
    pairs = zip(first, windows, strict=True)
    return torch.stack([window / total[start * scale : (start + tile) * scale] for start, window in pairs]).float()


def cut(field: Tensor, corners: list[Corner], tile: Side, ratio: float = 1) -> Tensor:
    """Cut the parts of `field` (1, C, H, W) under tiles at `corners` (low-resolution pixels):
    (n, C, ratio * tile, ratio * tile).

    `ratio` is the field's pixels per low-resolution pixel, e.g. 0.5 for latents of f = 8 at x4. Raises UserError if a
    tile would start or end within a pixel of the field.
    """

    def scaled(pixels: int) -> int:
        position = pixels * ratio
        if position != int(position):
            raise UserError(f"tile={tile}: {pixels} px do not fall on a whole latent cell: "
                            f"use tile and align that are multiples of {round(1 / ratio)}")  # fmt: skip
        return int(position)

    high, wide = map(scaled, _sides(tile))
    return torch.cat([field[:, :, (a := scaled(y)) : a + high, (b := scaled(x)) : b + wide] for y, x in corners])


def mirror_pad(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad (..., h, w) at the bottom and right to `size` by mirroring about the last pixel, repeatedly if needed."""

    def mirrored(length: int, target: int) -> Tensor:
        index = torch.arange(target, device=image.device) % max(1, 2 * (length - 1))
        return torch.minimum(index, 2 * (length - 1) - index).clamp_min(0)

    if tuple(image.shape[-2:]) == size:
        return image
    return image[..., mirrored(image.shape[-2], size[0]), :][..., mirrored(image.shape[-1], size[1])]


def _check(tile: int, overlap: int, batch: int, align: int) -> None:
    if tile < 1 or batch < 1 or align < 1:
        raise UserError(f"tile={tile}, batch={batch}, align={align}: must be positive: use e.g. 64, 4, 1")
    if overlap < 0 or (tile - overlap) // align < 1:
        raise UserError(f"overlap={overlap}: tiles of {tile} px cannot advance by {align} px: "
                        f"use an overlap from 0 to {max(0, tile - align)}")  # fmt: skip
