"""Decoding of image files, shared by training and commands: every color model and bit depth becomes sRGB.

`images.read_image` turns the result of `decode_picture` into tensors, `crops.load_picture` into an 8-bit image.
`decode_numbers` keeps the values of depth maps and masks.
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
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", *_TIFF)  # the first bytes of common formats


@dataclass
class Decoded:
    """Decoded pixels of an image file, before its EXIF orientation is applied."""

    color: Image.Image | np.ndarray
    """For 8 bits an image of mode L or RGB; for more, float32 (1 or 3, H, W) in [0, 1]."""
    alpha: Image.Image | np.ndarray | None
    """Not premultiplied: mode L, or float32 (H, W) in [0, 1]."""
    bits: int
    """8 or 16: the smallest depth that preserves the file's values."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    icc: bytes | None = None
    """The profile of the colors; None: sRGB."""
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
    """Decode a file or its bytes. Colors are converted to sRGB; with `own_profile` they stay in the embedded profile
    if it is close enough to sRGB for the networks (see profiles.stays). `least` is the shorter side in pixels that the
    caller needs: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, several times faster.

    Raises PictureFault if the file is no image, is damaged, has more than `limit` pixels (checked in the header, before
    any pixel is decoded), or has floating-point pixels that are not finite or not within [0, 1]; with `still` also for
    several frames or pages, of which otherwise the first is read, with a warning. `name` is used in warnings.
    """
    with _as_picture_fault():
        image = _open(source, limit)
        if isinstance(image, TiffHeader):
            _check_frames(image.pages, name, still)
            return _decode_tiff(source, image)
        with image:
            _check_frames(_is_animated(image), name, still)
            with _no_warnings(source):
                stored = _load(image, least)
                # Pillow and OpenCV both turn a TIFF upright while decoding it; Pillow then drops the tag.
                orientation, exif = _orientation(image), _exif(image)
            icc = image.info.get("icc_profile") or None
            # Pillow would cut 16-bit color to 8 bits.
            cut = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA") and ";16" in stored
            if not cut and not is_deep(image):
                color, alpha, profile = _decode_eight_bit(image, stored, icc, name, own_profile)
                return Decoded(color, alpha, 8, orientation, profile, exif)
            planes, alpha, bits = _decode_deep(source, image, stored, cut)
            profile, converted = _split_profile(icc, "L" if len(planes) == 1 else "RGB", alpha is not None, own_profile)
            _convert_deep(planes, converted, name)
            return Decoded(planes, alpha, bits, orientation, profile, exif)


def decode_numbers(source: bytes, limit: int, palette: bool) -> Image.Image | None:
    """Decode a depth map or a mask, upright, with its values unchanged: of mode I;16, I or F or, if `palette`, the
    indices of mode P. Returns None for other modes, which are ordinary images. Raises PictureFault like decode_picture
    with `still`."""
    with _as_picture_fault():
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
    """Return an array (H, W) as an image of mode I;16 if its integers fit, else of mode F. Values that are not finite
    become 0, which means "none"."""
    if grid.dtype.kind == "f":
        return Image.fromarray(np.nan_to_num(grid.astype(np.float32), nan=0, posinf=0, neginf=0))
    return Image.fromarray(grid.astype(np.uint16 if grid.min() >= 0 and grid.max() <= 65535 else np.float32))


def is_deep(image: Image.Image) -> bool:
    """Return True for modes of more than 8 bits per channel."""
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
def _as_picture_fault() -> Iterator[None]:
    """Turn all exceptions that decoders raise on damaged bytes into PictureFault."""
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
    """Read an image's header; return TiffHeader for a TIFF that only OpenCV can decode."""
    with _stream(source) as stream, _no_warnings(source):
        prefix = stream.read(16)
        stream.seek(0)
        tiff = tiff_header(stream) if prefix[:4] in _TIFF else None
    try:
        with _no_warnings(source):
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
def _no_warnings(source: Path | bytes) -> Iterator[None]:
    """Suppress Pillow's warnings about odd metadata and about sizes, for which there is a limit. Has no effect for
    bytes: training decodes these in threads, and warning filters are shared by the whole process."""
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
    """Return (width, height) from the header of a file that Image.open refuses, from Pillow's readers."""
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
    try:  # in a JPEG or PSD, later frames are previews, gain maps or layers
        return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    except DAMAGE:  # in another frame than the first
        return False


def _check_frames(several: bool, name: str, still: bool) -> None:
    if several and still:
        raise PictureFault("holds several frames or pages: save one of them as a separate file")
    if several:
        warnings.warn(f"{name}: holds several frames or pages: only the first is read", stacklevel=4)


def _load(image: Image.Image, least: int | None) -> str:
    """Decode the pixels; return Pillow's description of how the file stores them."""
    if least is not None and image.format == "JPEG":
        image.draft(None, (least, least))
    stored = str(getattr(image, "tile", ""))  # not available after load()
    image.load()
    return stored


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # malformed EXIF is common and ignored
        return 1


def _exif(image: Image.Image) -> bytes | None:
    try:
        exif = image.getexif()
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            exif.get_ifd(part)  # or tobytes would leave it out
        exif.pop(_ORIENTATION, None)
        return exif.tobytes() if len(exif) else None
    except Exception:  # as in _orientation
        return None


# --- pixels ---------------------------------------------------------------------------------------------------------


def _decode_eight_bit(
    image: Image.Image, stored: str, icc: bytes | None, name: str, own_profile: bool
) -> tuple[Image.Image, Image.Image | None, bytes | None]:
    """Return colors and alpha of a loaded image with 8 bits per channel, of any mode, and the profile of the colors,
    None for sRGB."""
    mode, transparent = image.mode, image.info.get("transparency")
    if isinstance(transparent, int) and (packed := re.search(r"'L;([24])'", stored)):
        image.info["transparency"] = transparent * 255 // (2 ** int(packed[1]) - 1)  # Pillow scales only the pixels
    if transparent is not None and mode in ("1", "L", "P", "RGB"):  # a palette entry or one color is transparent
        image = image.convert("LA" if mode in ("1", "L") else "RGBA")
    elif mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "PA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None  # not the A of LAB
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    profile, converted = _split_profile(icc, image.mode, alpha is not None, own_profile)
    return profiles.to_srgb(image, converted, name), alpha, profile


def _decode_tiff(source: Path | bytes, header: TiffHeader) -> Decoded:
    """Decode a TIFF that only OpenCV can decode."""
    planes = scale(decode_deep(source))
    color, alpha = planes[:3], planes[3] if len(planes) == 4 and header.extra != 0 else None
    straighten(color, alpha, header.photometric == 0, header.extra == 1)
    return Decoded(color, alpha, 16)


def _decode_deep(
    source: Path | bytes, image: Image.Image, stored: str, cut: bool
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Return colors float32 (1 or 3, H, W), alpha (H, W) or None, and bits of a loaded image of more than 8 bits.
    `cut`: Pillow cut it to 8 bits, so OpenCV decodes it again."""
    transparent = image.info.get("transparency")
    inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    if cut:
        image.close()  # frees its pixels
        channels = decode_deep(source)
    else:
        channels = [np.asarray(image)]
    planes = scale(channels)
    alpha = planes[3] if len(planes) == 4 and "RGBX" not in stored else None
    if len(channels) == 1 and isinstance(transparent, int):
        alpha = (channels[0] != transparent).astype(np.float32)
    color = planes[:1] if "LA;16" in stored else planes[:3]  # OpenCV repeats the grey
    straighten(color, alpha, inverted, "RGBa" in stored)
    return color, alpha, 8 if channels[0].dtype == np.uint8 else 16


def _convert_deep(color: np.ndarray, icc: bytes | None, name: str) -> None:
    """Convert colors from the profile to sRGB, in place, in bands of rows to limit memory."""
    rows = max(1, 2**24 // color.shape[2])
    for top in range(0, color.shape[1] if icc else 0, rows):
        part = color[:, top : top + rows]
        part[:] = profiles.deep_to_srgb(part.transpose(1, 2, 0), icc, name).transpose(2, 0, 1)


def _split_profile(icc: bytes | None, mode: str, has_alpha: bool, own: bool) -> tuple[bytes | None, bytes | None]:
    """Return (profile to stay in, profile to convert to sRGB from), of which at least one is None. Grey with alpha is
    always converted: it is written as color, for which a grey profile would be wrong."""
    stays = own and icc is not None and (mode != "L" or not has_alpha) and profiles.stays(icc, mode)
    return (icc, None) if stays else (None, icc)
