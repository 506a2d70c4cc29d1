"""Which file becomes which: everything about targets is checked before anything is computed."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
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
    inputs: Sequence[Path], out: str | Path, count: int = 1, overwrite: bool = False, beside: Sequence[Path] = ()
) -> list[Job]:
    """Return a job for each picture: to `out` itself where `inputs` is one picture file, else, or if `out` ends in "/",
    to `out`/NAME.png; variants are NAME-0.png, ... `beside` are further files that are read. An input that is named
    twice is read once, with a warning; of inputs that differ in their suffixes alone, the targets have these too.

    Every target is checked before anything is computed. Raises UserError for one that cannot be written or that is an
    input, and for a folder without pictures.
    """
    from ..data.writing import WRITABLE

    named = [file for path in inputs for file in _pictures(path)]
    folder, out = is_folder(out), Path(out)
    into = len(inputs) > 1 or os.path.isdir(inputs[0]) or folder  # also where all of them are one file
    if into and out.suffix.lower() in WRITABLE and not folder:
        what = f"{len(named)} pictures" if len(named) > 1 else "a folder"
        raise BadUsage(f"{out}: is one file for {what}: name a folder after -o")
    sources = _named_once(named)
    read, jobs = {os.path.realpath(path) for path in (*sources, *beside)}, []
    for source, name in zip(sources, _names(sources, count), strict=True):
        targets = _variants(out / f"{name}.png" if into else out, count, overwrite)
        for one in targets:
            if os.path.realpath(one) in read:
                raise UserError(f"{one}: is an input: name another file or folder")
        jobs.append(Job(source, targets))
    return jobs


def is_folder(out: str | Path) -> bool:
    """Whether results go into `out`: it is a folder, or its name ends as that of one."""
    return os.path.isdir(out) or str(out).endswith(("/", os.sep))


def _named_once(sources: Sequence[Path]) -> list[Path]:
    """Leave out, with a warning, what is named again; links have names of their own."""
    found: dict[str, Path] = {}
    for source in sources:
        place = os.path.join(os.path.realpath(source.parent), source.name)
        if found.setdefault(place, source) is not source:
            warnings.warn(f"{source}: is named twice: read once", stacklevel=1)
    return list(found.values())


def _names(sources: Sequence[Path], count: int) -> Iterator[str]:
    """Name the results of each source: its stem, and its suffix or a number where others would be called the same."""
    stems, used, taken = Counter(source.stem for source in sources), Counter[str](), set[str]()
    for source in sources:
        first = name = source.stem if stems[source.stem] == 1 else f"{source.stem}-{source.suffix[1:]}"
        while not taken.isdisjoint(_variant_stems(name, count)):
            used[first] += 1
            name = f"{first}-{used[first] + 1}"
        taken.update(_variant_stems(name, count))
        yield name


def _variant_stems(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}-{number}" for number in range(count)]


def plan_one(
    source: Path, out: str | Path, count: int = 1, overwrite: bool = False, beside: Sequence[Path] = ()
) -> Job:
    """`plan` for a command that takes one file."""
    if os.path.isdir(source):
        raise UserError(f"{source}: is a folder: name one file in it")
    return plan([source], out, count, overwrite, beside)[0]


def plan_new(out: str | Path, name: str, count: int = 1, overwrite: bool = False) -> Job:
    """Where pictures that have no input go: `out`, or `name`.png in it if it is a folder."""
    return Job(None, _variants(Path(out) / f"{name}.png" if is_folder(out) else Path(out), count, overwrite))


def _variants(target: Path, count: int, overwrite: bool) -> list[Path]:
    from ..data.writing import check_writable

    targets = [target.with_stem(stem) for stem in _variant_stems(target.stem, count)]
    for one in targets:
        check_writable(one, overwrite)
    return targets


def _pictures(path: Path) -> list[Path]:
    if not os.path.isdir(path):  # unlike Path.is_dir it answers whatever the name is
        return [path]
    from ..data.images import list_images

    found = list_images(path)
    if not found:
        raise UserError(f"{path}: no pictures in this folder: name one that holds PNG, JPEG, WebP or other pictures")
    return found
