"""Decoding of picture files, the same for training and for commands: every color model and bit depth becomes sRGB.

`decode_picture` serves both: `images.read_image` turns what it returns into tensors, `crops.load_picture` into a
picture of 8 bits. `decode_numbers` leaves the numbers of depth maps and masks as they are.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from . import profiles
from .deep import DAMAGE, PictureFault, TiffHeader, decode_deep, scale, straighten, tiff_header
from .formats import image_formats

_ORIENTATION = 0x0112  # EXIF tags
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for files above 4 GB
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", *_TIFF)  # what common formats start with


@dataclass
class Decoded:
    """A picture file's pixels, not yet turned upright."""

    color: Image.Image | np.ndarray
    """Of 8 bits a picture of mode L or RGB; of more, float32 (1 or 3, H, W) in [0, 1]."""
    alpha: Image.Image | np.ndarray | None
    """Straight (not premultiplied): mode L, or float32 (H, W) in [0, 1]."""
    bits: int
    """8 or 16: the depth that keeps what the file held."""
    orientation: int = 1
    """As EXIF numbers it."""
    icc: bytes | None = None
    """The profile that the colors are in; None: sRGB."""
    exif: bytes | None = None
    """EXIF without the orientation and the thumbnail."""

    def to_image(self) -> Image.Image:
        """Return the colors upright in 8 bits, mode L or RGB."""
        if isinstance(self.color, Image.Image):
            if self.orientation == 1:
                return self.color
            levels = np.atleast_3d(np.asarray(self.color)).transpose(2, 0, 1)
        else:
            levels = np.stack([np.rint(plane * 255).astype(np.uint8) for plane in self.color])
        levels = upright(levels, self.orientation).transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2] == 1 else levels))


def decode_picture(
    source: Path | bytes,
    name: str,
    limit: int,
    least: int | None = None,
    own_profile: bool = False,
    still: bool = False,
) -> Decoded:
    """Decode a file or its bytes. Colors are turned into sRGB; with `own_profile` they stay in the embedded profile
    where networks that know sRGB can do with it (see profiles.stays). `least`: the shorter side in pixels that the
    caller needs; a larger JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, several times faster.

    Raises PictureFault for what is no image, damaged, of more than `limit` pixels (read from the header, before any
    pixel is decoded), or whose floating-point pixels are not finite or not within [0, 1]; with `still` also for
    several frames or pages, of which otherwise the first is read, with a warning. `name` is for warnings.
    """
    with _one_fault():
        image = _open(source, limit)
        if isinstance(image, TiffHeader):
            _check_frames(image.pages, name, still)
            return _decode_tiff(source, image)
        with image:
            _check_frames(_is_animated(image), name, still)
            with _quiet(source):
                stored = _load(image, least)
                # Pillow and OpenCV both turn a TIFF upright while decoding it; Pillow then drops the tag.
                orientation, exif = _orientation(image), _exif(image)
            icc = image.info.get("icc_profile") or None
            # Pillow would cut 16-bit color to 8 bits.
            cut = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA") and ";16" in stored
            if not cut and not is_deep(image):
                color, alpha, kept = _decode_eight_bit(image, stored, icc, name, own_profile)
                return Decoded(color, alpha, 8, orientation, kept, exif)
            planes, alpha, bits = _decode_deep(source, image, stored, cut)
            kept, used = _divide(icc, "L" if len(planes) == 1 else "RGB", alpha is not None, own_profile)
            _convert_deep(planes, used, name)
            return Decoded(planes, alpha, bits, orientation, kept, exif)


def decode_numbers(source: bytes, limit: int, palette: bool) -> Image.Image | None:
    """Decode a depth map or a mask, upright, with its numbers as they are: of mode I;16, I or F or, if `palette`, the
    indices of mode P. Returns None for others, which are pictures. Raises PictureFault as decode_picture, with
    `still`."""
    with _one_fault():
        image = _open(source, limit)
        if isinstance(image, TiffHeader):
            _check_frames(image.pages, "", still=True)
            return numbers_image(decode_deep(source)[0]) if image.channels == 1 else None
        with image:
            if not is_deep(image) and not (palette and image.mode == "P"):
                return None
            _check_frames(_is_animated(image), "", still=True)
            _load(image, None)
            orientation = _orientation(image)
            if orientation == 1:
                return image.copy()
            turned = Image.fromarray(np.ascontiguousarray(upright(np.asarray(image), orientation)))
            if image.mode == "P":
                turned.putpalette(image.getpalette() or [])
            return turned


def numbers_image(grid: np.ndarray) -> Image.Image:
    """Return an array (H, W) of numbers as a picture of mode I;16 where these hold it, else F. Numbers that are not
    finite become 0, which is "none"."""
    if grid.dtype.kind == "f":
        return Image.fromarray(np.nan_to_num(grid.astype(np.float32), nan=0, posinf=0, neginf=0))
    return Image.fromarray(grid.astype(np.uint16 if grid.min() >= 0 and grid.max() <= 65535 else np.float32))


def is_deep(image: Image.Image) -> bool:
    """Return whether a picture holds numbers of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation 1..8 of (..., H, W)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    return array


# --- opening --------------------------------------------------------------------------------------------------------


@contextmanager
def _one_fault() -> Iterator[None]:
    """Within it, whatever decoders raise on damaged bytes becomes a PictureFault."""
    try:
        yield
    except PictureFault:
        raise
    except MemoryError as error:
        raise PictureFault("does not fit into memory: scale it down or cut it first") from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise PictureFault(f"truncated or damaged ({reason}): copy or download it again") from error


def _open(source: Path | bytes, limit: int) -> Image.Image | TiffHeader:
    """Read a picture's header; return TiffHeader for a TIFF that OpenCV alone can decode."""
    with _stream(source) as stream, _quiet(source):
        prefix = stream.read(16)
        stream.seek(0)
        tiff = tiff_header(stream) if prefix[:4] in _TIFF else None
    try:
        with _quiet(source):
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=image_formats())
    except Image.DecompressionBombError as error:
        raise _too_large(_header_size(source, prefix), limit) from error
    except UnidentifiedImageError as error:
        if prefix[:4] in _TIFF:
            if tiff and tiff.decodable:
                require_pixels(tiff.size, limit)
                return tiff
            raise PictureFault("truncated or damaged, or an unusual kind of TIFF: "
                               "save it again as RGB of 8 or 16 bits") from error  # fmt: skip
        if prefix.startswith(_MAGIC):
            raise PictureFault("truncated or damaged (cut off within its header): copy or download it again") from error
        raise PictureFault("is not an image: give a PNG, JPEG, WebP, TIFF, GIF or BMP file") from error
    require_pixels(image.size, limit)
    return image


@contextmanager
def _quiet(source: Path | bytes) -> Iterator[None]:
    """Leave out Pillow's own warnings, of odd metadata and of sizes, for which there is a limit. Not for bytes, which
    are training's: it decodes in threads, while the filters of warnings are the whole process's."""
    if isinstance(source, bytes):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stream(source: Path | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def require_pixels(size: tuple[int, int], limit: int) -> None:
    """Raise PictureFault for (width, height) of more than `limit` pixels."""
    if size[0] * size[1] > limit:
        raise _too_large(size, limit)


def _too_large(size: tuple[int, int], limit: int) -> PictureFault:
    return PictureFault(f"{size[0]} x {size[1]} pixels, above the limit of {math.floor(limit / 1e6)} megapixels: "
                        "scale it down or cut it first")  # fmt: skip


def _header_size(source: Path | bytes, prefix: bytes) -> tuple[int, int]:
    """(width, height) from the header. Image.open says only how many pixels a refused picture has; its readers do."""
    with _stream(source) as stream:
        for reader, accepts in Image.OPEN.values():
            if accepts is None or accepts(prefix) is True:
                try:
                    stream.seek(0)
                    return reader(stream, "" if isinstance(source, bytes) else str(source)).size
                except (*DAMAGE, Image.DecompressionBombError):
                    continue
    return (0, 0)


def _is_animated(image: Image.Image) -> bool:
    try:  # of a JPEG or PSD the first is the picture, others are previews, gain maps or layers of it
        return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    except DAMAGE:  # of another frame than the first
        return False


def _check_frames(several: bool, name: str, still: bool) -> None:
    if several and still:
        raise PictureFault("holds several frames or pages: save the one that is meant as a file of its own")
    if several:
        warnings.warn(f"{name}: holds several frames or pages: only the first is read", stacklevel=4)


def _load(image: Image.Image, least: int | None) -> str:
    """Decode the pixels; return how the file stores them."""
    if least is not None and image.format == "JPEG":
        image.draft(None, (least, least))
    stored = str(getattr(image, "tile", ""))  # gone after load()
    image.load()
    return stored


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


# --- pixels ---------------------------------------------------------------------------------------------------------


def _decode_eight_bit(
    image: Image.Image, stored: str, icc: bytes | None, name: str, own_profile: bool
) -> tuple[Image.Image, Image.Image | None, bytes | None]:
    """Return colors and alpha of a loaded picture of 8 bits a channel and any mode, and the profile that the colors
    are in, None for sRGB."""
    mode, clear = image.mode, image.info.get("transparency")
    if isinstance(clear, int) and (packed := re.search(r"'L;([24])'", stored)):
        image.info["transparency"] = clear * 255 // (2 ** int(packed[1]) - 1)  # Pillow scales the pixels alone
    if clear is not None and mode in ("1", "L", "P", "RGB"):  # a palette entry or one color is clear
        image = image.convert("LA" if mode in ("1", "L") else "RGBA")
    elif mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "PA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None  # that of LAB is another A
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    kept, used = _divide(icc, image.mode, alpha is not None, own_profile)
    return profiles.to_srgb(image, used, name), alpha, kept


def _decode_tiff(source: Path | bytes, header: TiffHeader) -> Decoded:
    """Decode a TIFF that OpenCV alone can decode."""
    planes = scale(decode_deep(source))
    color, alpha = planes[:3], planes[3] if len(planes) == 4 and header.extra != 0 else None
    straighten(color, alpha, header.photometric == 0, header.extra == 1)
    return Decoded(color, alpha, 16)


def _decode_deep(
    source: Path | bytes, image: Image.Image, stored: str, cut: bool
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Return colors float32 (1 or 3, H, W), alpha (H, W) or None, and bits of a loaded picture of more than 8 bits.
    `cut`: Pillow has 8 of them, so that OpenCV decodes it again."""
    clear = image.info.get("transparency")
    inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    if cut:
        image.close()  # which frees its pixels
        channels = decode_deep(source)
    else:
        channels = [np.asarray(image)]
    planes = scale(channels)
    alpha = planes[3] if len(planes) == 4 and "RGBX" not in stored else None
    if len(channels) == 1 and isinstance(clear, int):
        alpha = (channels[0] != clear).astype(np.float32)
    color = planes[:1] if "LA;16" in stored else planes[:3]  # OpenCV repeats the grey
    straighten(color, alpha, inverted, "RGBa" in stored)
    return color, alpha, 8 if channels[0].dtype == np.uint8 else 16


def _convert_deep(color: np.ndarray, icc: bytes | None, name: str) -> None:
    """Convert from the profile to sRGB, in place, some rows at a time."""
    rows = max(1, 2**24 // color.shape[2])
    for top in range(0, color.shape[1] if icc else 0, rows):
        part = color[:, top : top + rows]
        part[:] = profiles.deep_to_srgb(part.transpose(1, 2, 0), icc, name).transpose(2, 0, 1)


def _divide(icc: bytes | None, mode: str, has_alpha: bool, own: bool) -> tuple[bytes | None, bytes | None]:
    """Return a profile as (one that the picture stays in, one that is turned into sRGB): one of them is None. Grey with
    alpha is written as color, where a profile of grey would be wrong."""
    stays = own and icc is not None and (mode != "L" or not has_alpha) and profiles.stays(icc, mode)
    return (icc, None) if stays else (None, icc)
