"""Benchmark suites: YAML files (see suites/mini.yaml) of methods, their trainings and the step counts to measure."""

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
WARMUP = 1000  # images; the default of recipes
REFERS = ("start", "teacher", "model")  # recipe keys that may be `previous`, the output of the stage before


@dataclass(frozen=True)
class Stage:
    """One training: its recipe, and the keys (`refers`) that take the output of the stage before."""

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
    setting: dict[str, Any] = field(default_factory=dict)  # recipe keys of the task, the same for all methods

    def key(self, upto: int | None = None) -> str:
        """Return a hash that is equal for equal chains of the first `upto` stages (None: all)."""
        return _hash([[stage.recipe, stage.refers] for stage in self.stages[:upto]] or self.setting)

    def measure(self, suite: Suite, steps: int) -> str:
        """Return a hash that is equal for equal trainings, samplers, step counts and held-out data."""
        return _hash([self.key(), self.setting, self.solver, self.shift, suite.held_out, steps])


@dataclass(frozen=True)
class Suite:
    """A suite with the fields of its YAML file, as `load_suite` reads it."""

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
    about: str = ""  # a note for readers of its tables

    def quickly(self) -> Suite:
        """Return the suite with the changes of `quick`: fewer images, samples, seeds, steps and tasks."""
        changes = dict(self.quick)
        tasks, steps = changes.pop("tasks", list(self.tasks)), changes.pop("steps", None)
        methods = copy.deepcopy(self.methods)
        for method in methods.values():
            method["steps"] = [n for n in method.get("steps", (1, 2, 4)) if steps is None or n in steps or not n]
        chosen = {task: self.tasks[task] for task in tasks}
        return Suite(**{**vars(self), **changes, "tasks": chosen, "methods": methods})

    def plans(self, tasks: Sequence[str] = (), rows: Sequence[str] = (), steps: Sequence[int] = ()) -> Iterator[Plan]:
        """Yield the plans, limited to `tasks`, `rows` (methods) and `steps` where these are not empty. All plans of a
        seed come before those of the next one, so that tables fill up evenly.

        Raises UserError for a name that the suite does not have.
        """
        for requested, known, kind in ((tasks, self.tasks, "task"), (rows, self.methods, "row")):
            for name in requested:
                if name not in known:
                    raise UserError(
                        f"{kind} {name!r}: not in suite {self.name}{nearest(name, known)}: use {', '.join(known)}"
                    )
        for seed in range(self.seeds):
            for task in tasks or self.tasks:
                for name in rows or self.methods:
                    method = self.methods[name]
                    if (seed and not method.get("headline")) or task not in method.get("tasks", self.tasks):
                        continue
                    stages = tuple(self._stage(task, *item, seed) for item in enumerate(method["stages"]))
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
        explicit = {key: value for key, value in changes.items() if key not in refers}
        recipe = {**self.base, "task": task, "data": self.data, "images": images}
        recipe["seed"] = seed + 100 * number  # data in another order than in the stage before
        if share < 1:  # warm-up takes the same share of a shorter training
            recipe["warmup"] = round(share * self.base.get("warmup", WARMUP))
        own = self.tasks[task] if explicit.get("task", task) == task else {}  # not for a stage on another task
        return Stage(recipe | own | explicit, refers)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def load_suite(name: str | Path) -> Suite:
    """Load a YAML file or the shipped suite of that name. Raises UserError if it does not exist or lacks a key."""
    shipped = SUITES / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SUITES.glob("*.yaml")))
        raise UserError(f"{name}: no such suite: give a YAML file or one of {known}")
    try:
        return Suite(name=path.stem, **read_yaml(path))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a suite ({one_line(error)}): see the shipped suite mini") from error
