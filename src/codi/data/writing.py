"""Writing of images: atomically, in 8 or 16 bits, with metadata."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ..errors import UserError, nearest
from ..files import unwritable, write_file

WRITABLE = (".png", ".jpg", ".jpeg", ".webp")
_DESCRIPTION = 0x010E  # EXIF tag ImageDescription


def write_png(
    path: str | os.PathLike[str],
    rgb: Tensor,
    alpha: Tensor | None = None,
    metadata: dict[str, str] | None = None,
    bits: int = 8,
    grey: bool = False,
    overwrite: bool = False,
    exif: bytes | None = None,
    icc: bytes | None = None,
) -> None:
    """Write `rgb` (3, H, W) in [0, 1] (clamped) and `alpha` (1, H, W) as a PNG of 8 or 16 bits per channel.

    `metadata` is stored in text chunks (tEXt, or iTXt for text beyond Latin-1), `exif` and `icc` (see images.Picture)
    in an eXIf and an iCCP chunk. `grey` writes only the luma, if there is no alpha. The file is written atomically;
    missing folders are created. Raises UserError if the target exists (without `overwrite`) or cannot be written, if
    the disk is full, or if the image is not finite.
    """
    path = Path(path)
    check_writable(path, overwrite, extensions=(".png",))
    pixels = _quantized(path, rgb, alpha, bits, grey)
    ok, png = cv2.imencode(".png", pixels)
    if not ok:
        raise UserError(f"{path}: OpenCV cannot encode {tuple(pixels.shape)} as PNG: write a smaller picture")
    header = 8 + 25  # signature, IHDR
    # OpenCV writes 16 bits but no text, Pillow text but not 16-bit RGB.
    data = png.tobytes()
    write_whole(path, [data[:header], _metadata_chunks(metadata, exif, icc), data[header:]])


def write_png_bands(
    path: str | os.PathLike[str],
    bands: Iterable[tuple[Tensor, Tensor | None]],
    height: int,
    width: int,
    metadata: dict[str, str] | None = None,
    bits: int = 8,
    grey: bool = False,
    overwrite: bool = False,
    exif: bytes | None = None,
    icc: bytes | None = None,
) -> None:
    """Write a PNG like write_png, from bands of rows from top to bottom: `rgb` (1, 3, rows, width) and `alpha`
    (1, rows, width), with alpha in all bands or in none. Only one band is held in memory. If the iterator raises, no
    file is written."""
    path = Path(path)
    check_writable(path, overwrite, extensions=(".png",))

    def parts() -> Iterator[bytes]:
        compressor, above = zlib.compressobj(4), None
        for rgb, alpha in bands:
            pixels = _quantized(path, rgb, alpha, bits, grey)
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            count = pixels.shape[2]
            if above is None:
                kind = {1: 0, 3: 2, 4: 6}[count]  # grey, RGB, RGBA
                yield b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, kind, 0, 0, 0))
                yield _metadata_chunks(metadata, exif, icc)
                above = np.zeros((1, width * count * bits // 8), np.uint8)
            order = [2, 1, 0, 3][:count] if count > 1 else [0]  # from OpenCV's channel order
            rows = np.ascontiguousarray(pixels[..., order], dtype=">u2" if bits == 16 else "u1")
            rows = rows.view(np.uint8).reshape(len(rows), -1)
            filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
            filtered[:, 0] = 2  # PNG filter "up": each byte minus the one above it
            np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
            above = rows[-1:].copy()
            yield _chunk(b"IDAT", compressor.compress(filtered.tobytes()))
        yield _chunk(b"IDAT", compressor.flush()) + _chunk(b"IEND", b"")

    write_whole(path, parts())


def write_image(
    path: str | os.PathLike[str],
    rgb: Tensor,
    alpha: Tensor | None = None,
    metadata: dict[str, str] | None = None,
    bits: int = 8,
    grey: bool = False,
    overwrite: bool = False,
    quality: int = 95,
    exif: bytes | None = None,
    icc: bytes | None = None,
) -> None:
    """Write an image like write_png, in the format of the extension: .png, .jpg, .jpeg or .webp.

    JPEG and WebP have 8 bits (`bits` is ignored) and store `metadata` as JSON in EXIF ImageDescription; JPEG has no
    alpha: the image is composited on white. Raises UserError as write_png does, and for an unknown extension.
    """
    path = Path(path)
    check_writable(path, overwrite)
    if path.suffix.lower() == ".png":
        return write_png(path, rgb, alpha, metadata, bits, grey, overwrite, exif, icc)
    jpeg = path.suffix.lower() != ".webp"
    if jpeg and alpha is not None:
        rgb, alpha = rgb * alpha + (1 - alpha), None
    pixels = _quantized(path, rgb, alpha, 8, grey)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    tags = Image.Exif()
    if exif:
        tags.load(exif)
    if metadata:
        tags[_DESCRIPTION] = json.dumps(metadata)
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, "JPEG" if jpeg else "WEBP", quality=quality, exif=tags, icc_profile=icc)
    except (OSError, ValueError) as error:  # sides above 65,535 (JPEG) or 16,383 px (WebP)
        raise UserError(f"{path}: {' '.join(str(error).split())}: write it as .png") from error
    write_whole(path, [buffer.getvalue()])


def check_writable(
    path: str | os.PathLike[str], overwrite: bool = False, extensions: tuple[str, ...] = WRITABLE
) -> None:
    """Raise UserError for a target that cannot be written, before anything is computed. Changes no files."""
    path = Path(path)
    if path.suffix.lower() not in extensions:
        hint = nearest(path.suffix.lower(), extensions)
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without extension'}{hint}: "
                        f"use {', '.join(extensions)}")  # fmt: skip
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder: name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists already: choose another name, or pass --overwrite")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
    except OSError as error:  # name too long, or no permission to enter a folder
        raise unwritable(path, error) from error
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file, not a folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: folder {folder} may not be written: change its permissions or choose another place")


def _quantized(path: Path, rgb: Tensor, alpha: Tensor | None, bits: int, grey: bool) -> np.ndarray:
    """Return (H, W), (H, W, 3) or (H, W, 4) in OpenCV's channel order, as uint8 or uint16."""
    if bits not in (8, 16):
        raise UserError(f"bits={bits}: an image has 8 or 16 bits per channel: choose one of them")
    rgb = rgb.detach().float().cpu()
    rgb = rgb[0] if rgb.ndim == 4 and rgb.shape[0] == 1 else rgb
    if rgb.ndim != 3 or rgb.shape[0] != 3:
        raise ValueError(f"rgb must be (3, H, W), not {tuple(rgb.shape)}")
    if not torch.isfinite(rgb).all():
        raise UserError(f"{path}: the picture holds NaN or infinite values: check the model's weights and dtype")
    if grey and alpha is None:
        planes = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)  # Rec. 601 luma
    elif alpha is None:
        planes = rgb.flip(0)
    else:
        planes = torch.cat([rgb.flip(0), alpha.detach().float().cpu().view_as(rgb[:1])])
    # In place, since at 4096 x 4096 px each copy takes 200 MB.
    scaled = planes.clamp_(0, 1).mul_(2**bits - 1).add_(0.5).numpy()
    levels = scaled.astype(np.uint8 if bits == 8 else np.uint16)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))


def _metadata_chunks(metadata: dict[str, str] | None, exif: bytes | None, icc: bytes | None) -> bytes:
    """Return the PNG chunks of the metadata, the EXIF data and the ICC profile."""
    chunks = _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)) if icc else b""  # must precede PLTE and IDAT
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    chunks += b"".join(_chunk(chunk[0], chunk[1]) for chunk in text.chunks)
    return chunks + (_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) if exif else b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the concatenated `parts` to `path`, atomically; see files.write_file."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.writelines(parts)

    write_file(path, fill)
