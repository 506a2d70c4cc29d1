"""Samples, the protocol of their sources, and the base class of all sources of image files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError, one_line
from .crops import ZOOM, cut, draw_square, load_column, load_picture, why_unreadable

NAMES = {  # field -> its names in data sets, our own name first
    "image": ("image", "original_image", "input_image"),
    "text": ("text", "caption"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction"),
    "conditioning_image": ("conditioning_image", "depth"),
}


@dataclass
class Sample:
    """A decoded sample: `image` is float32 (3, S, S) in [0, 1].

    `extras` holds one tensor (C, S, S) per requested column, with the crop of the image: images in [0, 1] (RGB; one
    channel for `mask`); for 16-bit depth maps and masks, and for masks with a palette, (1, S, S) with the raw values of
    the file (millimeters in a depth map, ids in an instance mask; 0 is "none").
    """

    index: int
    name: str
    image: Tensor
    text: str = ""
    instruction: str = ""
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CorruptSample:
    """A sample that could not be read, with its file name and the reason in one line."""

    index: int
    file: str
    why: str


class Source(Protocol):
    """A numbered list of samples."""

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """Return one line for reports: the source and its number of samples."""
        ...

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """Return the samples at `indices` as `size` x `size` pixels. `crops`: one generator per sample that draws its
        random crop; None takes the largest centered square."""
        ...


@dataclass
class Row:
    """A sample before decoding, with the bytes of its image files."""

    image: bytes
    text: str = ""
    instruction: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def words(row: dict[str, Any], key: str, where: str) -> str:
    """Return the text that a row of metadata has under one of the NAMES of `key`, or "". Raises UserError, naming
    `where`, for anything but a string, and for half of a surrogate pair, which tokenizers reject."""
    name = next((n for n in NAMES[key] if row.get(n) not in (None, "")), key)
    value = row.get(name)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {name} is {one_line(repr(value), 80)}, not a string: put it in quotes")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise UserError(f"{where}: {name} holds {half}, half of a surrogate pair: write that character again") from None
    return value or ""


def order(source: Source, seed: int, epoch: int) -> np.ndarray:
    """Return the order of samples in an epoch: that of `source.order`, if it has one, else a random permutation."""
    own = getattr(source, "order", None)
    indices = None if own is None else own(seed, epoch)
    return np.random.default_rng([seed, epoch, 0]).permutation(len(source)) if indices is None else indices


class PictureSource(ABC):
    """Base class of sources of image files: decodes, crops, and turns failures into `CorruptSample`. `zoom` is the
    range of random crops (see crops.draw_square)."""

    zoom: tuple[float, float] = ZOOM

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self) -> str: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of the sample in reports."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Return the undecoded sample. Raises OSError or ValueError if it cannot be read."""

    def unused(self) -> list[str]:
        """Return the names of files that belong to no sample: images not named in the metadata, captions and masks of a
        tar without an image."""
        return []

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        return [self._read(i, size, None if crops is None else crops[k]) for k, i in enumerate(indices)]

    @staticmethod
    def decode(row: Row, least: int | None = None) -> tuple[Image.Image, dict[str, Image.Image]]:
        """Decode the sample's image and those of its columns, without cropping. `least` as in `crops.load_picture`.
        Raises any exception of a decoder for damaged bytes, and ValueError, naming the column, for a column's file."""
        picture, others = load_picture(row.image, least), {}
        for column, data in row.pictures.items():
            try:
                others[column] = load_column(data, column)
            except Exception as error:
                raise ValueError(f"its {column}: {why_unreadable(error)}") from error
            _same_shape(picture.size, others[column].size, column)
        return picture, others

    def _read(self, index: int, size: int, rng: np.random.Generator | None) -> Sample | CorruptSample:
        try:
            row = self.row(index)
            picture, others = self.decode(row, least=math.ceil(self.zoom[1] * size))
            square = draw_square(picture.width, picture.height, size, rng, self.zoom)
            extras = {column: cut(other, square, size, column) for column, other in others.items()}
            return Sample(index, self.name(index), cut(picture, square, size), row.text, row.instruction, extras)
        except Exception as error:  # Pillow's decoders raise many types on damaged bytes
            return CorruptSample(index, self.name(index), why_unreadable(error))


def _same_shape(picture: tuple[int, int], other: tuple[int, int], column: str) -> None:
    """Raise ValueError if a column's aspect ratio differs from the image's by more than the rounding of a pixel: it
    would no longer be aligned. Its resolution may differ."""
    if abs(picture[0] * other[1] - picture[1] * other[0]) > max(*picture, *other):
        sizes = f"{other[0]} x {other[1]} px, the picture {picture[0]} x {picture[1]}"
        raise ValueError(f"its {column} has another shape: {sizes}")
