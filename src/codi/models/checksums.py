"""Checksums of the files of an adapter or a checkpoint, to detect missing and damaged files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def checksums(folder: Path, apart: str) -> dict[str, str]:
    """Return {path within `folder`: SHA-256} of all its files except `apart`, the file that will hold the list."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: checksum(file) for name, file in names.items() if name != apart}


def find_fault(folder: Path, files: Any) -> str | None:
    """Return a message that says how the files differ from those that `checksums` listed, or None."""
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        return "its list of files is invalid"
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its list of files names {name}, which is outside the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != expected:
            return f"{name} was altered or damaged since it was written"
    return None
