"""Reading of image files: anything Pillow or OpenCV can decode -> float32 RGB in [0, 1]; `writing` does the reverse.

Reading turns every color model, bit depth, EXIF rotation and ICC profile into upright sRGB. `Picture` records what the
file was (grey, 16 bits, alpha), so that a result can be written in the same way, on request in the file's own ICC
profile. Every fault of a file is a `UserError` of one line.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, nearest
from .decoding import decode_picture, require_pixels, upright
from .deep import PictureFault, scale
from .formats import image_suffixes, list_images
from .writing import WRITABLE, check_writable, write_image, write_png

__all__ = [
    "PIXEL_LIMIT", "WRITABLE", "Picture", "check_file", "check_writable", "image_suffixes", "list_images", "read_image",
    "require_size", "write_image", "write_png",
]  # fmt: skip

PIXEL_LIMIT = 178_956_970  # width x height; 512 MiB of 8-bit RGB, which is Pillow's limit too


@dataclass(frozen=True)
class Picture:
    """An image as read: upright, in sRGB or in the file's own profile."""

    rgb: Tensor
    """(3, H, W) float32 in [0, 1]."""
    alpha: Tensor | None = None
    """(1, H, W) float32 in [0, 1], not premultiplied."""
    grey: bool = False
    """True if the file was greyscale; the three channels of `rgb` are then equal."""
    bits: int = 8
    """8 or 16: the smallest depth that preserves the file's values."""
    icc: bytes | None = None
    """The color profile of `rgb`; None: sRGB."""
    exif: bytes | None = None
    """EXIF metadata without the orientation (already applied) and the thumbnail."""
    path: str = ""


def read_image(path: str | os.PathLike[str], own_profile: bool = False) -> Picture:
    """Read an image; of an animated one, the first frame. Colors are converted from the embedded profile to sRGB; with
    `own_profile` they stay in it if it is close enough to sRGB for the networks (see profiles.stays).

    Raises UserError for a file that is missing, a folder, empty, no image, damaged, above PIXEL_LIMIT (checked in the
    header, before any pixel is decoded), or whose floating-point pixels are not finite or not within [0, 1].
    A broken color profile only causes a warning: the colors are then read as sRGB.
    """
    path = Path(path)
    check_file(path)
    try:
        decoded = decode_picture(path, str(path), PIXEL_LIMIT, own_profile=own_profile)
        rgb = _tensor(decoded.color, decoded.orientation)
        alpha = None if decoded.alpha is None else _tensor(decoded.alpha, decoded.orientation)
        return Picture(
            rgb=rgb.expand(3, -1, -1).contiguous(),
            alpha=alpha,
            grey=len(rgb) == 1,
            bits=decoded.bits,
            icc=decoded.icc,
            exif=decoded.exif,
            path=str(path),
        )
    except PictureFault as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory: scale it down or cut it first") from error


def _tensor(channels: Image.Image | np.ndarray, orientation: int) -> Tensor:
    """Convert 8-bit or float channels to float32 (C, H, W) in [0, 1], upright."""
    if isinstance(channels, Image.Image):
        pixels = np.atleast_3d(np.asarray(channels))
        channels = scale([pixels[..., c] for c in range(pixels.shape[2])])
    planes = channels if channels.ndim == 3 else channels[None]
    return torch.from_numpy(np.ascontiguousarray(upright(planes, orientation)))


def check_file(path: Path) -> None:
    """Raise UserError for a file that is missing, empty or not regular: reading a pipe would wait forever."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder: name an image file in it")
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: is a link to {os.readlink(path)}, which does not exist: restore it or name another file"
            )
        if not path.exists():
            raise _missing(path)
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file: name an image file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty (0 bytes): copy or download it again")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check name and permissions") from error


def _missing(path: Path) -> UserError:
    if address := re.match(r"([a-z][a-z0-9+.-]+):/+", str(path), re.IGNORECASE):
        url = f"{address[1]}://{str(path)[address.end() :]}"  # as typed: Path merges the two slashes
        return UserError(f"{url}: is a URL: download the file first, then give its path")
    if glob.has_magic(str(path)):
        return UserError(f"{path}: no file matches: check the folder and the pattern")
    hint = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    return UserError(f"{path}: no such file{hint}: check the name")


def require_size(path: Path, size: tuple[int, int]) -> None:
    """Raise UserError for (width, height) above PIXEL_LIMIT."""
    try:
        require_pixels(size, PIXEL_LIMIT)
    except PictureFault as error:
        raise UserError(f"{path}: {error}") from error
