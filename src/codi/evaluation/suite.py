"""Suites of a benchmark: which methods, trained how, measured at which steps. A YAML file (see suites/mini.yaml)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.text_files import read_yaml
from ..errors import UserError, nearest, one_line

SUITES = Path(__file__).resolve().parents[1] / "suites"
WARMUP = 1000  # images, of recipes that do not say
REFERS = ("start", "teacher", "model")  # recipe keys that may be `previous`: what the stage before made


@dataclass(frozen=True)
class Stage:
    """One training: the recipe's keys, and which of them are what the stage before made."""

    recipe: dict[str, Any]
    refers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One method on one task with one training seed."""

    task: str
    method: str
    seed: int
    stages: tuple[Stage, ...]
    steps: tuple[int, ...]
    solver: str | None = None
    shift: float = 1.0  # of the time grid
    setting: dict[str, Any] = field(default_factory=dict)  # of the task, for all methods

    def key(self, upto: int | None = None) -> str:
        """Tells trainings apart: equal for equal chains of stages, `upto` how many of them (None: all)."""
        return _hash([[stage.recipe, stage.refers] for stage in self.stages[:upto]] or self.setting)

    def measure(self, suite: Suite, steps: int) -> str:
        """Tells apart pictures for measuring: equal for equal trainings, samplers and held-out pictures."""
        return _hash([self.key(), self.setting, self.solver, self.shift, suite.held_out, steps])


@dataclass(frozen=True)
class Suite:
    """What `load_suite` reads, as it stands in the file."""

    name: str
    images: int
    seeds: int
    count: int
    data: str
    held_out: str
    base: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    quick: dict[str, Any] = field(default_factory=dict)
    about: str = ""  # what readers of its tables must know

    def quickly(self) -> Suite:
        """The same at the size that `quick` names: fewer images, pictures, seeds, steps and tasks."""
        changes = dict(self.quick)
        tasks, steps = changes.pop("tasks", list(self.tasks)), changes.pop("steps", None)
        methods = copy.deepcopy(self.methods)
        for method in methods.values():
            method["steps"] = [n for n in method.get("steps", (1, 2, 4)) if steps is None or n in steps or not n]
        kept = {task: self.tasks[task] for task in tasks}
        return Suite(**{**vars(self), **changes, "tasks": kept, "methods": methods})

    def plans(self, tasks: Sequence[str] = (), rows: Sequence[str] = (), steps: Sequence[int] = ()) -> Iterator[Plan]:
        """All of them, or those of these tasks and methods at these of their step counts; first seeds first, so that
        tables fill up evenly.

        Raises UserError for a name that the suite does not have.
        """
        for asked, known, what in ((tasks, self.tasks, "task"), (rows, self.methods, "row")):
            for name in asked:
                if name not in known:
                    raise UserError(
                        f"{what} {name!r}: not in suite {self.name}{nearest(name, known)}: use {', '.join(known)}"
                    )
        for seed in range(self.seeds):
            for task in tasks or self.tasks:
                for name in rows or self.methods:
                    method = self.methods[name]
                    if (seed and not method.get("headline")) or task not in method.get("tasks", self.tasks):
                        continue
                    stages = tuple(self._stage(task, *told, seed) for told in enumerate(method["stages"]))
                    measured = tuple(n for n in method.get("steps", (1, 2, 4)) if not steps or n in steps)
                    if measured:
                        sampler = {key: method[key] for key in ("solver", "shift") if key in method}
                        setting = self.base | self.tasks[task]
                        yield Plan(task, name, seed, stages, measured, **sampler, setting=setting)

    def _stage(self, task: str, number: int, stage: dict[str, Any], seed: int) -> Stage:
        changes = dict(stage)
        share = changes.pop("share", 1.0)
        images = round(self.images * share)
        refers = tuple(key for key in REFERS if changes.get(key) == "previous")
        named = {key: value for key, value in changes.items() if key not in refers}
        recipe = {**self.base, "task": task, "data": self.data, "images": images}
        recipe["seed"] = seed + 100 * number  # in another order than the stage before
        if share < 1:  # a short training warms up as fast, for its length, as a whole one
            recipe["warmup"] = round(share * self.base.get("warmup", WARMUP))
        own = self.tasks[task] if named.get("task", task) == task else {}  # of another task: the same for all of ours
        return Stage(recipe | own | named, refers)


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def load_suite(name: str | Path) -> Suite:
    """A YAML file, or the name of a shipped suite. Raises UserError where it is missing or lacks a key."""
    shipped = SUITES / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SUITES.glob("*.yaml")))
        raise UserError(f"{name}: no such suite: give a YAML file or one of {known}")
    try:
        return Suite(name=path.stem, **read_yaml(path))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a suite ({one_line(error)}): see the shipped one, mini") from error
