"""Images of more than 8 bits per channel, most of which Pillow would cut to 8: TIFF headers, decoding by OpenCV."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from cv2.utils import logging
from PIL import TiffImagePlugin

DAMAGE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, struct.error, zlib.error)
STRIP_LIMIT = 2**16  # strips or tiles of a TIFF: decoders take about 40 us for each of any size


class PictureFault(ValueError):
    """A fault of an image file and how to fix it, in one line without the file's name."""


@dataclass(frozen=True)
class TiffHeader:
    """Pixel format of a TIFF, from its first directory."""

    size: tuple[int, int]
    """Width and height."""
    bits: frozenset[int]
    """All occurring numbers of bits per channel."""
    channels: int
    photometric: int
    """PhotometricInterpretation: 0 grey whose 0 is white, 1 grey, 2 RGB, and others."""
    extra: int | None
    """ExtraSamples, the first channel after the colors: 0 unspecified, 1 premultiplied alpha, 2 straight alpha."""
    pages: bool
    """True if another directory follows."""

    @property
    def decodable(self) -> bool:
        """True if OpenCV decodes it correctly, for files that Pillow cannot decode."""
        supported = (0, 1) if self.channels == 1 else (2,)
        return self.channels in (1, 3, 4) and self.bits <= {16, 32, 64} and self.photometric in supported


def tiff_header(stream: BinaryIO) -> TiffHeader | None:
    """Read the header of a TIFF; return None for another or damaged file. Raises PictureFault for more than STRIP_LIMIT
    strips."""
    try:
        header = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(header.next)
        header.load(stream)
        strips = max(len(header.get(tag, ())) for tag in (273, 324))
        tiff = TiffHeader(
            (int(header[256]), int(header[257])),
            frozenset(header.get(258, (1,))),
            int(header.get(277, 1)),
            int(header.get(262, 1)),
            next(iter(header.get(338, ())), None),
            header.next != 0,
        )
    except DAMAGE:
        return None
    if strips > STRIP_LIMIT:
        raise PictureFault(f"is stored in {strips:,} strips or tiles, above the limit of {STRIP_LIMIT:,}: "
                           "save it again in larger ones")  # fmt: skip
    return tiff


def decode_deep(source: Path | bytes) -> list[np.ndarray]:
    """Decode a file or its bytes by OpenCV, which keeps 16 bits and floats; return the channels (H, W) of grey, RGB or
    RGBA in the file's type. Raises ValueError for damaged files."""
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # or OpenCV reports damage on stderr, too
    try:
        # From memory, since OpenCV's file reading does not accept every file name.
        data = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.fromfile(source, np.uint8)
        array = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(str(error)) from error
    finally:
        logging.setLogLevel(level)
    if array is None:
        raise ValueError("OpenCV finds no picture in it")
    return [array] if array.ndim == 2 else [array[..., c] for c in (2, 1, 0, 3)[: array.shape[2]]]


def scale(channels: Sequence[np.ndarray]) -> np.ndarray:
    """Scale channels (H, W) of any type to [0, 1], as float32 (C, H, W). Raises PictureFault for values that are not
    finite or exceed 16 bits, and for floats outside [0, 1]."""
    kind = channels[0].dtype
    planes = np.empty((len(channels), *channels[0].shape), np.float32)
    if kind not in (np.uint8, np.uint16):
        if kind.kind == "f" and not all(np.isfinite(channel).all() for channel in channels):
            raise PictureFault("holds NaN or infinite pixels: replace them first")
        low, high = min(channel.min() for channel in channels), max(channel.max() for channel in channels)
        if kind.kind == "f" and (low < -1e-3 or high > 1 + 1e-3):
            raise PictureFault(f"floating-point pixels from {low:.4g} to {high:.4g}: scale them to 0..1")
        if kind.kind != "f" and (low < 0 or high > 65535):  # Pillow's "I": 16 bits in 32, from PGM and some TIFF files
            raise PictureFault(f"integer pixels from {low} to {high}, beyond 16 bits: "
                               "save it with 8 or 16 bits per channel")  # fmt: skip
    full = {"u1": 255, "f2": 1, "f4": 1, "f8": 1}.get(kind.str[1:], 65535)
    for number, channel in enumerate(channels):  # one at a time, since each copy may take 700 MB
        np.divide(channel, np.float32(full), out=planes[number], dtype=np.float32, casting="unsafe")
    return planes.clip(0, 1, out=planes) if kind.kind == "f" else planes


def straighten(color: np.ndarray, alpha: np.ndarray | None, inverted: bool, premultiplied: bool) -> None:
    """Undo, in place, inverted grey (0 is white) and premultiplication with alpha."""
    if inverted:
        np.subtract(1, color, out=color)
    if premultiplied and alpha is not None:
        np.divide(color, alpha, out=color, where=alpha > 0)
        color.clip(0, 1, out=color)
