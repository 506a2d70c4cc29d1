"""WebDataset shards as files: expansion of their names, download of remote ones, and stored indexes.

An index holds the offset and length of each member of the tar. It is stored next to the shard or, if that folder is
not writable, in the cache folder: $CODI_CACHE, else codi in $XDG_CACHE_HOME or ~/.cache. A remote shard (https://, or
a protocol of fsspec: s3://, hf://, ...) is downloaded into the cache folder when it is first needed; the least recently
used shards are removed when all of them exceed $CODI_CACHE_GB (100). If the indexes are uploaded next to the shards,
the first start need not download every shard.
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

Members = dict[str, dict[str, tuple[int, int]]]  # key -> extension -> (offset, length) in the tar
MOST_SHARDS = 100_000  # of one data set; the names alone of many more would fill the memory
TRIES = 5  # of a download, over 30 seconds
PAUSE = 600  # seconds before the download of a shard is tried again after TRIES failures
STALE = 3600  # seconds without a write after which a partial download is taken for that of a killed process
SECONDS = 60  # without data after which a connection is given up


def expand(spec: str) -> list[str]:
    """Expand braces as WebDataset does: "a-{00..02}.{x,y}" -> "a-00.x", "a-00.y", "a-01.x", ... Raises UserError
    for a range that runs backwards and for more than MOST_SHARDS names."""
    parts = re.split(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", spec)
    choices = [_range(part, spec) if place % 2 else [part] for place, part in enumerate(parts)]
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
    """Return the folder of downloaded shards, and of indexes that cannot be stored next to their shard."""
    if folder := os.environ.get("CODI_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codi"


def open_shard(name: str | Path) -> Shard:
    """Return the shard at a path or URL. Raises UserError for a URL whose protocol is not supported."""
    return RemoteShard(str(name)) if "://" in str(name) else Shard(str(name))


class Shard:
    """A tar file. Safe for use by several threads and processes at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        """Open the file for reading. Raises OSError."""
        return Path(self.name).open("rb")

    def members(self) -> tuple[Members, str]:
        """Return the members and the fault, "" for a complete tar; of a truncated one, the members before the cut.
        Raises OSError if it cannot be read at all."""
        size, stamp = self._size_and_stamp()
        for text in self._stored_indexes():
            with contextlib.suppress(ValueError):  # a truncated index is not used
                index = _parse_index(text)
                if index["size"] == size and (stamp is None or index["stamp"] in (stamp, None)):
                    return index["members"], index["fault"]
        with self.open() as file:
            members, fault = _walk(file)
        index = {"size": size, "stamp": stamp, "fault": fault, "members": members}
        self._store_index(json.dumps(index, separators=(",", ":")))
        return members, fault

    def _size_and_stamp(self) -> tuple[int | None, str | None]:
        """Return the size in bytes, and a stamp that changes whenever the file does."""
        status = os.stat(self.name)
        return status.st_size, str(status.st_mtime_ns)

    def _index_files(self) -> list[Path]:
        """Return the possible paths of the index, the preferred one first."""
        shard = Path(self.name)
        return [
            shard.with_name(index_name(shard.name)),
            cache_folder() / "indexes" / f"{_key(shard.absolute())}.json",
        ]

    def _stored_indexes(self) -> Iterator[str]:
        """Yield the indexes stored by earlier starts, as text."""
        for file in self._index_files():
            with contextlib.suppress(OSError, ValueError):
                yield file.read_text(encoding="utf-8")

    def _store_index(self, text: str) -> None:
        for file in self._index_files():
            with contextlib.suppress(OSError):  # if none is writable, the next start reads the tar again
                return _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


class RemoteShard(Shard):
    """A tar at a URL, downloaded when it is first needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lock = threading.RLock()
        self._cached_state: tuple[int | None, str | None] | None = None
        self._failure: OSError | None = None
        self._retry_at = 0.0  # time.monotonic() before which `_failure` is raised again
        self._http = name.startswith(("http://", "https://"))
        if not self._http:
            import fsspec

            try:
                self._system, self._path = fsspec.core.url_to_fs(name)
            except (ImportError, ValueError) as error:  # an unknown protocol, or one whose library is missing
                why = " ".join(str(error).split()).rstrip(".")
                raise UserError(f"{name}: {why}: install that, or copy the shards to a folder") from error

    def open(self) -> BinaryIO:
        with self._lock:
            if self._failure and time.monotonic() < self._retry_at:
                raise self._failure
            failures = 0
            while True:
                try:
                    file = self._file()
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(file)  # marks it as recently used
                        return file.open("rb")
                    self._fetch(file)
                except OSError as error:
                    failures += 1
                    missing = isinstance(error, FileNotFoundError)
                    if failures == TRIES or missing:
                        self._failure, self._retry_at = error, math.inf if missing else time.monotonic() + PAUSE
                        raise
                    time.sleep(failures**2)

    def _size_and_stamp(self) -> tuple[int | None, str | None]:
        with self._lock:
            if self._cached_state is None:
                info = self._info()
                marks = (info.get(key) for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created"))
                self._cached_state = info.get("size"), next((str(mark) for mark in marks if mark is not None), None)
            return self._cached_state

    def _info(self) -> dict[str, Any]:
        """Return the server's size and time stamps of the shard. Raises OSError."""
        if not self._http:
            with _as_os_error():
                return self._system.info(self._path)
        try:
            request = urllib.request.Request(self.name, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                length = response.headers["Content-Length"]
                info = {"size": int(length) if length else None, "ETag": response.headers["ETag"]}
                return info | {"Last-Modified": response.headers["Last-Modified"]}
        except urllib.error.HTTPError as error:
            if error.code in (403, 405, 501):  # signed URLs, and servers that support only GET
                return {}
            not_found = error.code in (404, 410)
            raise OSError(errno.ENOENT if not_found else errno.EIO, f"{error.code} {error.reason}") from error

    def _fetch(self, file: Path) -> None:
        size, _ = self._size_and_stamp()
        _make_room(size or 0)

        def fill(partial: Path) -> None:
            self._get(self.name if self._http else self._path, partial)
            if size is not None and partial.stat().st_size != size:
                raise OSError(errno.EIO, f"{partial.stat().st_size:,} of {size:,} bytes arrived")

        _replace(file, fill)
        _make_room(0, keep=file)  # other threads and processes may have downloaded at the same time

    def _get(self, path: str, to: Path) -> None:
        if self._http:
            with urllib.request.urlopen(path, timeout=SECONDS) as response, to.open("wb") as out:
                shutil.copyfileobj(response, out)
        else:
            with _as_os_error():
                self._system.get_file(path, str(to))

    def _file(self) -> Path:
        return cache_folder() / "shards" / f"{_key(self.name, *self._size_and_stamp())}-{self.name.rpartition('/')[2]}"

    def _index_files(self) -> list[Path]:
        return [cache_folder() / "indexes" / f"{_key(self.name)}.json"]

    def _stored_indexes(self) -> Iterator[str]:
        yield from super()._stored_indexes()
        folder, _, base = (self.name if self._http else self._path).rpartition("/")
        uploaded = self._index_files()[0].with_suffix(".uploaded")
        with contextlib.suppress(OSError, ValueError):
            try:
                _replace(uploaded, lambda partial: self._get(f"{folder}/{index_name(base)}", partial))
                text = uploaded.read_text(encoding="utf-8")
            finally:
                uploaded.unlink(missing_ok=True)
            # Its stamp is that of the original file, so only the size is compared.
            text = json.dumps({**_parse_index(text), "stamp": None})
            self._store_index(text)
            yield text


def index_name(shard: str) -> str:
    """Return the file name of the index next to a shard of this name."""
    return f".{shard}.index.json"


def _parse_index(text: str) -> dict[str, Any]:
    """Parse and check an index, which may come from a server. Raises ValueError for anything else."""
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
    """Read all headers of a tar; return its members and its fault, as Shard.members does."""
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
        file.seek(tar.offset)  # tarfile takes damage between members for the end, which must be a block of zeros
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            fault = f"it breaks off after {tar.offset:,} bytes"
    except tarfile.TarError as error:
        fault = str(error)
    if fault:  # the last sample may be incomplete
        end = file.seek(0, os.SEEK_END)
        members = {key: m for key, m in list(members.items())[:-1] if all(sum(span) <= end for span in m.values())}
        fault = f"not a whole, uncompressed tar ({fault})"
    return members, fault


def _key(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


def _replace(file: Path, fill: Callable[[Path], object]) -> None:
    """Call `fill(temporary)`, then rename that to `file`: concurrent readers see either the old or the new file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE:
                leftover.unlink()
    try:
        fill(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(size: int, keep: Path | None = None) -> None:
    """Remove the least recently used shards, except `keep`, until `size` more bytes fit below the limit."""
    cached = []
    for file in (cache_folder() / "shards").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            cached.append((file.stat().st_mtime, file.stat().st_size, file))
    room = float(os.environ.get("CODI_CACHE_GB") or 100) * 1e9 - size - sum(length for _, length, _ in cached)
    for modified, length, file in sorted(cached):
        downloading = file.suffix == ".partial" and time.time() - modified < STALE
        if room < 0 and file != keep and not downloading:
            file.unlink(missing_ok=True)
            room += length


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn all exceptions into OSError, since each protocol's library has its own types."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, " ".join(str(error).split()) or type(error).__name__) from error
