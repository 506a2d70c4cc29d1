"""A lock that lets one training run at a time use a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..files import locked
from . import processes
from .checkpoint import clean


@contextmanager
def only_run(out: Path, *below: Path) -> Iterator[None]:
    """Lock `out` against other trainings; remove there and in `below` files that a killed one left half-written.
    All processes of a training call it; the first one locks."""
    with ExitStack() as stack:
        with processes.sharing_errors():
            if processes.rank() == 0:
                busy = "another training is at work there: wait for it to end, or give another --out"
                stack.enter_context(locked(out, busy))
                for folder in (out, *below):
                    clean(folder)
        yield
