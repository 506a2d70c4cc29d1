"""Recipes: settings dataclasses built from a YAML file and `--key value` overrides."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from ..data.text_files import parse_yaml, read_yaml
from ..errors import UserError, nearest, one_line

S = TypeVar("S")
FORMAT = 2  # of recorded recipes; see current_names
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one ("depth", "flux/depth" for a family)."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_recipes()
    short = path.with_suffix("").as_posix().removeprefix("recipes/")
    if short in known:
        return SHIPPED / f"{short}.yaml"
    raise UserError(f"{name}: no such recipe{nearest(short, known)}: give a YAML file or one of {', '.join(known)}")


def shipped_recipes() -> list[str]:
    """Return the names of all recipes in the package."""
    return sorted(p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read the keys and values of a recipe file. Raises UserError if it is missing or not a YAML mapping."""
    return read_yaml(find_recipe(name))


def current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe with the current name of its objective: before format 2, `codi` was called `paper` and
    `codi-tuned` was called `codi`."""
    objective = recorded.get("objective", "codi")
    if recorded.get("format", 1) < FORMAT:
        objective = {"paper": "codi", "codi": "codi-tuned"}.get(objective, objective)
    return {**recorded, "objective": objective}


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse ["--learning-rate", "1e-4", "--seed=3", "--gradient-checkpointing"] to {"learning_rate": 1e-4, ...}. Raises
    UserError for a word that is no flag."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{one_line(word, 80)}: not a flag: write --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            values[key.replace("-", "_")] = parse_yaml(text)
        except ValueError:  # a path such as @x is no YAML, but a fine string
            values[key.replace("-", "_")] = text
    return values


def build(cls: type[S], values: dict[str, Any], origin: str) -> S:
    """Build a `cls` (a dataclass) from `values`, which error messages call `origin`.

    Raises UserError for an unknown key (with the nearest known one), a value of the wrong type, or a missing value.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            unknown = f"unknown key {one_line(repr(key), 80)}{nearest(key, known)}"
            raise UserError(f"{origin}: {unknown}: known keys are {', '.join(sorted(known))}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{origin}: {name!r} is missing: add a line `{name}: ...`")
    return cls(**{k: _coerce(v, hints[k], f"{origin}: {k}") for k, v in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except ValueError:
                continue
        if kind is str and value is False:  # YAML 1.1 reads `no` as false, as in `precision: no`
            return "no"
        if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if kind in (list, dict) and isinstance(value, kind):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise UserError(f"{where} is {one_line(repr(value), 80)}: should be {names}: change the value")
