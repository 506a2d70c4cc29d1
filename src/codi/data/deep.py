"""Pictures of more than 8 bits a channel, most of which Pillow would cut to 8: TIFF headers, decoding by OpenCV."""

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
STRIP_LIMIT = 2**16  # strips or tiles of a TIFF: decoders take some 40 us for each, whatever its size


class PictureFault(ValueError):
    """Why a picture file will not do and how to fix it, in one line without the file's name."""


@dataclass(frozen=True)
class TiffHeader:
    """What the first directory of a TIFF says of its pixels."""

    size: tuple[int, int]
    """Width and height."""
    bits: frozenset[int]
    """Of the channels, each number that occurs."""
    channels: int
    photometric: int
    """Of what the channels are: 0 grey whose 0 is white, 1 grey, 2 RGB, and others."""
    extra: int | None
    """What the first further channel is: 0 nothing known, 1 alpha that colours are premultiplied with, 2 alpha."""
    pages: bool
    """Whether another directory follows."""

    @property
    def decodable(self) -> bool:
        """Whether OpenCV decodes it rightly, of what Pillow does not."""
        wanted = (0, 1) if self.channels == 1 else (2,)
        return self.channels in (1, 3, 4) and self.bits <= {16, 32, 64} and self.photometric in wanted


def tiff_header(stream: BinaryIO) -> TiffHeader | None:
    """Read the header of a TIFF; None for another file or a damaged one. Raises PictureFault for one of more strips
    than STRIP_LIMIT."""
    try:
        header = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(header.next)
        header.load(stream)
        strips = max(len(header.get(tag, ())) for tag in (273, 324))
        found = TiffHeader(
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
    return found


def decode_deep(source: Path | bytes) -> list[np.ndarray]:
    """Decode a file or its bytes by OpenCV, which keeps 16 bits and floats: the channels (H, W) of grey, RGB or RGBA,
    of the file's type. Raises ValueError for damage."""
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # OpenCV would report damage on stderr, beside our one line
    try:
        # Via memory, since OpenCV's own file reading does not take every name.
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
    """Bring channels (H, W) of any type to [0, 1], in one float32 array (C, H, W). Raises PictureFault for numbers
    that are not finite or beyond 16 bits, and for floats beyond [0, 1]."""
    kind = channels[0].dtype
    planes = np.empty((len(channels), *channels[0].shape), np.float32)
    if kind not in (np.uint8, np.uint16):
        if kind.kind == "f" and not all(np.isfinite(channel).all() for channel in channels):
            raise PictureFault("holds NaN or infinite pixels: replace them before giving it")
        low, high = min(channel.min() for channel in channels), max(channel.max() for channel in channels)
        if kind.kind == "f" and (low < -1e-3 or high > 1 + 1e-3):
            raise PictureFault(f"floating-point pixels from {low:.4g} to {high:.4g}: scale them to 0..1")
        if kind.kind != "f" and (low < 0 or high > 65535):  # Pillow's "I": 16 bits in 32, from PGM and some TIFF files
            raise PictureFault(f"integer pixels from {low} to {high}, beyond 16 bits: "
                               "save it with 8 or 16 bits a channel")  # fmt: skip
    full = {"u1": 255, "f2": 1, "f4": 1, "f8": 1}.get(kind.str[1:], 65535)
    for number, channel in enumerate(channels):  # one at a time: each copy of one may be 700 MB
        np.divide(channel, np.float32(full), out=planes[number], dtype=np.float32, casting="unsafe")
    return planes.clip(0, 1, out=planes) if kind.kind == "f" else planes


def straighten(colour: np.ndarray, alpha: np.ndarray | None, inverted: bool, premultiplied: bool) -> None:
    """In place: grey whose 0 is white, and colours that were multiplied with alpha, as all others have them."""
    if inverted:
        np.subtract(1, colour, out=colour)
    if premultiplied and alpha is not None:
        np.divide(colour, alpha, out=colour, where=alpha > 0)
        colour.clip(0, 1, out=colour)
