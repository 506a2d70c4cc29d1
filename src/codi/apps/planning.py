"""Plan which output files each input file gives; every target is checked before anything is computed."""

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
    """One input file (None for a picture without input) and the files of its variants."""

    source: Path | None
    targets: list[Path]


def plan(
    inputs: Sequence[Path], out: str | Path, count: int = 1, overwrite: bool = False, other_inputs: Sequence[Path] = ()
) -> list[Job]:
    """Return a job for each picture.

    The target is `out` itself where `inputs` is one picture file and `out` no folder, else `out`/NAME.png; variants are
    NAME-0.png, ... `other_inputs`: further files that are read. Duplicate inputs are read once, with a warning; inputs
    that differ only in their suffix keep it in the names of their targets.

    Raises UserError for a target that cannot be written or that is an input, and for a folder without pictures.
    """
    from ..data.writing import WRITABLE

    files = [file for path in inputs for file in _pictures(path)]
    folder, out = is_folder(out), Path(out)
    is_directory = len(inputs) > 1 or os.path.isdir(inputs[0]) or folder  # also where all inputs are the same file
    if is_directory and out.suffix.lower() in WRITABLE and not folder:
        description = f"{len(files)} pictures" if len(files) > 1 else "a folder"
        raise BadUsage(f"{out}: is one file for {description}: name a folder after -o")
    sources = _without_duplicates(files)
    inputs_read, jobs = {os.path.realpath(path) for path in (*sources, *other_inputs)}, []
    for source, name in zip(sources, _names(sources, count), strict=True):
        targets = _variants(out / f"{name}.png" if is_directory else out, count, overwrite)
        for target in targets:
            if os.path.realpath(target) in inputs_read:
                raise UserError(f"{target}: is an input: name another file or folder")
        jobs.append(Job(source, targets))
    return jobs


def is_folder(out: str | Path) -> bool:
    """Return True if `out` is an existing folder, or ends in a slash."""
    return os.path.isdir(out) or str(out).endswith(("/", os.sep))


def _without_duplicates(sources: Sequence[Path]) -> list[Path]:
    """Return the sources without duplicates, with a warning for each; a link to a file is not a duplicate of it."""
    sources_by_path: dict[str, Path] = {}
    for source in sources:
        path = os.path.join(os.path.realpath(source.parent), source.name)
        if sources_by_path.setdefault(path, source) is not source:
            warnings.warn(f"{source}: is named twice: read once", stacklevel=1)
    return list(sources_by_path.values())


def _names(sources: Sequence[Path], count: int) -> Iterator[str]:
    """Yield a unique name for the results of each source: its stem, with its suffix or a number where names clash."""
    stems, used, taken = Counter(source.stem for source in sources), Counter[str](), set[str]()
    for source in sources:
        base = name = source.stem if stems[source.stem] == 1 else f"{source.stem}-{source.suffix[1:]}"
        while not taken.isdisjoint(_variant_stems(name, count)):
            used[base] += 1
            name = f"{base}-{used[base] + 1}"
        taken.update(_variant_stems(name, count))
        yield name


def _variant_stems(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}-{number}" for number in range(count)]


def plan_one(
    source: Path, out: str | Path, count: int = 1, overwrite: bool = False, other_inputs: Sequence[Path] = ()
) -> Job:
    """Return the job of a command that takes one file, as `plan` does."""
    if os.path.isdir(source):
        raise UserError(f"{source}: is a folder: name one file in it")
    return plan([source], out, count, overwrite, other_inputs)[0]


def plan_new(out: str | Path, name: str, count: int = 1, overwrite: bool = False) -> Job:
    """Return the job of pictures without input: `out` itself, or `out`/`name`.png if `out` is a folder."""
    return Job(None, _variants(Path(out) / f"{name}.png" if is_folder(out) else Path(out), count, overwrite))


def _variants(target: Path, count: int, overwrite: bool) -> list[Path]:
    from ..data.writing import check_writable

    targets = [target.with_stem(stem) for stem in _variant_stems(target.stem, count)]
    for path in targets:
        check_writable(path, overwrite)
    return targets


def _pictures(path: Path) -> list[Path]:
    if not os.path.isdir(path):  # unlike Path.is_dir, never raises
        return [path]
    from ..data.images import list_images

    pictures = list_images(path)
    if not pictures:
        raise UserError(f"{path}: no pictures in this folder: name one that holds PNG, JPEG, WebP or other pictures")
    return pictures
