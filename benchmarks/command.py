"""The command recorded with a result: as it was typed, without paths of one machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def public(word: str) -> str:
    """Return a word of a command line; absolute paths and paths with `..` (also in --key=PATH and PATH@PATH) become
    their last part."""
    key, equals, value = word.rpartition("=")
    return key + equals + "@".join(map(_last_part_if_local, value.split("@")))


def _last_part_if_local(value: str) -> str:
    path = Path(value)
    return path.name if path.is_absolute() or ".." in path.parts else value


def command_line() -> str:
    """Return the command that runs this process."""
    return shlex.join(["python", *map(public, sys.argv)])
