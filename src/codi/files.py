"""Files and folders that are written whole or not at all, and locks that keep other processes out of a folder."""

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
WRITING = ".writing-"  # how the name of a folder begins that is being written
OLD = f"{WRITING}old-"  # one that a new one is about to replace


def write_file(path: Path, fill: Callable[[Path], Any], durable: bool = True) -> None:
    """Write a file whole or not at all: `fill(temporary)` writes it beside `path`, then it is renamed. Missing folders
    are made. `durable`: flushed to disk before, so that it is whole after a loss of power, too. Raises UserError where
    it cannot be written."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                mode = os.fstat(file.fileno()).st_mode
            fill(temporary)
            temporary.chmod(mode)  # safetensors leaves files to their owner alone
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
    """Write a text as UTF-8, as write_file does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what write_file left in `folder` when it was killed, of files whose names match the regular expression
    `names` in full."""
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.({names})\.[0-9a-f]{{8}}\.tmp", file.name):
            file.unlink(missing_ok=True)


def write_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Call `fill(temporary)` on an empty folder beside `folder`, flush it, then rename it over `folder`. Raises
    UserError where it cannot be written."""
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
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> UserError:
    """Return the error of one line for a file or folder that cannot be written."""
    reason = one_line(getattr(error, "strerror", None) or error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in reason.lower()
    if full:  # safetensors says so in its own way
        return UserError(f"{path}: no space left on the disk: free some, or write elsewhere")
    return UserError(f"{path}: cannot be written ({reason}): check the folder, or write elsewhere")


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of `folder`, which goes with its process, however that ends. The folder is made if need be, and
    then removed again where nothing was left in it. Raises UserError `busy` where another process holds it, and for a
    folder that cannot be written."""
    lock, made = FileLock(folder / LOCK, timeout=0), not folder.exists()
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
        with suppress(OSError):  # while it is held: whoever opened this file cannot take it for the new one
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()
        lock.release()
