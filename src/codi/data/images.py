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
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..data import profiles
from ..errors import UserError, nearest
from .deep import DAMAGE, TiffHeader, decode, scale, straighten, tiff_header
from .formats import image_formats, image_suffixes, list_images
from .writing import WRITABLE, check_writable, write_image, write_png

__all__ = [
    "PIXEL_LIMIT", "WRITABLE", "Picture", "check_file", "check_writable", "image_suffixes", "list_images", "read_image",
    "require_size", "write_image", "write_png",
]  # fmt: skip

PIXEL_LIMIT = 178_956_970  # width x height; 512 MiB of 8-bit RGB, the size at which Pillow refuses too

_ORIENTATION = 0x0112  # EXIF tags
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for files above 4 GB
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", *_TIFF)  # what common formats start with


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
    if isinstance(image, TiffHeader):
        return _picture(path, *_deep_tiff(path, image))
    with image:
        try:
            _warn_of_frames(path, image)
            # Pillow would cut 16-bit colour to 8 bits. `tile` says how the file stores pixels and is gone after load().
            stored = str(getattr(image, "tile", ""))
            with warnings.catch_warnings():  # Pillow's own, of odd metadata
                warnings.simplefilter("ignore")
                image.load()
                # Pillow and OpenCV both turn a TIFF upright while decoding it; Pillow then drops the tag.
                orientation = _orientation(image)
            icc, exif = image.info.get("icc_profile") or None, _exif(image)
            cut = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA") and ";16" in stored
            if cut or image.mode in ("F", "I") or image.mode.startswith("I;16"):
                (colour, alpha, bits), kept = _deep(image, stored, path, cut), icc
                kept, used = _divided(icc, "L" if len(colour) == 1 else "RGB", alpha, own_profile)
                _convert_deep(colour, used, path)
            else:
                (colour, alpha, kept), bits = _eight_bit(image, stored, icc, path, own_profile), 8
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(f"{path}: does not fit into memory: scale it down or cut it first") from error
        except (*DAMAGE, Image.DecompressionBombError) as error:
            raise _damaged(path, error) from error
    return _picture(path, colour, alpha, bits, orientation, kept, exif)


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


def _open(path: Path) -> Image.Image | TiffHeader:
    """The header of `path`; TiffHeader for a TIFF that OpenCV alone can decode."""
    prefix = _prefix(path)
    tiff = tiff_header(path) if prefix[:4] in _TIFF else None
    try:
        with warnings.catch_warnings():  # of sizes, but the limit below is the one that counts
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=image_formats())
    except Image.DecompressionBombError as error:
        raise _too_large(path, _header_size(path)) from error
    except UnidentifiedImageError as error:
        if prefix[:4] in _TIFF:
            if tiff and tiff.decodable:
                require_size(path, tiff.size)
                return tiff
            raise UserError(f"{path}: truncated or damaged, or an unusual kind of TIFF: "
                            "save it again as RGB of 8 or 16 bits") from error  # fmt: skip
        if prefix.startswith(_MAGIC):
            raise _damaged(path, error) from error
        raise UserError(f"{path}: is not an image: give a PNG, JPEG, WebP, TIFF, GIF or BMP file") from error
    except DAMAGE as error:
        raise _damaged(path, error) from error
    require_size(path, image.size)
    return image


def require_size(path: Path, size: tuple[int, int]) -> None:
    """Raises UserError for (width, height) above PIXEL_LIMIT."""
    if size[0] * size[1] > PIXEL_LIMIT:
        raise _too_large(path, size)


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
                except (*DAMAGE, Image.DecompressionBombError):
                    continue
    return (0, 0)


def _warn_of_frames(path: Path, image: Image.Image) -> None:
    try:  # of a JPEG or PSD the first is the picture, others are previews, gain maps or layers of it
        several = image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    except DAMAGE:  # of another frame than the first
        return
    if several:
        warnings.warn(f"{path}: holds several frames or pages: only the first is read", stacklevel=3)


def _deep_tiff(path: Path, header: TiffHeader) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Colour, alpha and bits, as _deep gives them, of a TIFF that OpenCV alone can decode."""
    if header.pages:
        warnings.warn(f"{path}: holds several pages: only the first is read", stacklevel=3)
    try:
        planes = scale(decode(path), path)
    except UserError:
        raise
    except ValueError as error:
        raise _damaged(path, error) from error
    colour, alpha = planes[:3], planes[3] if len(planes) == 4 and header.extra != 0 else None
    straighten(colour, alpha, header.photometric == 0, header.extra == 1)
    return colour, alpha, 16


def _deep(image: Image.Image, stored: str, path: Path, cut: bool) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Colour float32 (1 or 3, H, W), alpha (H, W) or None, and bits of a loaded picture of more than 8 bits. `cut`:
    Pillow has 8 of them, so that OpenCV decodes it again."""
    clear = image.info.get("transparency")
    inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    if cut:
        image.close()  # which frees its pixels
        channels = decode(path)
    else:
        channels = [np.asarray(image)]
    planes = scale(channels, path)
    alpha = planes[3] if len(planes) == 4 and "RGBX" not in stored else None
    if len(channels) == 1 and isinstance(clear, int):
        alpha = (channels[0] != clear).astype(np.float32)
    colour = planes[:1] if "LA;16" in stored else planes[:3]  # OpenCV repeats the grey
    straighten(colour, alpha, inverted, "RGBa" in stored)
    return colour, alpha, 8 if channels[0].dtype == np.uint8 else 16


def _convert_deep(colour: np.ndarray, icc: bytes | None, path: Path) -> None:
    """From the profile to sRGB, in place, some rows at a time."""
    rows = max(1, 2**24 // colour.shape[2])
    for top in range(0, colour.shape[1] if icc else 0, rows):
        part = colour[:, top : top + rows]
        part[:] = profiles.deep_to_srgb(part.transpose(1, 2, 0), icc, path).transpose(2, 0, 1)


def _divided(icc: bytes | None, mode: str, alpha: np.ndarray | None, own: bool) -> tuple[bytes | None, bytes | None]:
    """A profile as (one that the picture stays in, one that is turned into sRGB): one of them is None. Grey with alpha
    is written as colour, where a profile of grey would be wrong."""
    stays = own and icc is not None and (mode != "L" or alpha is None) and profiles.stays(icc, mode)
    return (icc, None) if stays else (None, icc)


def _eight_bit(
    image: Image.Image, stored: str, icc: bytes | None, path: Path, own_profile: bool
) -> tuple[np.ndarray, np.ndarray | None, bytes | None]:
    """Colour and alpha, as _deep gives them, of a loaded picture of 8 bits a channel and any mode, and the profile that
    it is in, None for sRGB."""
    mode, clear = image.mode, image.info.get("transparency")
    if isinstance(clear, int) and (packed := re.search(r"'L;([24])'", stored)):
        image.info["transparency"] = clear * 255 // (2 ** int(packed[1]) - 1)  # Pillow scales the pixels alone
    if clear is not None and mode in ("1", "L", "P", "RGB"):  # a palette entry or one colour is clear
        image = image.convert("LA" if mode in ("1", "L") else "RGBA")
    elif mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "PA":
        image = image.convert("RGBA")
    alpha = scale([np.asarray(image.getchannel("A"))], path)[0] if image.mode in ("LA", "RGBA") else None
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGB")
    icc, used = _divided(icc, image.mode, alpha, own_profile)
    pixels = np.asarray(profiles.to_srgb(image, used, path))
    return scale([pixels] if pixels.ndim == 2 else [pixels[..., c] for c in range(3)], path), alpha, icc


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
    """Undo EXIF orientation 1..8 of (..., H, W)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
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
    """Channels as _deep gives them -> the upright Picture."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(_upright(array, orientation)))

    rgb = tensor(colour)
    return Picture(
        rgb=rgb.expand(3, -1, -1).contiguous(),
        alpha=None if alpha is None else tensor(alpha[None]),
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
