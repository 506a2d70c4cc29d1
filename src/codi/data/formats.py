"""Image formats that Pillow decodes, their file suffixes, and lists of the images in a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from PIL import Image

from ..errors import UserError

COMMON = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
IDENTIFIED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # recognized by Pillow, but not decoded


def image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats, e.g. "PNG"."""
    Image.init()
    return tuple(name for name in Image.ID if name not in IDENTIFIED)


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of image files, in lower case with the dot, the common ones first."""
    formats = {*image_formats(), "MPO"}  # MPO is opened as JPEG
    known = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats)
    return tuple(dict.fromkeys((*COMMON, *known)))


def list_images(folder: Path, below: bool = False) -> list[Path]:
    """List the images in `folder`, and in its sub-folders if `below`, sorted; see list_files."""
    suffixes = frozenset(image_suffixes())
    return [path for path in list_files(folder, below) if path.suffix.lower() in suffixes]


def list_files(folder: Path, below: bool = False) -> list[Path]:
    """List the files in `folder`, and in its sub-folders if `below`, sorted. Hidden files and folders are skipped;
    links to folders are not followed. Raises UserError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions") from error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def read_file(path: Path) -> bytes:
    """Return the content of a file. Raises OSError, also for pipes and devices, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.read_bytes()
