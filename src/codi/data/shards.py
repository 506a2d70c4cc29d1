"""WebDataset shards as files: their names, those that lie elsewhere, and their indexes, kept for the next start.

An index says where in the tar each member's bytes are. It is kept beside the shard or, where nothing can be written,
in the cache folder: $CODI_CACHE, else codi in $XDG_CACHE_HOME or ~/.cache. A remote shard (https://, or what fsspec
opens: s3://, hf://, ...) is fetched into that folder when it is first needed; those used longest ago make room once all
of them take more than $CODI_CACHE_GB (100). An index that was uploaded with its shard saves fetching all of them at the
first start.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

Members = dict[str, dict[str, tuple[int, int]]]  # key -> extension -> offset and length in the tar
MOST_SHARDS = 100_000  # of one data set: the names alone of many more fill the memory
TRIES = 5  # of a download, over half a minute
PAUSE = 600  # seconds for which a shard that could not be fetched is left alone: a server's bad quarter of an hour
STALE = 3600  # seconds without a write, after which a partial download is what a killed process left
SECONDS = 60  # without a byte, after which a connection is given up


def expand(spec: str) -> list[str]:
    """Expand braces as WebDataset has them: "a-{00..02}.{x,y}" -> "a-00.x", "a-00.y", "a-01.x", ... Raises UserError
    for a range that runs backwards and for more than MOST_SHARDS names."""
    parts = re.split(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", spec)
    choices = [_range(part, spec) if at % 2 else [part] for at, part in enumerate(parts)]
    if (count := math.prod(map(len, choices))) > MOST_SHARDS:
        raise UserError(f"{spec}: names {count:,} files: name at most {MOST_SHARDS:,} in one data set")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _range(inside: str, spec: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers.groups()
    if int(first) > int(last):
        raise UserError(f"{spec}: {{{inside}}} runs backwards: write {{{last}..{first}}}")
    if (count := int(last) - int(first) + 1) > MOST_SHARDS:
        raise UserError(f"{spec}: {{{inside}}} names {count:,} files: name at most {MOST_SHARDS:,} in one data set")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def cache_folder() -> Path:
    """Where fetched shards and homeless indexes are kept."""
    if told := os.environ.get("CODI_CACHE"):
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codi"


def open_shard(name: str | Path) -> Shard:
    """A shard by its path or URL. Raises UserError for a URL that nothing here can open."""
    return RemoteShard(str(name)) if "://" in str(name) else Shard(str(name))


class Shard:
    """A tar file. Any number of threads and processes may use it at a time."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        """The file, for reading. Raises OSError."""
        return Path(self.name).open("rb")

    def members(self) -> tuple[Members, str]:
        """What is in it, and why that may not be all: "" for a whole tar; of one that is cut off, what comes before the
        cut. Raises OSError where it cannot be read at all."""
        size, stamp = self._state()
        for text in self._kept():
            with contextlib.suppress(ValueError):  # half of an index is none
                index = _parse_index(text)
                if index["size"] == size and (stamp is None or index["stamp"] in (stamp, None)):
                    return index["members"], index["fault"]
        with self.open() as file:
            members, fault = _walk(file)
        index = {"size": size, "stamp": stamp, "fault": fault, "members": members}
        self._keep(json.dumps(index, separators=(",", ":")))
        return members, fault

    def _state(self) -> tuple[int | None, str | None]:
        """Its size in bytes, and something that changes when it does."""
        told = os.stat(self.name)
        return told.st_size, str(told.st_mtime_ns)

    def _index_files(self) -> list[Path]:
        """Where its index may lie, the better place first."""
        beside = Path(self.name)
        return [
            beside.with_name(index_name(beside.name)),
            cache_folder() / "indexes" / f"{_key(beside.absolute())}.json",
        ]

    def _kept(self) -> Iterator[str]:
        for file in self._index_files():
            with contextlib.suppress(OSError, ValueError):
                yield file.read_text(encoding="utf-8")

    def _keep(self, text: str) -> None:
        for file in self._index_files():
            with contextlib.suppress(OSError):  # it would be made anew at the next start
                return _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


class RemoteShard(Shard):
    """A tar at a URL, fetched when it is first needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lock = threading.RLock()
        self._told: tuple[int | None, str | None] | None = None
        self._failed: OSError | None = None
        self._again = 0.0  # when to ask anew after that, by time.monotonic()
        self._http = name.startswith(("http://", "https://"))
        if not self._http:
            import fsspec

            try:
                self._system, self._path = fsspec.core.url_to_fs(name)
            except (ImportError, ValueError) as error:  # a protocol without its library, or unknown
                why = " ".join(str(error).split()).rstrip(".")
                raise UserError(f"{name}: {why}: install that, or copy the shards to a folder") from error

    def open(self) -> BinaryIO:
        with self._lock:
            if self._failed and time.monotonic() < self._again:
                raise self._failed
            failures = 0
            while True:
                try:
                    file = self._file()
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(file)  # it is not the one used longest ago
                        return file.open("rb")
                    self._fetch(file)
                except OSError as error:
                    failures += 1
                    gone = isinstance(error, FileNotFoundError)
                    if failures == TRIES or gone:
                        self._failed, self._again = error, math.inf if gone else time.monotonic() + PAUSE
                        raise
                    time.sleep(failures**2)

    def _state(self) -> tuple[int | None, str | None]:
        with self._lock:
            if self._told is None:
                told = self._asked()
                marks = (told.get(key) for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created"))
                self._told = told.get("size"), next((str(mark) for mark in marks if mark is not None), None)
            return self._told

    def _asked(self) -> dict[str, Any]:
        """What the server says of it. Raises OSError."""
        if not self._http:
            with _one_kind():
                return self._system.info(self._path)
        try:
            request = urllib.request.Request(self.name, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                length = answer.headers["Content-Length"]
                told = {"size": int(length) if length else None, "ETag": answer.headers["ETag"]}
                return told | {"Last-Modified": answer.headers["Last-Modified"]}
        except urllib.error.HTTPError as error:
            if error.code in (403, 405, 501):  # signed addresses, and servers that know GET alone
                return {}
            missing = error.code in (404, 410)
            raise OSError(errno.ENOENT if missing else errno.EIO, f"{error.code} {error.reason}") from error

    def _fetch(self, file: Path) -> None:
        size, _ = self._state()
        _make_room(size or 0)

        def fill(partial: Path) -> None:
            self._get(self.name if self._http else self._path, partial)
            if size is not None and partial.stat().st_size != size:
                raise OSError(errno.EIO, f"{partial.stat().st_size:,} of {size:,} bytes arrived")

        _replace(file, fill)
        _make_room(0, keep=file)  # other threads and processes may have fetched at the same time

    def _get(self, path: str, to: Path) -> None:
        if self._http:
            with urllib.request.urlopen(path, timeout=SECONDS) as answer, to.open("wb") as out:
                shutil.copyfileobj(answer, out)
        else:
            with _one_kind():
                self._system.get_file(path, str(to))

    def _file(self) -> Path:
        return cache_folder() / "shards" / f"{_key(self.name, *self._state())}-{self.name.rpartition('/')[2]}"

    def _index_files(self) -> list[Path]:
        return [cache_folder() / "indexes" / f"{_key(self.name)}.json"]

    def _kept(self) -> Iterator[str]:
        yield from super()._kept()
        folder, _, base = (self.name if self._http else self._path).rpartition("/")
        uploaded = self._index_files()[0].with_suffix(".uploaded")
        with contextlib.suppress(OSError, ValueError):
            try:
                _replace(uploaded, lambda partial: self._get(f"{folder}/{index_name(base)}", partial))
                text = uploaded.read_text(encoding="utf-8")
            finally:
                uploaded.unlink(missing_ok=True)
            # Its stamp is that of the file that was uploaded: the size has to do.
            text = json.dumps({**_parse_index(text), "stamp": None})
            self._keep(text)
            yield text


def index_name(shard: str) -> str:
    """What the index beside a shard of this name is called."""
    return f".{shard}.index.json"


def _parse_index(text: str) -> dict[str, Any]:
    """Return the index that a JSON text holds. Raises ValueError for anything else: a server may send what it likes."""
    try:
        index = json.loads(text)
        size, members = index["size"], index["members"]
        spans = [span for group in members.values() for span in group.values()]
        fits = all(
            type(offset) is type(length) is int and offset >= 0 and length >= 0 and offset + length <= size
            for offset, length in spans
        )
        if fits and type(size) is int and isinstance(index["fault"], str) and isinstance(index["stamp"], str | None):
            return index
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not an index") from error
    raise ValueError("not an index")


def _walk(file: BinaryIO) -> tuple[Members, str]:
    members: Members = {}
    fault = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if member.isreg() and stem and dot:
                    key = f"{folder}/{stem}" if folder else stem
                    members.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
        file.seek(tar.offset)  # tarfile takes damage between members for the end, which is a block of zeros
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            fault = f"it breaks off after {tar.offset:,} bytes"
    except tarfile.TarError as error:
        fault = str(error)
    if fault:  # the last sample may lack a member, or a part of one
        end = file.seek(0, os.SEEK_END)
        members = {key: m for key, m in list(members.items())[:-1] if all(sum(span) <= end for span in m.values())}
        fault = f"not a whole, uncompressed tar ({fault})"
    return members, fault


def _key(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


def _replace(file: Path, fill: Callable[[Path], object]) -> None:
    """Calls `fill(temporary)`, then renames that to `file`: who reads it meanwhile has the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    for left in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    try:
        fill(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(size: int, keep: Path | None = None) -> None:
    """Remove the least recently used shards, but not `keep`, until `size` more bytes stay below the limit."""
    cached = []
    for file in (cache_folder() / "shards").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes too
            cached.append((file.stat().st_mtime, file.stat().st_size, file))
    room = float(os.environ.get("CODI_CACHE_GB") or 100) * 1e9 - size - sum(length for _, length, _ in cached)
    for modified, length, file in sorted(cached):
        downloading = file.suffix == ".partial" and time.time() - modified < STALE
        if room < 0 and file != keep and not downloading:
            file.unlink(missing_ok=True)
            room += length


@contextlib.contextmanager
def _one_kind() -> Iterator[None]:
    """Within it what a protocol's library raises becomes an OSError: each has errors of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, " ".join(str(error).split()) or type(error).__name__) from error
