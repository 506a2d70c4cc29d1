"""Which file becomes which: everything about targets is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .common import BadUsage


@dataclass(frozen=True)
class Job:
    """One input, None where there is none, and where its variants go."""

    source: Path | None
    targets: list[Path]


def plan(
    inputs: Sequence[Path], out: Path, count: int = 1, overwrite: bool = False, beside: Sequence[Path] = ()
) -> list[Job]:
    """Which file becomes which: `out` itself for one picture file, else `out`/NAME.png; variants are
    NAME-0.png, ... `beside` are further files that are read.

    Every target is checked before anything is computed. Raises UserError for one that cannot be written, that is an
    input, or that two inputs share, and for a folder without pictures.
    """
    from ..data.writing import WRITABLE

    sources = [file for path in inputs for file in _pictures(path)]
    into = len(sources) > 1 or inputs[0].is_dir() or out.is_dir()
    if into and out.suffix.lower() in WRITABLE and not out.is_dir():
        raise BadUsage(f"{out}: is one file for {len(sources)} pictures: name a folder after -o")
    jobs, taken = [], {path.resolve(): path for path in (*sources, *beside)}
    for source in sources:
        targets = _variants(out / f"{source.stem}.png" if into else out, count, overwrite)
        for one in targets:
            owner = taken.setdefault(one.resolve(), source)
            if owner.resolve() == one.resolve():
                raise UserError(f"{one}: is an input: name another file or folder")
            if owner is not source:
                raise UserError(f"{one}: {owner} is written there too: rename one of the pictures")
        jobs.append(Job(source, targets))
    return jobs


def plan_one(source: Path, out: Path, count: int = 1, overwrite: bool = False, beside: Sequence[Path] = ()) -> Job:
    """`plan` for a command that takes one file."""
    if source.is_dir():
        raise UserError(f"{source}: is a folder: name one file in it")
    return plan([source], out, count, overwrite, beside)[0]


def plan_new(out: Path, name: str, count: int = 1, overwrite: bool = False) -> Job:
    """Where pictures that have no input go: `out`, or `name`.png in it if it is a folder."""
    return Job(None, _variants(out / f"{name}.png" if out.is_dir() else out, count, overwrite))


def _variants(target: Path, count: int, overwrite: bool) -> list[Path]:
    from ..data.writing import check_writable

    targets = [target] if count == 1 else [target.with_stem(f"{target.stem}-{k}") for k in range(count)]
    for one in targets:
        check_writable(one, overwrite)
    return targets


def _pictures(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    from ..data.images import list_images

    found = list_images(path)
    if not found:
        raise UserError(f"{path}: no pictures in this folder: name one that holds PNG, JPEG, WebP or other pictures")
    return found
