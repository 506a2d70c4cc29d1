"""Decoding and cropping of training images: damaged files are refused, and all columns get the same crop."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import decode_numbers, decode_picture, is_deep, numbers_image

NUMBERS = ("conditioning_image", "mask")  # columns whose 16-bit values are distances or ids, not brightness
ZOOM = (1.0, 2.0)  # range of (shorter side of the image) / (side of a random crop); see draw_square
MAX_PIXELS = 89_000_000  # a header with more is taken for a decompression bomb; Pillow warns above this


def load_picture(data: bytes, least: int | None = None) -> Image.Image:
    """Decode an image file, upright, to 8-bit sRGB of mode L or RGB; see decoding.decode_picture. Animations are
    refused, since it is unclear which frame is meant."""
    return decode_picture(data, "a training picture", MAX_PIXELS, least, still=True).to_image()


def load_column(data: bytes, column: str) -> Image.Image:
    """Decode the file of an image column, as load_picture does. Columns in NUMBERS keep the file's values, and the file
    may also be a numpy array (numpy.save) with one value per pixel, (H, W), (1, H, W) or (H, W, 1)."""
    if column not in NUMBERS:
        return load_picture(data)
    if not data.startswith(b"\x93NUMPY"):
        return decode_numbers(data, MAX_PIXELS, palette=column == "mask") or load_picture(data)
    grid = np.load(BytesIO(data), allow_pickle=False)
    shape, kind = grid.shape, grid.dtype
    grid = grid.squeeze(tuple(axis for axis in (0, 2) if shape[axis] == 1)[:1]) if len(shape) == 3 else grid
    if grid.ndim != 2 or not 0 < grid.size <= MAX_PIXELS or kind.kind not in "buif":
        raise ValueError(f"an array of {kind} of shape {shape}: it needs one number per pixel, (H, W)")
    if kind.kind == "b" or kind == np.uint8:
        return Image.fromarray(grid * np.uint8(255) if kind.kind == "b" else grid)
    return numbers_image(grid)


def why_unreadable(error: Exception) -> str:
    """Return the message of the decoder or the operating system as one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@dataclass(frozen=True)
class Square:
    """A square crop as fractions of the image's width and height, so that it also fits a column of another
    resolution."""

    left: float
    top: float
    side_x: float
    side_y: float

    def box(self, picture: Image.Image) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) in pixels of `picture`."""
        width, height = picture.size
        left, top = self.left * width, self.top * height
        return left, top, min(left + self.side_x * width, width), min(top + self.side_y * height, height)


def draw_square(
    width: int, height: int, size: int, rng: np.random.Generator | None, zoom: tuple[float, float] = ZOOM
) -> Square:
    """Draw a random square crop such that scaling it to `size` scales the image's shorter side to between zoom[0] and
    zoom[1] times `size`, but never enlarges it. Without `rng`, return the centered crop at the least zoom."""
    shorter = min(width, height)
    least, most = (min(z * size, shorter) for z in zoom)
    scale, across, down = (0.0, 0.5, 0.5) if rng is None else rng.random(3)
    side = shorter * size / max(size, least + scale * (most - least))
    left, top = across * (width - side), down * (height - side)
    if side == size and rng is not None:  # no scaling: align to whole pixels, so that nothing is resampled
        left, top = round(left), round(top)
    return Square(left / width, top / height, side / width, side / height)


def cut(picture: Image.Image, square: Square, size: int, column: str | None = None) -> Tensor:
    """Crop and resize to float32 (C, size, size): Lanczos for images, nearest neighbor for ids and distances."""
    box = square.box(picture)
    if column == "mask" or (column in NUMBERS and is_deep(picture)):
        numbers = is_deep(picture) or picture.mode == "P"  # of a palette, the indices are the ids
        scale = 1.0 if numbers else 1 / 255
        grid = np.asarray(picture if numbers else picture.convert("L"))
        step = (np.arange(size) + 0.5) / size
        rows = (box[1] + step * (box[3] - box[1])).astype(int).clip(0, grid.shape[0] - 1)
        cols = (box[0] + step * (box[2] - box[0])).astype(int).clip(0, grid.shape[1] - 1)
        return torch.from_numpy(grid[rows[:, None], cols].astype(np.float32) * np.float32(scale))[None]
    resized = (picture if picture.mode == "RGB" else picture.convert("RGB")).resize(
        (size, size), Image.Resampling.LANCZOS, box=box
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
