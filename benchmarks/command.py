"""How a result was made: the command as it was typed, less what says where things lie on one machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def public(word: str) -> str:
    """A word of a command line; of a path that is absolute or leads out of the repository (--key=PATH and PATH@PATH
    too), the last part."""
    key, equals, value = word.rpartition("=")
    return key + equals + "@".join(map(_inside, value.split("@")))


def _inside(value: str) -> str:
    path = Path(value)
    return path.name if path.is_absolute() or ".." in path.parts else value


def command_line() -> str:
    """The command that runs this process."""
    return shlex.join(["python", *map(public, sys.argv)])
