"""Check of a data set before training: missing, corrupt and duplicate files, and faults that would stop training."""

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

SCENES = 256  # checked if no count is given, since scenes are exact by construction and must be rendered


@dataclass
class ColumnReport:
    """Statistics of an image column. Values are those of the files; `low` and `high` ignore 0."""

    found: int = 0
    missing: list[str] = field(default_factory=list)
    resized: int = 0
    """Files of another resolution than their image, with the same aspect ratio: they are scaled to fit."""
    bits: list[int] = field(default_factory=list)
    """All occurring numbers of bits per channel."""
    low: float = 0
    high: float = 0
    zero_share: float = 0.0
    """Fraction of pixels that are 0: sky in a depth map, background in a mask."""
    most_ids: int = 0
    """Maximum of distinct nonzero values in one file: the instances of a mask."""
    unchanged: int = 0
    """Files equal to their image: edits without effect."""


@dataclass
class DataReport:
    """Result of `check_data`. Sides are shorter sides in pixels; empty texts do not enter the word counts."""

    source: str
    images: int
    looked: int = 0
    side_min: int = 0
    side_median: int = 0
    side_max: int = 0
    captions_missing: int = 0
    instructions_missing: int = 0
    caption_words: tuple[int, int, int] = (0, 0, 0)
    """Minimum, median, maximum."""
    instruction_words: tuple[int, int, int] = (0, 0, 0)
    columns: dict[str, ColumnReport] = field(default_factory=dict)
    corrupt: list[CorruptSample] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    """Images smaller than the training size: enlarging them would teach blur."""
    unused: list[str] = field(default_factory=list)
    """Files that belong to no sample: images not named in the metadata, members of a tar without an image."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of identical files."""
    near_duplicates: list[list[str]] = field(default_factory=list)
    """Groups of similar images that are not identical files."""

    @property
    def readable(self) -> int:
        """Number of readable samples. They may still lack a column that the task needs."""
        return self.looked - len(self.corrupt)

    def faults(self, prompt_column: str = "text", max_corrupt: float = 0.05) -> list[str]:
        """Return the reasons why training would fail, a phrase each: too many corrupt files, a missing column, mixed
        bit depths in a column of distances, or, if `prompt_column` is "instruction", more than the fraction
        `max_corrupt` of samples without one."""
        faults, broken = [], len(self.corrupt)
        if not self.readable:
            faults.append(f"no picture can be read ({self.corrupt[0].file}: {self.corrupt[0].why})")
        elif self.looked >= MIN_READ and broken > max_corrupt * self.looked:
            faults.append(f"{broken} of {self.looked} files are corrupt, more than {max_corrupt:.0%}")
        for name, column in self.columns.items():
            if column.missing:
                missing, first = len(column.missing), column.missing[0]
                faults.append(f"{missing} of {self.readable} pictures have no {name} ({first} is the first)")
            mixed = len(column.bits) > 1 and 8 in column.bits
            if mixed and name in NUMBERS and name != "mask":  # instance ids do not depend on the bit depth
                faults.append(
                    f"{name} has files of {' and of '.join(map(str, column.bits))} bits, which cannot be mixed"
                )
        if prompt_column == "instruction" and self.instructions_missing > max_corrupt * self.readable:
            faults.append(f"{self.instructions_missing} of {self.readable} pictures have no instruction")
        return faults


@dataclass
class _SampleInfo:
    """Statistics of one readable sample.

    `columns`: name -> (bits, low, high, fraction of 0, distinct values, resized, unchanged)
    """

    name: str
    side: int
    text: str
    instruction: str
    digest: bytes
    phash: int
    columns: dict[str, tuple[int, float, float, float, int, bool, bool]]


def check_data(
    spec: str | Path,
    columns: Sequence[str] = (),
    size: int = 64,
    count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read and check all samples of `spec` (see `open_source`), or the first `count`; of scenes, by default the first
    256.

    `columns` are the image columns that the task needs; samples without them are listed. `size` is the side of training
    images in pixels. `progress` is called with (done, total). Raises UserError as `open_source` does.
    """
    source = open_source(spec, optional=columns)
    count = SCENES if count is None and isinstance(source, SceneSource) else count
    looked = len(source) if count is None else min(count, len(source))
    report = DataReport(source.describe(), len(source), looked, columns={c: ColumnReport() for c in columns})
    report.unused = source.unused() if isinstance(source, PictureSource) else []
    infos: list[_SampleInfo] = []
    for result in _inspect_all(source, looked, size):
        if isinstance(result, _SampleInfo):
            infos.append(result)
            _add(report, result)
        else:
            report.corrupt.append(result)
        if progress is not None:
            progress(len(infos) + len(report.corrupt), looked)
    sides = [info.side for info in infos]
    if sides:
        report.side_min, report.side_median, report.side_max = min(sides), int(median(sides)), max(sides)
    report.too_small = [info.name for info in infos if info.side < size]
    report.caption_words = _word_counts([info.text for info in infos])
    report.instruction_words = _word_counts([info.instruction for info in infos])
    report.duplicates, report.near_duplicates = _duplicates(infos)
    return report


def _inspect_all(source: Source, count: int, size: int) -> Iterator[_SampleInfo | CorruptSample]:
    """Inspect the first `count` samples in order. Several threads decode files, since decoders release the GIL."""
    if isinstance(source, SceneSource):
        for start in range(0, count, 64):
            for sample in source.read(range(start, min(start + 64, count)), size):
                yield _inspect_scene(sample) if isinstance(sample, Sample) else sample
        return
    assert isinstance(source, PictureSource)
    pending: deque[Future[_SampleInfo | CorruptSample]] = deque()
    by_content: dict[bytes, _SampleInfo] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index in range(count):
            pending.append(pool.submit(_inspect_files, source, index, by_content))
            if len(pending) > 64:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _inspect_files(
    source: PictureSource, index: int, by_content: dict[bytes, _SampleInfo]
) -> _SampleInfo | CorruptSample:
    """Inspect one sample. `by_content` maps digests of files to earlier results, so that copies are decoded once."""
    name = source.name(index)
    try:
        row = source.row(index)
        columns = sorted(row.pictures)
        key = " ".join(columns).encode() + b"".join(map(_digest, (row.image, *(row.pictures[c] for c in columns))))
        if key not in by_content:
            by_content[key] = _inspect("", "", "", row.image, *source.decode(row))
        return replace(by_content[key], name=name, text=row.text, instruction=row.instruction)
    except Exception as error:  # decoders raise many types on damaged bytes
        return CorruptSample(index, name, why_unreadable(error))


def _inspect_scene(sample: Sample) -> _SampleInfo:
    def picture(pixels: Tensor) -> Image.Image:
        if len(pixels) == 1:
            return Image.fromarray(pixels[0].numpy().astype(np.uint16))
        return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())

    image = picture(sample.image)
    others = {column: picture(pixels) for column, pixels in sample.extras.items()}
    return _inspect(sample.name, sample.text, sample.instruction, image.tobytes(), image, others)


def _inspect(
    name: str, text: str, instruction: str, data: bytes, picture: Image.Image, others: dict[str, Image.Image]
) -> _SampleInfo:
    columns = {}
    for column, other in others.items():
        grid = np.asarray(other)
        nonzero = grid[grid > 0]
        low, high = (nonzero.min().item(), nonzero.max().item()) if nonzero.size else (0, 0)
        unchanged = other.size == picture.size and other.mode == picture.mode and other.tobytes() == picture.tobytes()
        ids = len(np.unique(nonzero)) if column == "mask" else 0
        zero_share, resized = 1 - nonzero.size / grid.size, other.size != picture.size
        bits = 32 if other.mode == "F" else 16 if is_deep(other) else 8
        columns[column] = (bits, low, high, zero_share, ids, resized, unchanged)
    return _SampleInfo(name, min(picture.size), text, instruction, _digest(data), perceptual_hash(picture), columns)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _add(report: DataReport, info: _SampleInfo) -> None:
    report.captions_missing += not info.text
    report.instructions_missing += not info.instruction
    for name, column in report.columns.items():
        if name not in info.columns:
            column.missing.append(info.name)
            continue
        bits, low, high, zero_share, ids, resized, unchanged = info.columns[name]
        column.found += 1
        column.bits = sorted({*column.bits, bits})
        column.low = low if column.low == 0 else min(column.low, low or column.low)
        column.high, column.most_ids = max(column.high, high), max(column.most_ids, ids)
        column.zero_share += (zero_share - column.zero_share) / column.found  # mean over files, not over pixels
        column.resized += resized
        column.unchanged += unchanged


def _word_counts(texts: Sequence[str]) -> tuple[int, int, int]:
    lengths = [len(text.split()) for text in texts if text]
    return (min(lengths), int(median(lengths)), max(lengths)) if lengths else (0, 0, 0)


def _duplicates(infos: Sequence[_SampleInfo]) -> tuple[list[list[str]], list[list[str]]]:
    """Return groups of identical files, and groups of similar images (one per group of identical files)."""
    identical: dict[bytes, list[_SampleInfo]] = {}
    for info in infos:
        identical.setdefault(info.digest, []).append(info)
    distinct = [group[0] for group in identical.values()]
    near = [[distinct[i].name for i in group] for group in near_groups([info.phash for info in distinct])]
    return [[info.name for info in group] for group in identical.values() if len(group) > 1], near


def contact_sheet(images: Sequence[Tensor], columns: int, gap: int = 2) -> Image.Image:
    """Arrange images, float (3, H, W) in [0, 1], in rows of `columns` on white. Sizes may differ: all cells have the
    size of the largest image. Raises ValueError for no images or no columns."""
    if not len(images) or columns < 1:
        raise ValueError(f"{len(images)} pictures in {columns} columns: at least one of each is needed")
    height, width = max(i.shape[-2] for i in images) + gap, max(i.shape[-1] for i in images) + gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height + gap, number % columns * width + gap
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return Image.fromarray(sheet)
