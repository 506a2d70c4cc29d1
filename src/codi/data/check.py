"""A look at a data set before training: what is there, what is missing, broken or there twice, what would fail."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from torch import Tensor

from .batches import MIN_READ
from .crops import NUMBERS, why_unreadable
from .decoding import is_deep
from .duplicates import near_groups, perceptual_hash
from .samples import CorruptSample, PictureSource, Sample, Source
from .sources import SceneSource, open_source

SCENES = 256  # looked at where no count is given: they are exact by construction, and rendered for the purpose


@dataclass
class ColumnReport:
    """What a picture column holds beside its pictures. Values are those of the files, 0 left out of low and high."""

    found: int = 0
    missing: list[str] = field(default_factory=list)
    resized: int = 0
    """Of another resolution than their pictures, in the same aspect: they are scaled to fit."""
    bits: list[int] = field(default_factory=list)
    """Bits a channel, each kind that occurs."""
    low: float = 0
    high: float = 0
    zero_share: float = 0.0
    """Share of pixels that are 0: sky in a depth map, nothing in a mask."""
    most_ids: int = 0
    """Most different numbers other than 0 in one file: the instances of a mask."""
    unchanged: int = 0
    """Equal to their picture: an edit that does nothing."""


@dataclass
class DataReport:
    """What `check_data` found. Sides are shorter sides in pixels, words are counted where there are any."""

    source: str
    images: int
    looked: int = 0
    side_min: int = 0
    side_median: int = 0
    side_max: int = 0
    captions_missing: int = 0
    instructions_missing: int = 0
    caption_words: tuple[int, int, int] = (0, 0, 0)
    """Fewest, median, most."""
    instruction_words: tuple[int, int, int] = (0, 0, 0)
    columns: dict[str, ColumnReport] = field(default_factory=dict)
    corrupt: list[CorruptSample] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    """Would have to be enlarged to the training size, which teaches blur."""
    unused: list[str] = field(default_factory=list)
    """There, but no sample: pictures that no line of metadata names, members of a tar without a picture."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of the same bytes."""
    near_duplicates: list[list[str]] = field(default_factory=list)
    """Groups that look alike and are not the same bytes."""

    @property
    def readable(self) -> int:
        """Samples that training can use, if they have what the task needs."""
        return self.looked - len(self.corrupt)

    def faults(self, prompt_column: str = "text", max_corrupt: float = 0.05) -> list[str]:
        """Why training would fail, a phrase each: too much is corrupt, a column is missing or, if
        it holds distances, of two bit depths, or instructions, where `prompt_column` names them, are missing from more
        than the share `max_corrupt`."""
        faults, broken = [], len(self.corrupt)
        if not self.readable:
            faults.append(f"no picture can be read ({self.corrupt[0].file}: {self.corrupt[0].why})")
        elif self.looked >= MIN_READ and broken > max_corrupt * self.looked:
            faults.append(f"{broken} of {self.looked} files are corrupt, more than {max_corrupt:.0%}")
        for name, column in self.columns.items():
            if column.missing:
                lacking, first = len(column.missing), column.missing[0]
                faults.append(f"{lacking} of {self.readable} pictures have no {name} ({first} is the first)")
            mixed = len(column.bits) > 1 and 8 in column.bits
            if mixed and name in NUMBERS and name != "mask":  # ids are ids, of however many bits
                faults.append(f"{name} has files of {' and of '.join(map(str, column.bits))} bits, which do not mix")
        if prompt_column == "instruction" and self.instructions_missing > max_corrupt * self.readable:
            faults.append(f"{self.instructions_missing} of {self.readable} pictures have no instruction")
        return faults


@dataclass
class _Look:
    """One readable sample. `columns`: name -> (bits, low, high, share of 0, distinct numbers, other size, unchanged)"""

    name: str
    side: int
    text: str
    instruction: str
    digest: bytes
    looks: int
    columns: dict[str, tuple[int, float, float, float, int, bool, bool]]


def check_data(
    spec: str | Path,
    columns: Sequence[str] = (),
    size: int = 64,
    count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Reads every sample of `spec` (see `open_source`) in full, or the first `count`; of scenes, where no count is
    given, 256.

    `columns` are the picture columns that the task needs: here a sample may lack them, and is listed. `size`: the side
    of training pictures. `progress` is told (done, all). Raises UserError as `open_source` does.
    """
    source = open_source(spec, optional=columns)
    count = SCENES if count is None and isinstance(source, SceneSource) else count
    looked = len(source) if count is None else min(count, len(source))
    report = DataReport(source.describe(), len(source), looked, columns={c: ColumnReport() for c in columns})
    report.unused = source.unused() if isinstance(source, PictureSource) else []
    looks: list[_Look] = []
    for found in _looks(source, looked, size):
        if isinstance(found, _Look):
            looks.append(found)
            _add(report, found)
        else:
            report.corrupt.append(found)
        if progress is not None:
            progress(len(looks) + len(report.corrupt), looked)
    sides = [look.side for look in looks]
    if sides:
        report.side_min, report.side_median, report.side_max = min(sides), int(median(sides)), max(sides)
    report.too_small = [look.name for look in looks if look.side < size]
    report.caption_words = _words([look.text for look in looks])
    report.instruction_words = _words([look.instruction for look in looks])
    report.duplicates, report.near_duplicates = _repeated(looks)
    return report


def _looks(source: Source, count: int, size: int) -> Iterator[_Look | CorruptSample]:
    """In order. Decoders let other threads run, so that several files are read at a time."""
    if isinstance(source, SceneSource):
        for at in range(0, count, 64):
            for sample in source.read(range(at, min(at + 64, count)), size):
                yield _look_at_scene(sample) if isinstance(sample, Sample) else sample
        return
    assert isinstance(source, PictureSource)
    waiting: deque[Future[_Look | CorruptSample]] = deque()
    known: dict[bytes, _Look] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index in range(count):
            waiting.append(pool.submit(_look_at_files, source, index, known))
            if len(waiting) > 64:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _look_at_files(source: PictureSource, index: int, known: dict[bytes, _Look]) -> _Look | CorruptSample:
    """`known` holds what was found of files before, by their bytes: copies are decoded once."""
    name = source.name(index)
    try:
        row = source.row(index)
        columns = sorted(row.pictures)
        key = " ".join(columns).encode() + b"".join(map(_digest, (row.image, *(row.pictures[c] for c in columns))))
        if key not in known:
            known[key] = _look("", "", "", row.image, *source.decode(row))
        return replace(known[key], name=name, text=row.text, instruction=row.instruction)
    except Exception as error:  # whatever a decoder raises on damaged bytes
        return CorruptSample(index, name, why_unreadable(error))


def _look_at_scene(sample: Sample) -> _Look:
    def picture(pixels: Tensor) -> Image.Image:
        if len(pixels) == 1:
            return Image.fromarray(pixels[0].numpy().astype(np.uint16))
        return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())

    image = picture(sample.image)
    others = {column: picture(pixels) for column, pixels in sample.extras.items()}
    return _look(sample.name, sample.text, sample.instruction, image.tobytes(), image, others)


def _look(
    name: str, text: str, instruction: str, data: bytes, picture: Image.Image, others: dict[str, Image.Image]
) -> _Look:
    columns = {}
    for column, other in others.items():
        grid = np.asarray(other)
        some = grid[grid > 0]
        low, high = (some.min().item(), some.max().item()) if some.size else (0, 0)
        same = other.size == picture.size and other.mode == picture.mode and other.tobytes() == picture.tobytes()
        ids = len(np.unique(some)) if column == "mask" else 0
        zero, resized = 1 - some.size / grid.size, other.size != picture.size
        bits = 32 if other.mode == "F" else 16 if is_deep(other) else 8
        columns[column] = (bits, low, high, zero, ids, resized, same)
    return _Look(name, min(picture.size), text, instruction, _digest(data), perceptual_hash(picture), columns)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _add(report: DataReport, look: _Look) -> None:
    report.captions_missing += not look.text
    report.instructions_missing += not look.instruction
    for name, column in report.columns.items():
        if name not in look.columns:
            column.missing.append(look.name)
            continue
        bits, low, high, zero, ids, resized, same = look.columns[name]
        column.found += 1
        column.bits = sorted({*column.bits, bits})
        column.low = low if column.low == 0 else min(column.low, low or column.low)
        column.high, column.most_ids = max(column.high, high), max(column.most_ids, ids)
        column.zero_share += (zero - column.zero_share) / column.found  # the mean over files, whatever their sizes
        column.resized += resized
        column.unchanged += same


def _words(texts: Sequence[str]) -> tuple[int, int, int]:
    lengths = [len(text.split()) for text in texts if text]
    return (min(lengths), int(median(lengths)), max(lengths)) if lengths else (0, 0, 0)


def _repeated(looks: Sequence[_Look]) -> tuple[list[list[str]], list[list[str]]]:
    """Groups of the same bytes; groups of those, one of each, that look alike."""
    same: dict[bytes, list[_Look]] = {}
    for look in looks:
        same.setdefault(look.digest, []).append(look)
    single = [group[0] for group in same.values()]
    near = [[single[i].name for i in group] for group in near_groups([look.looks for look in single])]
    return [[look.name for look in group] for group in same.values() if len(group) > 1], near


def contact_sheet(images: Sequence[Tensor], columns: int, gap: int = 2) -> Image.Image:
    """Pictures, float (3, H, W) in [0, 1], side by side in rows of `columns`, on white. Sizes may differ: each cell is
    as large as the largest. Raises ValueError for no pictures or no columns."""
    if not len(images) or columns < 1:
        raise ValueError(f"{len(images)} pictures in {columns} columns: at least one of each is needed")
    height, width = max(i.shape[-2] for i in images) + gap, max(i.shape[-1] for i in images) + gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for at, image in enumerate(images):
        top, left = at // columns * height + gap, at % columns * width + gap
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return Image.fromarray(sheet)
