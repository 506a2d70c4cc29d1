"""Conversion of embedded ICC profiles to sRGB: 8-bit images by Little CMS (Pillow), deeper ones by a lookup table."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

_TABLE = 52  # grid points per channel of the lookup table: spaced by 5 levels of 8 bits


def to_srgb(image: Image.Image, icc: bytes | None, path: str | Path) -> Image.Image:
    """Convert a Pillow image of mode L, RGB, CMYK or LAB to sRGB (L stays L). `path` is used in warnings."""
    if image.mode == "LAB":  # needs no embedded profile
        return _apply(image, _transform(ImageCms.createProfile("LAB"), "LAB"))
    convert = _converter(icc, image.mode, path)
    if convert is not None:
        return convert(image)
    return image.convert("RGB") if image.mode == "CMYK" else image


def deep_to_srgb(color: np.ndarray, icc: bytes | None, path: str | Path) -> np.ndarray:
    """Convert float32 (H, W, 1 or 3) in [0, 1] of more than 8 bits to sRGB.

    Pillow's transforms have 8 bits, so colors are interpolated in a lookup table of the transform. Interpolation is
    smooth, so 16-bit gradients keep their steps; the table itself has an error of half an 8-bit level.
    """
    channels = color.shape[-1]
    convert = _converter(icc, "L" if channels == 1 else "RGB", path)
    if convert is None:
        return color
    table = np.asarray(convert(_lattice(_TABLE, channels)), np.float32) / 255
    if channels == 1:
        return np.interp(color, np.linspace(0, 1, 256), table[0]).astype(np.float32)
    volume = (
        torch.from_numpy(table).view(1, _TABLE, _TABLE, _TABLE, 3).permute(0, 4, 1, 2, 3)
    )  # (1, 3, blue, green, red)
    positions = torch.from_numpy(color)[None, None] * 2 - 1  # (1, 1, H, W, 3): red, green, blue
    return F.grid_sample(volume, positions, "bilinear", "border", align_corners=True)[0, :, 0].permute(1, 2, 0).numpy()


def stays(icc: bytes, mode: str) -> bool:
    """Return True if an image of `mode` can stay in the profile `icc`: it is for this mode, and its tone curve is close
    to that of sRGB, on which networks are trained (Display P3, Adobe RGB, ProPhoto, but not linear light)."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(icc))
        if _space(source) != mode or mode not in ("L", "RGB"):
            return False
        grey = np.asarray(_apply(Image.new(mode, (1, 1), "grey"), _transform(source, mode)), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False
    return int(np.abs(grey - 128).max()) <= 25


def _space(source: Any) -> str:
    space = str(getattr(source.profile, "xcolor_space", "")).strip()
    return "L" if space == "GRAY" else space


def _converter(icc: bytes | None, mode: str, path: str | Path) -> Callable[[Image.Image], Image.Image] | None:
    """Return the conversion of images of `mode` (L, RGB, CMYK) from profile `icc` to sRGB.

    None if none is needed: no profile, a broken one (with a warning), or sRGB itself.
    """
    try:
        return None if icc is None else _profile_map(icc, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{path}: embedded color profile not usable ({reason}): colors read as sRGB", stacklevel=2)
        return None


@lru_cache(maxsize=32)  # most photos share a profile, and building its transform may take longer than decoding
def _profile_map(icc: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    source = ImageCms.getOpenProfile(io.BytesIO(icc))
    space = _space(source)
    if space != mode and (mode, space) != ("L", "RGB"):  # grey files with an sRGB profile are common
        raise ValueError(f"it is for {space}, the image is {mode}")
    transform = _transform(source, space)

    def convert(image: Image.Image) -> Image.Image:
        out = _apply(image if image.mode == space else image.convert(space), transform)
        return out.getchannel("G") if mode == "L" else out

    if mode != "CMYK":
        # Converting sRGB to sRGB changes some values by a level: such images stay unchanged.
        probe = _lattice(18, 1 if mode == "L" else 3)
        if np.abs(np.asarray(convert(probe), np.int16) - np.asarray(probe, np.int16)).max() <= 2:
            return None
    return convert


def _transform(source: Any, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    out = ImageCms.applyTransform(image, transform)
    assert out is not None  # it is None only for in-place transforms
    return out


def _lattice(steps: int, channels: int) -> Image.Image:
    """Return all colors on a grid of `steps` levels, (steps^2, steps) pixels, red fastest; or all greys, (1, 256)."""
    if channels == 1:
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, steps).round().astype(np.uint8)
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")
    return Image.fromarray(np.stack([red, green, blue], -1).reshape(steps * steps, steps, 3))
