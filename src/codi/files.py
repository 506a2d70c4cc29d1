"""Atomic writing of files and folders, and locks that keep other processes out of a folder."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .errors import UserError, one_line

LOCK = ".lock"
WRITING = ".writing-"  # prefix of a folder that is being written
OLD = f"{WRITING}old-"  # prefix of a folder that is being replaced


def write_file(path: Path, fill: Callable[[Path], Any], durable: bool = True) -> None:
    """Write a file atomically: `fill(temporary)` writes it next to `path`, then it is renamed. Missing folders are
    created. `durable` flushes it to disk before, so that it is also complete after a loss of power. Raises UserError if
    it cannot be written."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                mode = os.fstat(file.fileno()).st_mode
            fill(temporary)
            temporary.chmod(mode)  # safetensors makes files readable only for their owner
            if durable:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; see write_file."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove temporary files that a killed write_file left in `folder`, for targets whose names match the regular
    expression `names` in full."""
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.({names})\.[0-9a-f]{{8}}\.tmp", file.name):
            file.unlink(missing_ok=True)


def write_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Call `fill(temporary)` on an empty folder next to `folder`, flush it, then rename it to `folder`, replacing that.
    Raises UserError if it cannot be written."""
    temporary, old = folder.with_name(f"{WRITING}{folder.name}"), folder.with_name(f"{OLD}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> UserError:
    """Return the UserError for a file or folder that cannot be written."""
    reason = one_line(getattr(error, "strerror", None) or error)
    disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in reason.lower()
    if disk_full:  # safetensors reports it only in its message
        return UserError(f"{path}: no space left on the disk: free some, or write elsewhere")
    return UserError(f"{path}: cannot be written ({reason}): check the folder, or write elsewhere")


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of `folder`; the operating system releases it if the process dies. A missing folder is created, and
    removed again if it stays empty. Raises UserError with message `busy` if another process holds the lock, and for a
    folder that cannot be written."""
    lock, created = FileLock(folder / LOCK, timeout=0), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: {busy}") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # while the lock is held, or another process could lock the removed file
            (folder / LOCK).unlink()
            if created:
                folder.rmdir()
        lock.release()
