"""Picture files of users: anything Pillow or OpenCV can read -> float32 RGB in [0, 1]; `writing` has the way back.

Reading turns every colour model, bit depth, EXIF rotation and ICC profile into one thing, upright sRGB; what the file
was (grey, 16 bits, alpha) is kept in the `Picture`, so that a result can be written in kind, in the file's own profile
too if that is asked for. Every fault of a file is a `UserError` of one line.
"""

from __future__ import annotations

import glob
import math
import os
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from cv2.utils import logging
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..data import profiles
from ..errors import UserError, nearest
from .formats import image_formats, image_suffixes, list_images
from .writing import WRITABLE, check_writable, write_image, write_png

__all__ = [
    "PIXEL_LIMIT", "WRITABLE", "Picture", "check_file", "check_writable", "image_suffixes", "list_images", "read_image",
    "write_image", "write_png",
]  # fmt: skip

PIXEL_LIMIT = 178_956_970  # width x height; 512 MiB of 8-bit RGB, the size at which Pillow refuses too

_ORIENTATION = 0x0112  # EXIF tags
_DAMAGE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, struct.error, zlib.error)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")  # what common formats start with


@dataclass(frozen=True)
class Picture:
    """A picture as read, upright and in sRGB, or in a profile of its own."""

    rgb: Tensor
    """(3, H, W) float32 in [0, 1]."""
    alpha: Tensor | None = None
    """(1, H, W) float32 in [0, 1], straight (not premultiplied)."""
    grey: bool = False
    """The file had no colour channels; the three channels of `rgb` are equal."""
    bits: int = 8
    """8 or 16: the depth that keeps what the file held."""
    icc: bytes | None = None
    """The profile that `rgb` is in; None: sRGB."""
    exif: bytes | None = None
    """What camera and editor noted, as EXIF without the orientation, which is applied, and the thumbnail."""
    path: str = ""


def read_image(path: str | os.PathLike[str], own_profile: bool = False) -> Picture:
    """Read a picture; of an animated one, the first frame. Its embedded profile is turned into sRGB; with `own_profile`
    colours stay as they are in it where that does for networks that know sRGB (see profiles.stays).

    Raises UserError for a file that is missing, a folder, empty, no image, damaged, above PIXEL_LIMIT (told from the
    header, before any pixel is decoded), or whose floating-point pixels are not finite or not within [0, 1].
    A broken colour profile is only a warning: the colours are then read as sRGB.
    """
    path = Path(path)
    check_file(path)
    image = _open(path)
    if image is None:  # multi-channel or 64-bit floating-point TIFF, which Pillow does not know
        colour, alpha, bits = _split(_decode_deep(path), path)
        return _picture(path, colour, alpha, bits)
    with image:
        # Pillow would cut 16-bit colour to 8 bits. `tile` says how the file stores pixels and is gone after load().
        stored = str(getattr(image, "tile", ""))
        deep = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA") and ";16" in stored
        try:
            with warnings.catch_warnings():  # Pillow's own, of odd metadata
                warnings.simplefilter("ignore")
                image.load()
                # Pillow and OpenCV both turn a TIFF upright while decoding it; Pillow then drops the tag.
                orientation = _orientation(image)
            icc, exif = image.info.get("icc_profile") or None, _exif(image)
            if deep or image.mode in ("F", "I") or image.mode.startswith("I;16"):
                colour, alpha, bits = _split(_decode_deep(path) if deep else np.asarray(image), path)
                if "LA;16" in stored:  # OpenCV repeats the grey
                    colour = colour[..., :1]
                icc, used = _divided(icc, "L" if colour.shape[-1] == 1 else "RGB", alpha, own_profile)
                colour = profiles.deep_to_srgb(colour, used, path)
            else:
                (colour, alpha, icc), bits = _eight_bit(image, icc, path, own_profile), 8
        except UserError:
            raise
        except (*_DAMAGE, Image.DecompressionBombError, MemoryError) as error:
            raise _damaged(path, error) from error
    return _picture(path, colour, alpha, bits, orientation, icc, exif)


# --- reading -------------------------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raises UserError for what is not there, empty or no ordinary file: reading a pipe would wait forever."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder: name an image file in it")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there: restore it or name another")
        if not path.exists():
            raise _missing(path)
        if not path.is_file():
            raise UserError(f"{path}: is no ordinary file: name an image file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty (0 bytes): copy or download it again")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check name and permissions") from error


def _missing(path: Path) -> UserError:
    if address := re.match(r"([a-z][a-z0-9+.-]+):/+", str(path), re.IGNORECASE):
        named = f"{address[1]}://{str(path)[address.end() :]}"  # as typed: a Path has one slash
        return UserError(f"{named}: is an address: download the file first, and name it")
    if glob.has_magic(str(path)):
        return UserError(f"{path}: no file matches: check the folder and the pattern")
    hint = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    return UserError(f"{path}: no such file{hint}: check the name")


def _open(path: Path) -> Image.Image | None:
    """The header of `path`, or None for a TIFF that OpenCV alone can decode."""
    try:
        with warnings.catch_warnings():  # of sizes, but the limit below is the one that counts
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=image_formats())
    except Image.DecompressionBombError as error:
        raise _too_large(path, _header_size(path)) from error
    except UnidentifiedImageError as error:
        prefix = _prefix(path)
        if prefix[:4] in (b"II*\0", b"MM\0*"):
            if _is_deep_tiff(path):
                return None
            raise UserError(f"{path}: truncated or damaged, or an unusual kind of TIFF: "
                            "save it again as RGB of 8 or 16 bits") from error  # fmt: skip
        if prefix.startswith(_MAGIC):
            raise _damaged(path, error) from error
        raise UserError(f"{path}: is not an image: give a PNG, JPEG, WebP, TIFF, GIF or BMP file") from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if image.width * image.height > PIXEL_LIMIT:
        image.close()
        raise _too_large(path, image.size)
    return image


def _prefix(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(16)


def _header_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header. Image.open says only how many pixels a refused picture has; its readers do."""
    prefix = _prefix(path)
    with path.open("rb") as stream:
        for reader, accepts in Image.OPEN.values():
            if accepts is None or accepts(prefix) is True:
                try:
                    stream.seek(0)
                    return reader(stream, str(path)).size
                except (*_DAMAGE, Image.DecompressionBombError):
                    continue
    return (0, 0)


def _is_deep_tiff(path: Path) -> bool:
    """Whether the header promises what OpenCV decodes: 1, 3 or 4 channels of 16, 32 or 64 bits; refuses a huge one."""
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
            stream.seek(header.next)
            header.load(stream)
            width, height, bits = int(header[256]), int(header[257]), tuple(header.get(258, (1,)))
            channels = int(header.get(277, 1))
    except _DAMAGE:
        return False
    if width * height > PIXEL_LIMIT:
        raise _too_large(path, (width, height))
    return channels in (1, 3, 4) and set(bits) <= {16, 32, 64}


def _decode_deep(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4) RGB(A) of the file's own type, by OpenCV, which keeps 16 bits and floats."""
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # OpenCV would report damage on stderr, beside our one line
    try:
        # Via memory, since OpenCV's own file reading does not take every name.
        array = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise _damaged(path, error) from error
    finally:
        logging.setLogLevel(level)
    if array is None:
        raise _damaged(path, ValueError("OpenCV finds no picture in it"))
    if array.ndim == 2:
        return array
    return cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _split(array: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Pixels of any type -> colour float32 (H, W, 1 or 3) in [0, 1], alpha (H, W) or None, bits."""
    if array.dtype == np.uint8:
        scaled = array.astype(np.float32) / 255
    elif array.dtype == np.uint16:
        scaled = array.astype(np.float32) / 65535
    elif np.issubdtype(array.dtype, np.integer):  # Pillow's "I": 16 bits in 32, from PGM and some TIFF files
        if array.min() < 0 or array.max() > 65535:
            raise UserError(f"{path}: integer pixels from {array.min()} to {array.max()}, beyond 16 bits: "
                            "save it with 8 or 16 bits a channel")  # fmt: skip
        scaled = array.astype(np.float32) / 65535
    else:
        if not np.isfinite(array).all():
            raise UserError(f"{path}: holds NaN or infinite pixels: replace them before giving it")
        if array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise UserError(f"{path}: floating-point pixels from {array.min():.4g} to {array.max():.4g}: "
                            "scale them to 0..1")  # fmt: skip
        scaled = array.astype(np.float32).clip(0, 1)
    if scaled.ndim == 2:
        scaled = scaled[..., None]
    alpha = scaled[..., 3] if scaled.shape[-1] == 4 else None
    return scaled[..., :3], alpha, 8 if array.dtype == np.uint8 else 16


def _divided(icc: bytes | None, mode: str, alpha: np.ndarray | None, own: bool) -> tuple[bytes | None, bytes | None]:
    """A profile as (one that the picture stays in, one that is turned into sRGB): one of them is None. Grey with alpha
    is written as colour, where a profile of grey would be wrong."""
    stays = own and icc is not None and (mode != "L" or alpha is None) and profiles.stays(icc, mode)
    return (icc, None) if stays else (None, icc)


def _eight_bit(
    image: Image.Image, icc: bytes | None, path: Path, own_profile: bool
) -> tuple[np.ndarray, np.ndarray | None, bytes | None]:
    """A loaded Pillow picture of 8 bits a channel, of any mode -> colour and alpha as _split gives them, and the
    profile that it is in, None for sRGB."""
    mode = image.mode
    if "transparency" in image.info and mode in ("1", "L", "P", "RGB"):  # a palette entry or one colour is clear
        image = image.convert("LA" if mode in ("1", "L") else "RGBA")
    elif mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "PA":
        image = image.convert("RGBA")
    alpha = None
    if "A" in image.getbands():
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGB")
    icc, used = _divided(icc, image.mode, alpha, own_profile)
    colour = np.asarray(profiles.to_srgb(image, used, path), np.float32) / 255
    return colour if colour.ndim == 3 else colour[..., None], alpha, icc


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF comes from cameras and editors in any shape: an unreadable one turns nothing
        return 1


def _exif(image: Image.Image) -> bytes | None:
    try:
        kept = image.getexif()
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            kept.get_ifd(part)  # or tobytes would leave it out
        kept.pop(_ORIENTATION, None)
        return kept.tobytes() if len(kept) else None
    except Exception:  # as in _orientation
        return None


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation 1..8 of (H, W, ...)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _picture(
    path: Path,
    colour: np.ndarray,
    alpha: np.ndarray | None,
    bits: int,
    orientation: int = 1,
    icc: bytes | None = None,
    exif: bytes | None = None,
) -> Picture:
    """Channels as _split gives them -> the upright Picture."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(_upright(array, orientation).transpose(2, 0, 1)))

    rgb = tensor(colour)
    return Picture(
        rgb=rgb.expand(3, -1, -1).contiguous(),
        alpha=None if alpha is None else tensor(alpha[..., None]),
        grey=rgb.shape[0] == 1,
        bits=bits,
        icc=icc,
        exif=exif,
        path=str(path),
    )


# --- faults --------------------------------------------------------------------------------------------------------


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: truncated or damaged ({_one_line(error)}): copy or download it again")


def _too_large(path: Path, size: tuple[int, int]) -> UserError:
    megapixels = math.floor(PIXEL_LIMIT / 1e6)
    return UserError(f"{path}: {size[0]} x {size[1]} pixels, above the limit of {megapixels} megapixels: "
                     "scale it down or cut it first")  # fmt: skip


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
