"""One run at a time in a folder. A lock goes with its process, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError
from . import processes
from .checkpoint import clean

LOCK = ".lock"


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if need be, and then removed again where nothing was left in it. Raises
    UserError `busy` where another process holds it, and for a folder that cannot be written."""
    lock, made = FileLock(folder / LOCK, timeout=0), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: {busy}") from error
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error.strerror}): choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever opened this file cannot take it for the new one
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()
        lock.release()


@contextmanager
def only_run(out: Path, *below: Path) -> Iterator[None]:
    """Keep other trainings out of `out`, and remove there and in `below` what one that was killed left half-written.
    All processes of a training call it; the first one does it."""
    with ExitStack() as stack:
        with processes.together():
            if processes.rank() == 0:
                busy = "another training is at work there: wait for it to end, or give another --out"
                stack.enter_context(locked(out, busy))
                for folder in (out, *below):
                    clean(folder)
        yield
