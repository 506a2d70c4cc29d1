"""Embedded ICC colour profiles -> sRGB, for 8-bit pictures (Pillow's Little CMS) and deeper ones (a table of it)."""

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

_TABLE = 52  # grid points of the table for deep pictures: 5 8-bit levels apart, so that each lies on a whole level


def to_srgb(image: Image.Image, icc: bytes | None, path: str | Path) -> Image.Image:
    """A Pillow picture of mode L, RGB, CMYK or LAB -> sRGB (L stays L). `path` is for the warning of a broken one."""
    if image.mode == "LAB":  # tells its colours by itself
        return _apply(image, _transform(ImageCms.createProfile("LAB"), "LAB"))
    convert = _converter(icc, image.mode, path)
    if convert is not None:
        return convert(image)
    return image.convert("RGB") if image.mode == "CMYK" else image


def deep_to_srgb(colour: np.ndarray, icc: bytes | None, path: str | Path) -> np.ndarray:
    """As to_srgb, for float32 (H, W, 1 or 3) in [0, 1] of more than 8 bits.

    Pillow's transforms have 8 bits, so the colours are interpolated in a table of one. The map is smooth, thus 16-bit
    gradients keep their steps; the table itself errs by half an 8-bit level.
    """
    channels = colour.shape[-1]
    convert = _converter(icc, "L" if channels == 1 else "RGB", path)
    if convert is None:
        return colour
    table = np.asarray(convert(_lattice(_TABLE, channels)), np.float32) / 255
    if channels == 1:
        return np.interp(colour, np.linspace(0, 1, 256), table[0]).astype(np.float32)
    volume = (
        torch.from_numpy(table).view(1, _TABLE, _TABLE, _TABLE, 3).permute(0, 4, 1, 2, 3)
    )  # (1, 3, blue, green, red)
    at = torch.from_numpy(colour)[None, None] * 2 - 1  # (1, 1, H, W, 3): red, green, blue
    return F.grid_sample(volume, at, "bilinear", "border", align_corners=True)[0, :, 0].permute(1, 2, 0).numpy()


def stays(icc: bytes, mode: str) -> bool:
    """Whether a picture of `mode` may stay in the profile: it is for that mode, and its tones are spaced about as
    sRGB's (Display P3, Adobe RGB, ProPhoto), which is what networks have seen. Linear light is not."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(icc))
        if _space(source) != mode or mode not in ("L", "RGB"):
            return False
        shown = np.asarray(_apply(Image.new(mode, (1, 1), "grey"), _transform(source, mode)), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False
    return int(np.abs(shown - 128).max()) <= 25


def _space(source: Any) -> str:
    space = str(getattr(source.profile, "xcolor_space", "")).strip()
    return "L" if space == "GRAY" else space


def _converter(icc: bytes | None, mode: str, path: str | Path) -> Callable[[Image.Image], Image.Image] | None:
    """The map of pictures of `mode` (L, RGB, CMYK) with profile `icc` to sRGB.

    None where there is nothing to do: no profile, a broken one (warned of), or one that is sRGB itself.
    """
    try:
        return None if icc is None else _profile_map(icc, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{path}: embedded colour profile not usable ({reason}): colours read as sRGB", stacklevel=2)
        return None


@lru_cache(maxsize=32)  # of a thousand photos most have the same one, and trying it takes longer than decoding some
def _profile_map(icc: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    source = ImageCms.getOpenProfile(io.BytesIO(icc))
    space = _space(source)
    if space != mode and (mode, space) != ("L", "RGB"):  # grey files with an sRGB profile are common
        raise ValueError(f"it is for {space}, the picture is {mode}")
    transform = _transform(source, space)

    def convert(image: Image.Image) -> Image.Image:
        out = _apply(image if image.mode == space else image.convert(space), transform)
        return out.getchannel("G") if mode == "L" else out

    if mode != "CMYK":
        # sRGB through an sRGB profile comes out a level off here and there: such pictures stay as they are.
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
    assert out is not None  # it is, when not asked to work in place
    return out


def _lattice(steps: int, channels: int) -> Image.Image:
    """Every colour on a grid of `steps` levels, (steps^2, steps) pixels, red fastest; or every grey, (1, 256)."""
    if channels == 1:
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, steps).round().astype(np.uint8)
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")
    return Image.fromarray(np.stack([red, green, blue], -1).reshape(steps * steps, steps, 3))
