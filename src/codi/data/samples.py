"""One sample, the protocol of what yields samples, and what every source of picture files shares."""

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

NAMES = {  # what fields are called in data sets: our name first, then other people's
    "image": ("image", "original_image", "input_image"),
    "text": ("text", "caption"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction"),
    "conditioning_image": ("conditioning_image", "depth"),
}


@dataclass
class Sample:
    """`image` float32 (3, S, S) in [0, 1]; `extras`: one tensor (C, S, S) a column asked for, cropped like the image:
    pictures in [0, 1] (RGB; one channel for `mask`), 16-bit depth maps and masks, and masks with a palette, (1, S, S)
    with the raw numbers of the file (millimetres in a depth map, ids in an instance mask; 0 is "none")."""

    index: int
    name: str
    image: Tensor
    text: str = ""
    instruction: str = ""
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CorruptSample:
    """A sample that could not be read: the file's name and one line on why."""

    index: int
    file: str
    why: str


class Source(Protocol):
    """A numbered list of samples."""

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """One line for people: what this is and how many samples it holds."""
        ...

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """The samples at `indices` as `size` x `size` pixels. `crops`: one generator a sample that draws its random
        crop; None takes the largest centred square."""
        ...


@dataclass
class Row:
    """A sample before decoding: the bytes of its picture files."""

    image: bytes
    text: str = ""
    instruction: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def words(row: dict[str, Any], key: str, where: str) -> str:
    """Return a text of a line of metadata, "" for none, under one of its NAMES. Raises UserError, naming `where`, for
    anything but a string, and for one with half of a surrogate pair, which no tokenizer takes."""
    name = next((n for n in NAMES[key] if row.get(n) not in (None, "")), key)
    value = row.get(name)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {name} is {one_line(repr(value), 80)}, not a string: put it in quotes")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise UserError(f"{where}: {name} holds {half}, half of a character: write that character again") from None
    return value or ""


def order(source: Source, seed: int, epoch: int) -> np.ndarray:
    """In which order an epoch has the samples: that of the source's own `order`, if it asks for one, else a permutation
    of all of them."""
    own = getattr(source, "order", None)
    found = None if own is None else own(seed, epoch)
    return np.random.default_rng([seed, epoch, 0]).permutation(len(source)) if found is None else found


class PictureSource(ABC):
    """What all sources of picture files share: decoding, cropping, and turning failures into `CorruptSample`. `zoom` is
    that of crops (see crops.draw_square)."""

    zoom: tuple[float, float] = ZOOM

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self) -> str: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call this sample in a report."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """The undecoded sample. Raises OSError or ValueError where it cannot be had."""

    def unused(self) -> list[str]:
        """What lies there and is no sample, by name: pictures that no line of metadata names, captions and masks
        of a tar without their picture."""
        return []

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        return [self._read(i, size, None if crops is None else crops[at]) for at, i in enumerate(indices)]

    @staticmethod
    def decode(row: Row, least: int | None = None) -> tuple[Image.Image, dict[str, Image.Image]]:
        """Return the sample's picture and its columns' pictures, whole. `least` as `crops.load_picture`. Raises what a
        decoder raises on damaged bytes, and ValueError, naming the column, for a fault of a column's picture."""
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
        except Exception as error:  # Pillow's decoders raise nearly every type there is on damaged bytes
            return CorruptSample(index, self.name(index), why_unreadable(error))


def _same_shape(picture: tuple[int, int], other: tuple[int, int], column: str) -> None:
    """A column may have another resolution than its picture, but not another aspect: it would be stretched out of
    register. Raises ValueError where the two differ by more than the rounding of a pixel."""
    if abs(picture[0] * other[1] - picture[1] * other[0]) > max(*picture, *other):
        sizes = f"{other[0]} x {other[1]} px, the picture {picture[0]} x {picture[1]}"
        raise ValueError(f"its {column} has another shape: {sizes}")
