"""Decoding and cropping of training pictures: strict where bytes are damaged, the same crop for all columns."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .formats import image_formats

NUMBERS = ("conditioning_image", "mask")  # columns whose 16 bits are distances or ids; elsewhere they are brightness
ZOOM = (1.0, 2.0)  # of random crops: times their size that the shorter side of the whole picture has; see draw_square
MAX_PIXELS = 89_000_000  # a header that promises more is taken for a decompression bomb; Pillow warns above this


def load_picture(data: bytes, least: int | None = None) -> Image.Image:
    """Decodes a picture file strictly: truncated data and decompression bombs raise; EXIF rotation is applied.

    The mode is kept. `least`: the shorter side in pixels that the caller needs; a larger JPEG is then decoded at
    1/2, 1/4 or 1/8 of its size, several times faster.
    """
    picture = Image.open(BytesIO(data), formats=image_formats())
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels is more than {MAX_PIXELS:,}")
    if least is not None and picture.format == "JPEG":
        picture.draft(None, (least, least))
    picture.load()
    return ImageOps.exif_transpose(picture)


def load_column(data: bytes, column: str) -> Image.Image:
    """Decode the file of a picture column: a picture, as load_picture, or for numbers an array that numpy.save wrote,
    one number a pixel, (H, W), (1, H, W) or (H, W, 1). Numbers that are not finite become 0, which is "none"."""
    if column not in NUMBERS or not data.startswith(b"\x93NUMPY"):
        return load_picture(data)
    grid = np.load(BytesIO(data), allow_pickle=False)
    shape, kind = grid.shape, grid.dtype
    grid = grid.squeeze(tuple(axis for axis in (0, 2) if shape[axis] == 1)[:1]) if len(shape) == 3 else grid
    if grid.ndim != 2 or not 0 < grid.size <= MAX_PIXELS or kind.kind not in "buif":
        raise ValueError(f"an array of {kind} of shape {shape}: it needs one number a pixel, (H, W)")
    if kind.kind == "b" or kind == np.uint8:
        return Image.fromarray(grid * np.uint8(255) if kind.kind == "b" else grid)
    if kind.kind == "f":
        return Image.fromarray(np.nan_to_num(grid.astype(np.float32), nan=0, posinf=0, neginf=0))
    if grid.min() < 0 or grid.max() > 65535:
        return Image.fromarray(grid.astype(np.float32))
    return Image.fromarray(grid.astype(np.uint16))


def why_unreadable(error: Exception) -> str:
    """One line for a report: what Pillow or the operating system said."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a known format, or cut off within its header"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def is_deep(picture: Image.Image) -> bool:
    """Whether it holds numbers of more than 8 bits."""
    return picture.mode.startswith(("I", "F"))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; 16-bit and floating-point pictures are scaled down. Raises ValueError for floating-point
    pixels beyond [0, 1]."""
    if is_deep(picture):  # Pillow's own conversion clips at 255
        grid, most = np.asarray(picture), 1 if picture.mode == "F" else 65535
        if picture.mode == "F" and not (np.isfinite(grid).all() and grid.min() >= -1e-3 and grid.max() <= 1 + 1e-3):
            raise ValueError("floating-point pixels beyond 0..1")
        return Image.fromarray((grid.clip(0, most) * (255 / most)).round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


@dataclass(frozen=True)
class Square:
    """A square crop, as fractions of the picture's width and height (`side_*` too, so that a column of another
    resolution is cut alike)."""

    left: float
    top: float
    side_x: float
    side_y: float

    def box(self, picture: Image.Image) -> tuple[float, float, float, float]:
        width, height = picture.size
        left, top = self.left * width, self.top * height
        return left, top, min(left + self.side_x * width, width), min(top + self.side_y * height, height)


def draw_square(
    width: int, height: int, size: int, rng: np.random.Generator | None, zoom: tuple[float, float] = ZOOM
) -> Square:
    """A random square such that the shorter side is scaled to between zoom[0] and zoom[1] times `size`, but not
    enlarged; without `rng` the centred one of the least zoom."""
    shorter = min(width, height)
    least, most = (min(z * size, shorter) for z in zoom)
    scale, across, down = (0.0, 0.5, 0.5) if rng is None else rng.random(3)
    side = shorter * size / max(size, least + scale * (most - least))
    left, top = across * (width - side), down * (height - side)
    if side == size and rng is not None:  # at its own pixels: on whole ones, for nothing is resampled then
        left, top = round(left), round(top)
    return Square(left / width, top / height, side / width, side / height)


def cut(picture: Image.Image, square: Square, size: int, column: str | None = None) -> Tensor:
    """Cuts and resizes to a float32 (C, size, size): Lanczos for pictures; ids and distances are never averaged."""
    box = square.box(picture)
    if column == "mask" or (column in NUMBERS and is_deep(picture)):
        numbers = is_deep(picture) or picture.mode == "P"  # a palette's indices are ids, its colours are not
        scale = 1.0 if numbers else 1 / 255
        grid = np.asarray(picture if numbers else picture.convert("L"))
        step = (np.arange(size) + 0.5) / size
        rows = (box[1] + step * (box[3] - box[1])).astype(int).clip(0, grid.shape[0] - 1)
        cols = (box[0] + step * (box[2] - box[0])).astype(int).clip(0, grid.shape[1] - 1)
        return torch.from_numpy(grid[rows[:, None], cols].astype(np.float32) * np.float32(scale))[None]
    resized = to_rgb(picture).resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
