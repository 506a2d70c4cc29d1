"""Training batches: an endless stream of samples that is a pure function of (seed, position)."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .samples import CorruptSample, Sample, Source, order
from .writing import write_whole

MIN_READ = 20  # distinct files to read before the fraction of corrupt ones is tested


@dataclass
class Batch:
    """`image` float32 (B, 3, S, S) in [0, 1], `text` and `instruction` one string a sample, `extras` the columns of
    `Sample.extras` stacked to (B, C, S, S), `index` the samples' numbers in the source."""

    image: Tensor
    text: list[str]
    extras: dict[str, Tensor] = field(default_factory=dict)
    index: list[int] = field(default_factory=list)
    instruction: list[str] = field(default_factory=list)

    def part(self, which: slice) -> Batch:
        """Return the samples of the slice `which` as a batch."""
        extras = {name: column[which] for name, column in self.extras.items()}
        return Batch(self.image[which], self.text[which], extras, self.index[which], self.instruction[which])


def batches(
    source: Source,
    batch_size: int,
    size: int,
    seed: int,
    start: int = 0,
    report: str | Path | None = None,
    max_corrupt: float = 0.05,
    prefetch: bool = False,
    stride: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield an endless stream of batches of `size` x `size` pixels.

    Position p (counted in images from 0) holds sample `order[p mod n]` of epoch `p div n`; the order is drawn from a
    random stream keyed by (`seed`, epoch), the crop from one keyed by (`seed`, p). So `start=p` continues exactly where
    a run that had drawn p images stopped, for any batch size. A batch starts `stride` positions after the previous one
    (by default where that one ended), so that several processes can share a stream.

    A corrupt file is replaced by the next readable one in order. `report` names a JSON file that lists them:
    {"read": distinct files read, "skipped": ..., "files": [{"file", "why"}]}. `prefetch` prepares up to two batches in
    a thread; close the generator to end it. Raises UserError for arguments out of range, and while drawing if more
    than the fraction `max_corrupt` of at least 20 distinct files is corrupt, or if no file is readable.
    """
    for name, value, least in (
        ("batch size", batch_size, 1),
        ("size", size, 1),
        ("seed", seed, 0),
        ("start", start, 0),
        ("stride", batch_size if stride is None else stride, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: too small: give at least {least}")
    stream = _Stream(source, size, seed, None if report is None else Path(report), max_corrupt)
    generator = _draw(stream, batch_size, start, stride or batch_size)
    return _prefetched(generator) if prefetch else generator


def _draw(stream: _Stream, batch_size: int, start: int, stride: int) -> Generator[Batch, None, None]:
    position = start
    try:
        while True:
            yield collate(stream.at(range(position, position + batch_size)))
            position += stride
    finally:
        stream.write_report()


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of the same size into a batch. Raises UserError if the shapes of a column differ."""
    extras: dict[str, Tensor] = {}
    for column in samples[0].extras:
        grids = [s.extras[column] for s in samples]
        for grid, sample in zip(grids, samples, strict=True):
            if grid.shape != grids[0].shape:
                raise UserError(f"{sample.name}: its {column} differs in bit depth from other samples: convert it")
        extras[column] = torch.stack(grids)
    return Batch(
        image=torch.stack([s.image for s in samples]),
        text=[s.text for s in samples],
        extras=extras,
        index=[s.index for s in samples],
        instruction=[s.instruction for s in samples],
    )


class _Stream:
    """Samples by position. Remembers corrupt files, which saves reading them again but changes no result."""

    def __init__(self, source: Source, size: int, seed: int, report: Path | None, max_corrupt: float) -> None:
        self.source, self.size, self.seed = source, size, seed
        self.report, self.max_corrupt = report, max_corrupt
        self.read: set[int] = set()
        self.corrupt: dict[int, CorruptSample] = {}
        self._order = (-1, np.empty(0, int))

    def item(self, position: int) -> int:
        """Return the source index of the sample at `position`."""
        epoch, offset = divmod(position, len(self.source))
        if self._order[0] != epoch:
            self._order = epoch, order(self.source, self.seed, epoch)
        return int(self._order[1][offset])

    def at(self, positions: range) -> list[Sample]:
        """Return the samples at `positions`; a corrupt one is replaced by the next readable one."""
        samples: dict[int, Sample] = {}
        pending = {p: p for p in positions}  # position -> position to read its sample from
        while pending:
            for position, candidate in pending.items():
                while self.item(candidate) in self.corrupt:
                    candidate += 1
                pending[position] = candidate
            crops = [np.random.default_rng([self.seed, p, 1]) for p in pending]
            results = self.source.read([self.item(candidate) for candidate in pending.values()], self.size, crops)
            previous = len(self.corrupt)
            for position, result in zip(list(pending), results, strict=True):
                self.read.add(result.index)
                if isinstance(result, Sample):
                    samples[position] = result
                    del pending[position]
                else:
                    self.corrupt[result.index] = result
            if len(self.corrupt) > previous:
                self.write_report()
            if self.corrupt:
                self._judge()
        return [samples[p] for p in positions]

    def _judge(self) -> None:
        # Until all files are read the fraction is an estimate: subtract a one-sided 95 % margin, or an unlucky start
        # would stop a run on a data set that is well below the limit.
        complete = len(self.read) == len(self.source)
        margin = 0 if complete else 1.64 * len(self.corrupt) ** 0.5
        corrupt = list(self.corrupt.values())
        judge(corrupt, len(self.read), len(self.source), self.max_corrupt, self.report, margin)

    def write_report(self) -> None:
        if self.report is not None:
            report_corrupt(self.report, len(self.read), [c for _, c in sorted(self.corrupt.items())])


def judge(
    corrupt: Sequence[CorruptSample],
    read: int,
    count: int,
    max_corrupt: float,
    report: Path | None = None,
    margin: float = 0.0,
) -> None:
    """Raise UserError if all `count` files are corrupt or if, after at least 20 were `read`, the number of corrupt ones
    less `margin` is more than the fraction `max_corrupt`. The message names the first corrupt file and `report`."""
    if not corrupt:
        return
    first = corrupt[0]
    if len(corrupt) == count:
        raise UserError(f"{first.file}: {first.why}; no other file is readable either: check the data set")
    if read >= MIN_READ and (len(corrupt) - margin) / read > max_corrupt:
        raise UserError(
            f"{first.file}: {first.why}; {len(corrupt)} of {read} files are corrupt, more than "
            f"{max_corrupt:.0%}: repair or remove them" + (f" (list in {report})" if report else "")
        )


def report_corrupt(path: Path, read: int, corrupt: Sequence[CorruptSample]) -> None:
    """Write the report described in `batches`, atomically. Raises UserError if it cannot be written."""
    files = [{"file": c.file, "why": c.why} for c in corrupt]
    content = {"read": read, "skipped": len(files), "files": files}
    write_whole(path, [json.dumps(content, indent=1).encode() + b"\n"])


def _prefetched(generator: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Yield the batches of `generator`, up to two of them prepared in a thread. Errors are raised in their order."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            while not stop.is_set():
                put(next(generator))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
        generator.close()
