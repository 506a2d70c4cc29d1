"""`codi benchmark`: trains and measures the rows of a suite, one after the other; tables and plots of them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .common import (
    Device,
    Json,
    Minutes,
    choose_device,
    hide_loading_bars,
    parse_steps,
    print_json,
    progress,
    shows_progress,
    spinner,
    usage_errors,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Method, Results
    from ..evaluation.suite import Plan, Suite

EXAMPLE = "Example: codi benchmark --suite mini --out runs/benchmark --rows codi,ldm --tasks depth"
RESULTS = "results.json"
TIMED = 5  # pictures, of --time


def benchmark(
    suite: Annotated[str, typer.Option(help="A shipped suite's name or a YAML file.")] = "mini",
    out: Annotated[Path, typer.Option(help="Folder of trainings, results.json, tables and plots.")] = Path("benchmark"),
    rows: Annotated[str | None, typer.Option(help="Methods to run, by comma; all by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks to run, by comma; all by default.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Step counts to measure, by comma; each row's own by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trainings of headline rows; the suite's by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every row, small: does it run?")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: tables and plots of what is there.")] = False,
    time_: Annotated[
        bool, typer.Option("--time", help="Train nothing: time what is there, all rows of a task in turns.")
    ] = False,
    minutes: Minutes = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train and measure the methods of the paper's tables. The same command again goes on where this one stopped."""
    with spinner("starting"):
        from ..evaluation.suite import load_suite
        from ..evaluation.tables import write_report

        hide_loading_bars()
        with usage_errors():
            chosen = load_suite(suite)
            chosen = chosen.quickly() if quick else chosen
            chosen = replace(chosen, seeds=seeds) if seeds else chosen
            plans = list(chosen.plans(_words(tasks), _words(rows), parse_steps(steps) if steps else ()))
            if not plans:
                raise UserError(f"--steps {steps}: no row asked for is measured there: see the suite")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    results = _Results(out / RESULTS, chosen)
    failed: list[str] = []
    if time_:
        for task in dict.fromkeys(plan.task for plan in plans):
            results.time(task, _timed([plan for plan in plans if plan.task == task], results, chosen, out, device))
    for number, plan in enumerate([] if report or time_ else plans):
        steps_left = results.missing(plan)
        if not steps_left or (deadline and time.monotonic() > deadline):
            continue
        if shows_progress():
            print(f"{number + 1}/{len(plans)} {plan.task}, {plan.method}, seed {plan.seed}", file=sys.stderr)
        try:
            folders = _trained(plan, out, device, deadline)
            if folders is None:  # out of time, with a checkpoint
                break
            results.add(plan, _measured(plan, steps_left, chosen, folders, out, device))
        except UserError as error:  # of this row alone, e.g. a loss that is no longer finite
            failed.append(f"{plan.task}, {plan.method}, seed {plan.seed}: {error}")
    missing = [plan for plan in plans if results.missing(plan)]
    write_report(results.told, chosen, out)
    if missing:
        print(f"{len(missing)} of {len(plans)} rows are still to run: the same command goes on", file=sys.stderr)
    if json_:
        print_json(results.told)
    if failed:
        raise UserError("; ".join(failed))


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


class _Results:
    """results.json, read and written anew after each plan."""

    def __init__(self, path: Path, suite: Suite) -> None:
        from ..models.backbones import digest, load_backbone

        self.path = path
        self.of = {key: getattr(suite, key) for key in ("images", "count", "held_out")}
        self.of |= {"suite": suite.name, "size": suite.base["size"]}
        self.of["backbone"] = digest(load_backbone(suite.base["model"]).network)
        self.places = {name: place for names in (suite.tasks, suite.methods) for place, name in enumerate(names)}
        self.told = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            told = json.loads(self.path.read_text()) if self.path.is_file() else {"rows": []}
        except ValueError as error:
            raise UserError(f"{self.path}: not JSON ({error}): move it away, or mend it") from error
        for key, value in self.of.items():
            if told.setdefault(key, value) != value:
                raise UserError(
                    f"{self.path}: was measured with {key} {told[key]}, not {value}: such figures do not compare: "
                    "choose another --out"
                )
        return told

    def missing(self, plan: Plan) -> tuple[int, ...]:
        """The step counts of it that were not measured yet with the training and sampler that the suite has today."""
        there = {row["steps"] for row in self.told["rows"] if self._today(plan, row)}
        return tuple(n for n in plan.steps if n not in there)

    def add(self, plan: Plan, rows: list[dict[str, Any]]) -> None:
        """Puts `rows` in; those of an earlier training of the same plan go. Others may run other rows meanwhile."""
        from ..evaluation.report import write_json

        self.told = self._read()
        kept = [row for row in self.told["rows"] if not self._same(plan, row) or self._today(plan, row)]
        self.told["rows"] = sorted(kept + rows, key=self._place)
        write_json(self.told, self.path)

    def time(self, task: str, times: list[dict[str, Any]]) -> None:
        """Puts in the times of the rows of a task, in place of those that were there."""
        from ..evaluation.report import write_json

        self.told = self._read()
        self.told.setdefault("times", {})[task] = times
        write_json(self.told, self.path)

    def _place(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Where in the suite's order; what a suite no longer has comes last."""
        last = len(self.places)
        return (*(self.places.get(row[key], last) for key in ("task", "method")), row["seed"], row["steps"])

    def _today(self, plan: Plan, row: dict[str, Any]) -> bool:
        made = (row["training"], row["shift"], row.get("solver"))
        return self._same(plan, row) and made == (plan.key(), plan.shift, plan.solver)

    def _same(self, plan: Plan, row: dict[str, Any]) -> bool:
        return (row["task"], row["method"], row["seed"]) == (plan.task, plan.method, plan.seed)


def _trained(plan: Plan, out: Path, device: str, deadline: float | None) -> list[Path] | None:
    """The folder of each stage, trained as far as it was not; None where time ran out."""
    from ..models.backbones import with_network
    from ..training.distill import DistillRecipe, distill
    from ..training.recipe import build

    folders: list[Path] = []
    for stage, folder in zip(plan.stages, _folders(plan, out), strict=True):
        if not _finished(folder):
            made = {key: str(folders[-1]) for key in stage.refers}
            if "model" in made:
                made["model"] = str(with_network(stage.recipe["model"], folders[-1] / "unet", folders[-1] / "model"))
            recipe = build(DistillRecipe, {**stage.recipe, **made, "out": str(folder), "device": device}, plan.method)
            minutes = (deadline - time.monotonic()) / 60 if deadline else None
            if minutes is not None and minutes <= 0:
                return None
            distill(recipe, quiet=not shows_progress(), minutes=minutes)
            if not _finished(folder):
                return None
        folders.append(folder)
    return folders


def _folders(plan: Plan, out: Path) -> list[Path]:
    """Where each of its stages is trained."""
    return [
        out / "runs" / f"{stage.recipe['task']}-{stage.recipe['objective']}-{plan.key(number)}"
        for number, stage in enumerate(plan.stages, 1)
    ]


def _finished(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text())["info"]["finished"]


def _measured(
    plan: Plan, steps: tuple[int, ...], suite: Suite, folders: list[Path], out: Path, device: str
) -> list[dict[str, Any]]:
    """A row for each of `steps`."""
    from ..training.distill_recipe import DistillRecipe
    from ..training.recipe import build

    method = _method(plan, steps, suite.base["model"], folders, device)
    made = {
        n: out / "measuring" / f"{plan.task}-{plan.method.replace('/', '-')}-{plan.measure(suite, n)}" for n in steps
    }
    if folders:
        method = remembering(method, made)
    with progress("pictures") as bar:
        line = bar.add_task(f"{plan.task}, {plan.method}", total=None)
        results = _evaluated(
            [method], suite, plan.task, suite.count, lambda *at: bar.update(line, completed=at[0], total=at[1])
        )
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)
    infos = [json.loads((folder / "config.json").read_text())["info"] for folder in folders]
    cost = {key: sum(info[key] for info in infos) for key in ("images", "seconds")}
    recipes = [build(DistillRecipe, {**stage.recipe, "out": ""}, plan.method) for stage in plan.stages]
    cost["passes"] = round(sum(r.passes * info["images"] for r, info in zip(recipes, infos, strict=True)))
    told = {
        "task": plan.task,
        "seed": plan.seed,
        "training": plan.key(),
        "shift": plan.shift,
        "solver": plan.solver,
        **cost,
        "machine": results.machine,
    }
    rows = [asdict(row) | told for row in results.rows if row.method == plan.method]
    return [{"task": row.pop("task"), "method": row.pop("method"), **row} for row in rows]


def _evaluated(methods: list[Method], suite: Suite, name: str, count: int, progress: Any = None) -> Results:
    """`methods` on the first `count` held-out pictures of the suite's task `name`."""
    from ..data.sources import open_source
    from ..evaluation import evaluate
    from ..training.distill import recipe_task
    from ..training.distill_recipe import DistillRecipe
    from ..training.recipe import build

    recipe = suite.base | suite.tasks[name] | {"task": name, "out": ""}
    task = recipe_task(build(DistillRecipe, recipe, name)).measured()
    source = open_source(suite.held_out, task.columns)
    return evaluate(methods, task, source, count, size=suite.base["size"], progress=progress)


def _timed(plans: list[Plan], results: _Results, suite: Suite, out: Path, device: str) -> list[dict[str, Any]]:
    """What one picture takes with each of `plans`, all of one task, at the step counts that were measured."""
    methods = {}
    for plan in plans:
        steps = tuple(n for n in plan.steps if n not in results.missing(plan))
        folders = _folders(plan, out)
        if steps and plan.method not in methods and all(map(_finished, folders)):  # of its first seed
            methods[plan.method] = _method(plan, steps, suite.base["model"], folders, device)
    if not methods:
        return []
    found = _evaluated(list(methods.values()), suite, plans[0].task, TIMED)
    return [
        {"method": row.method, "steps": row.steps, "ms": row.latency_ms, "machine": found.machine}
        for row in found.rows
        if row.method in methods
    ]


def remembering(method: Method, folders: Mapping[int, Path]) -> Method:
    """The same, but batches of pictures that were made once are read from the folder of their number of steps: many
    steps take hours, and a run that was cut off goes on where it was. Single pictures, whose time is taken, are always
    made."""
    from safetensors.torch import load_file, save_file

    from ..files import write_file

    def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        file = folders[steps] / f"{seeds[0]}-{len(seeds)}.safetensors"
        if len(seeds) == 1:
            return method.run(given, prompts, steps, seeds)
        if not file.is_file():
            made = {"pictures": method.run(given, prompts, steps, seeds).cpu().contiguous()}
            write_file(file, lambda temporary: save_file(made, temporary))
        return load_file(file)["pictures"]

    return replace(method, run=run)


def _method(plan: Plan, steps: tuple[int, ...], model: str, folders: list[Path], device: str) -> Method:
    """What the last stage made; without stages the latent codec alone."""
    from ..evaluation import Method, pipeline_method
    from ..models import codec
    from ..models.backbones import load_backbone
    from ..sampling.solvers import SOLVERS
    from .common import load_pipeline

    if not folders:
        vae = load_backbone(model).to(choose_device(device)).vae

        def decoded(truth: Tensor, *_: Any) -> Tensor:
            return codec.decode(vae, codec.encode(vae, truth.to(vae.device)))

        return Method(plan.method, decoded, (0,), sees_truth=True)
    pipe = load_pipeline(model, plan.task, folders[-1], device)
    pipe.solver = SOLVERS[plan.solver](pipe.scheduler.config) if plan.solver else None
    pipe.shift = plan.shift
    return pipeline_method(pipe, steps, plan.method)
