"""WebDataset shards as a source: few of them or thousands, here or elsewhere, some of them broken."""

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

FEW = 32  # shards, up to which samples come in any order: above, in one that reads a few shards at a time
WINDOW = 8  # shards that are read at a time


@dataclass
class _Index:
    """Of one shard: its samples, key and members each; keys without a picture; why it is not whole, "" if it is."""

    samples: list[tuple[str, dict[str, tuple[int, int]]]]
    strays: list[str]
    fault: str


class TarSource(PictureSource):
    """WebDataset shards: KEY.jpg or KEY.image.jpg (.png, .webp, ...) with KEY.json (`text`, `instruction`) or KEY.txt
    beside it, and KEY.<column>.png for further pictures, .npy too where they hold numbers. Each tar is walked once,
    ever (see `shards`); nothing is unpacked.

    What a broken shard has lost, estimated by the others, counts as corrupt samples."""

    def __init__(
        self, spec: str, shards: Sequence[str | Path], columns: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> None:
        self.spec, self.columns, self.needed = spec, (*columns, *optional), tuple(columns)
        self.shards = [open_shard(shard) for shard in shards]
        self._index = functools.lru_cache(maxsize=2 * FEW)(self._read_index)  # all of few shards, the last of many
        with ThreadPoolExecutor(min(16, len(self.shards))) as pool:  # it is waiting, mostly
            found = list(
                pool.map(
                    lambda number: (len(self._index(number).samples), self._index(number).fault),
                    range(len(self.shards)),
                )
            )
        whole = [count for count, fault in found if not fault]
        faults = [f"{shard}: {fault}" for shard, (_, fault) in zip(self.shards, found, strict=True) if fault]
        if not whole:
            raise UserError(f"{faults[0]}: pack or copy it again")
        typical = int(np.median(whole))
        lost = [max(1, typical - count) if fault else 0 for count, fault in found]
        if faults:
            more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
            warnings.warn(
                f"{faults[0]}{more}: about {sum(lost):,} samples are lost: pack or copy it again", stacklevel=1
            )
        counts = [count + gone for (count, _), gone in zip(found, lost, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._ahead: dict[int, list[int]] = {}  # shard -> those to fetch once it is read
        if not len(self):
            raise UserError(f"{spec}: no pictures in it: name members KEY.jpg or KEY.png, with KEY.json or KEY.txt")

    def _read_index(self, number: int) -> _Index:
        shard, samples, strays = self.shards[number], [], []
        rank = {suffix[1:]: number for number, suffix in enumerate(image_suffixes())}
        try:
            groups, fault = shard.members()
        except OSError as error:
            return _Index([], [], f"cannot be read ({error.strerror or error})")
        for key, members in groups.items():
            found = _pictures(members, rank, self.columns)
            if "image" not in found:
                strays.append(f"{Path(shard.name).name}: {key}")
                continue
            for column in self.needed:
                if column not in found:
                    raise UserError(f"{shard}: {key} has no {column}: add a member {key}.{column}.png")
            samples.append((key, found | {e: members[e] for e in ("json", "txt") if e in members}))
        return _Index(samples, strays, fault)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def unused(self) -> list[str]:
        return [stray for number in range(len(self.shards)) for stray in self._index(number).strays]

    def describe(self) -> str:
        return f"{self.spec}: {len(self):,} pictures in {len(self.shards)} tar file{'s' * (len(self.shards) > 1)}"

    def order(self, seed: int, epoch: int) -> np.ndarray | None:
        """Of many shards: they are shuffled, and then the samples of every eight of them. So eight at a time are read,
        and of remote ones the next eight fetched meanwhile."""
        if len(self.shards) <= FEW:
            return None
        rng = np.random.default_rng([seed, epoch, 0])
        shards = rng.permutation(len(self.shards)).tolist()
        windows = [shards[at : at + WINDOW] for at in range(0, len(shards), WINDOW)]
        self._ahead = {number: after for window, after in zip(windows, windows[1:], strict=False) for number in window}
        starts = self._starts.tolist()
        ranges = [[np.arange(starts[n], starts[n + 1]) for n in window] for window in windows]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in ranges])

    def _at(self, index: int) -> tuple[int, int]:
        """Its shard, and its number there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def name(self, index: int) -> str:
        number, at = self._at(index)
        samples = self._index(number).samples
        return f"{self.shards[number]}/{samples[at][0]}" if at < len(samples) else str(self.shards[number])

    def row(self, index: int) -> Row:
        number, at = self._at(index)
        found, shard = self._index(number), self.shards[number]
        if at >= len(found.samples):
            raise ValueError(found.fault)
        if isinstance(shard, RemoteShard):
            self._fetch_ahead(number)
        data = {}
        with shard.open() as file:  # opened anew each time: a shared file position would not be thread-safe
            for name, (offset, length) in found.samples[at][1].items():
                file.seek(offset)
                data[name] = file.read(length)
        text, instruction = decode_text(data.get("txt", b""), "its txt").strip(), ""
        if "json" in data:
            fields = parse_json(data["json"], "its json", "pack it again")
            text, instruction = words(fields, "text", "its json") or text, words(fields, "instruction", "its json")
        return Row(data["image"], text, instruction, {c: data[c] for c in self.columns if c in data})

    def _fetch_ahead(self, number: int) -> None:
        wanted = self._ahead.get(number)
        if not wanted:
            return
        self._ahead = {n: after for n, after in self._ahead.items() if after is not wanted}

        def fetch() -> None:
            for after in wanted:
                with contextlib.suppress(OSError):  # told when it is read
                    self.shards[after].open().close()

        threading.Thread(target=fetch, name="shards", daemon=True).start()


def _pictures(
    members: dict[str, tuple[int, int]], rank: dict[str, int], columns: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return where the picture ("image") and the columns of a sample are, as far as it has them; of several files for
    one the suffix that comes first in `rank`."""
    by_name: dict[str, dict[str, tuple[int, int]]] = {}
    for extension, span in members.items():
        name, _, suffix = extension.rpartition(".")
        by_name.setdefault(name, {})[suffix] = span
    found = {}
    for column in ("image", *columns):
        names = ("", *NAMES["image"]) if column == "image" else NAMES.get(column, (column,))
        usable = {*rank, "npy"} if column in NUMBERS else rank
        for files in (by_name.get(name, {}) for name in names):
            suffixes = [suffix for suffix in files if suffix in usable]
            if suffixes and column not in found:
                found[column] = files[min(suffixes, key=lambda suffix: rank.get(suffix, len(rank)))]
    return found
