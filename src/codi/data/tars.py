"""WebDataset shards as a source of samples: local or remote, any number of them, some possibly broken."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .crops import NUMBERS
from .formats import image_suffixes
from .samples import NAMES, PictureSource, Row, words
from .shards import RemoteShard, open_shard
from .text_files import decode_text, parse_json

FULL_SHUFFLE = 32  # up to this many shards all samples are shuffled together; above, WINDOW shards at a time
WINDOW = 8  # shards that are read at a time


@dataclass
class _Index:
    """Content of one shard: samples as (key, members), keys without an image, and a fault, "" if it is complete."""

    samples: list[tuple[str, dict[str, tuple[int, int]]]]
    without_image: list[str]
    fault: str


class TarSource(PictureSource):
    """WebDataset shards: KEY.jpg or KEY.image.jpg (.png, .webp, ...) with KEY.json (`text`, `instruction`) or KEY.txt
    beside it, and KEY.<column>.png for further images, or .npy for columns of numbers. Each tar is indexed once, and
    the index is stored (see `shards`); nothing is unpacked.

    The samples that a broken shard has lost, estimated from the other shards, count as corrupt samples."""

    def __init__(
        self, spec: str, shards: Sequence[str | Path], columns: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> None:
        self.spec, self.columns, self.needed = spec, (*columns, *optional), tuple(columns)
        self.shards = [open_shard(shard) for shard in shards]
        # Large enough for every index where all samples are shuffled together.
        self._index = functools.lru_cache(maxsize=2 * FULL_SHUFFLE)(self._read_index)
        with ThreadPoolExecutor(min(16, len(self.shards))) as pool:  # mostly waits for input
            indexes = list(
                pool.map(
                    lambda number: (len(self._index(number).samples), self._index(number).fault),
                    range(len(self.shards)),
                )
            )
        complete = [count for count, fault in indexes if not fault]
        faults = [f"{shard}: {fault}" for shard, (_, fault) in zip(self.shards, indexes, strict=True) if fault]
        if not complete:
            raise UserError(f"{faults[0]}: pack or copy it again")
        typical = int(np.median(complete))
        lost = [max(1, typical - count) if fault else 0 for count, fault in indexes]
        if faults:
            more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
            warnings.warn(
                f"{faults[0]}{more}: about {sum(lost):,} samples are lost: pack or copy it again", stacklevel=1
            )
        counts = [count + missing for (count, _), missing in zip(indexes, lost, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._prefetch: dict[int, list[int]] = {}  # shard -> shards to fetch as soon as it is read
        if not len(self):
            raise UserError(f"{spec}: no pictures in it: name members KEY.jpg or KEY.png, with KEY.json or KEY.txt")

    def _read_index(self, number: int) -> _Index:
        shard, samples, without_image = self.shards[number], [], []
        rank = {suffix[1:]: place for place, suffix in enumerate(image_suffixes())}
        try:
            groups, fault = shard.members()
        except OSError as error:
            return _Index([], [], f"cannot be read ({error.strerror or error})")
        for key, members in groups.items():
            images = _image_members(members, rank, self.columns)
            if "image" not in images:
                without_image.append(f"{Path(shard.name).name}: {key}")
                continue
            for column in self.needed:
                if column not in images:
                    raise UserError(f"{shard}: {key} has no {column}: add a member {key}.{column}.png")
            samples.append((key, images | {e: members[e] for e in ("json", "txt") if e in members}))
        return _Index(samples, without_image, fault)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def unused(self) -> list[str]:
        return [name for number in range(len(self.shards)) for name in self._index(number).without_image]

    def describe(self) -> str:
        return f"{self.spec}: {len(self):,} pictures in {len(self.shards)} tar file{'s' * (len(self.shards) > 1)}"

    def order(self, seed: int, epoch: int) -> np.ndarray | None:
        """Return the sample order of an epoch for more than FULL_SHUFFLE shards, else None: shards are shuffled, then
        the samples within each group of WINDOW shards. So only WINDOW shards are read at a time, while the next ones
        are fetched if they are remote."""
        if len(self.shards) <= FULL_SHUFFLE:
            return None
        rng = np.random.default_rng([seed, epoch, 0])
        shards = rng.permutation(len(self.shards)).tolist()
        windows = [shards[start : start + WINDOW] for start in range(0, len(shards), WINDOW)]
        self._prefetch = {shard: after for window, after in zip(windows, windows[1:], strict=False) for shard in window}
        starts = self._starts.tolist()
        ranges = [[np.arange(starts[n], starts[n + 1]) for n in window] for window in windows]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in ranges])

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the sample's shard, and the sample's number within it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def name(self, index: int) -> str:
        number, position = self._locate(index)
        samples = self._index(number).samples
        return f"{self.shards[number]}/{samples[position][0]}" if position < len(samples) else str(self.shards[number])

    def row(self, index: int) -> Row:
        number, position = self._locate(index)
        content, shard = self._index(number), self.shards[number]
        if position >= len(content.samples):
            raise ValueError(content.fault)
        if isinstance(shard, RemoteShard):
            self._prefetch_after(number)
        data = {}
        with shard.open() as file:  # per call, since a shared file position would not be thread-safe
            for name, (offset, length) in content.samples[position][1].items():
                file.seek(offset)
                data[name] = file.read(length)
        text, instruction = decode_text(data.get("txt", b""), "its txt").strip(), ""
        if "json" in data:
            fields = parse_json(data["json"], "its json", "pack it again")
            text, instruction = words(fields, "text", "its json") or text, words(fields, "instruction", "its json")
        return Row(data["image"], text, instruction, {c: data[c] for c in self.columns if c in data})

    def _prefetch_after(self, number: int) -> None:
        """Fetch the next window of shards in a thread, when the first shard of the window before it is read."""
        following = self._prefetch.get(number)
        if not following:
            return
        self._prefetch = {shard: after for shard, after in self._prefetch.items() if after is not following}

        def fetch() -> None:
            for shard in following:
                with contextlib.suppress(OSError):  # raised again when the shard is read
                    self.shards[shard].open().close()

        threading.Thread(target=fetch, name="shards", daemon=True).start()


def _image_members(
    members: dict[str, tuple[int, int]], rank: dict[str, int], columns: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the (offset, length) of a sample's image ("image") and of its columns, as far as they exist. Of several
    files for the same column, the one whose suffix comes first in `rank` is used."""
    by_name: dict[str, dict[str, tuple[int, int]]] = {}
    for extension, span in members.items():
        name, _, suffix = extension.rpartition(".")
        by_name.setdefault(name, {})[suffix] = span
    selected = {}
    for column in ("image", *columns):
        names = ("", *NAMES["image"]) if column == "image" else NAMES.get(column, (column,))
        usable = {*rank, "npy"} if column in NUMBERS else rank
        for files in (by_name.get(name, {}) for name in names):
            suffixes = [suffix for suffix in files if suffix in usable]
            if suffixes and column not in selected:
                selected[column] = files[min(suffixes, key=lambda suffix: rank.get(suffix, len(rank)))]
    return selected
