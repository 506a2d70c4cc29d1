"""`codi benchmark`: train and measure the rows of a suite, one after the other, and write tables and plots."""

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
TIMED = 5  # number of pictures that --time measures


def benchmark(
    suite: Annotated[str, typer.Option(help="A shipped suite's name or a YAML file.")] = "mini",
    out: Annotated[Path, typer.Option(help="Folder for trainings, results.json, tables and plots.")] = Path(
        "benchmark"
    ),
    rows: Annotated[str | None, typer.Option(help="Methods to run, separated by commas; all by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks to run, separated by commas; all by default.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Step counts to measure, separated by commas; each row's own by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trainings per headline row; the suite's number by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run every row on a small scale, as a test.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write tables and plots of the existing results.")
    ] = False,
    time_: Annotated[
        bool, typer.Option("--time", help="Train nothing; time the trained rows, those of a task in turns.")
    ] = False,
    minutes: Minutes = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train and measure the methods of the paper's tables. The same command resumes where the last one stopped."""
    with spinner("starting"):
        from ..evaluation.suite import load_suite
        from ..evaluation.tables import write_report

        hide_loading_bars()
        with usage_errors():
            chosen = load_suite(suite)
            chosen = chosen.quickly() if quick else chosen
            chosen = replace(chosen, seeds=seeds) if seeds else chosen
            plans = list(chosen.plans(_split(tasks), _split(rows), parse_steps(steps) if steps else ()))
            if not plans:
                raise UserError(f"--steps {steps}: no row is measured at these step counts: see the suite")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    results = _Results(out / RESULTS, chosen)
    failed: list[str] = []
    if time_:
        for task in dict.fromkeys(plan.task for plan in plans):
            results.time(task, _time([plan for plan in plans if plan.task == task], results, chosen, out, device))
    for number, plan in enumerate([] if report or time_ else plans):
        steps_left = results.missing(plan)
        if not steps_left or (deadline and time.monotonic() > deadline):
            continue
        if shows_progress():
            print(f"{number + 1}/{len(plans)} {plan.task}, {plan.method}, seed {plan.seed}", file=sys.stderr)
        try:
            folders = _train(plan, out, device, deadline)
            if folders is None:  # out of time; the training left a checkpoint
                break
            results.add(plan, _measure(plan, steps_left, chosen, folders, out, device))
        except UserError as error:  # concerns this row only, e.g. a loss that is no longer finite
            failed.append(f"{plan.task}, {plan.method}, seed {plan.seed}: {error}")
    missing = [plan for plan in plans if results.missing(plan)]
    write_report(results.content, chosen, out)
    if missing:
        print(f"{len(missing)} of {len(plans)} rows are still to run: the same command resumes", file=sys.stderr)
    if json_:
        print_json(results.content)
    if failed:
        raise UserError("; ".join(failed))


def _split(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


class _Results:
    """The file results.json, reread and rewritten after each plan."""

    def __init__(self, path: Path, suite: Suite) -> None:
        from ..models.backbones import digest, load_backbone

        self.path = path
        self.identity = {key: getattr(suite, key) for key in ("images", "count", "held_out")}
        self.identity |= {"suite": suite.name, "size": suite.base["size"]}
        self.identity["backbone"] = digest(load_backbone(suite.base["model"]).network)
        self.positions = {
            name: position for names in (suite.tasks, suite.methods) for position, name in enumerate(names)
        }
        self.content = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text()) if self.path.is_file() else {"rows": []}
        except ValueError as error:
            raise UserError(f"{self.path}: not JSON ({error}): move it away or correct it") from error
        for key, value in self.identity.items():
            if content.setdefault(key, value) != value:
                raise UserError(
                    f"{self.path}: was measured with {key} {content[key]}, not {value}: such figures are not "
                    "comparable: choose another --out"
                )
        return content

    def missing(self, plan: Plan) -> tuple[int, ...]:
        """Return the step counts of `plan` not yet measured with the suite's current training and sampler."""
        measured = {row["steps"] for row in self.content["rows"] if self._is_current(plan, row)}
        return tuple(n for n in plan.steps if n not in measured)

    def add(self, plan: Plan, rows: list[dict[str, Any]]) -> None:
        """Add `rows`, replacing those of an earlier training of the plan. Rows that another process added are kept."""
        from ..evaluation.report import write_json

        self.content = self._read()
        other_rows = [
            row for row in self.content["rows"] if not self._is_same_plan(plan, row) or self._is_current(plan, row)
        ]
        self.content["rows"] = sorted(other_rows + rows, key=self._sort_key)
        write_json(self.content, self.path)

    def time(self, task: str, times: list[dict[str, Any]]) -> None:
        """Store the times of a task's rows, replacing earlier ones."""
        from ..evaluation.report import write_json

        self.content = self._read()
        self.content.setdefault("times", {})[task] = times
        write_json(self.content, self.path)

    def _sort_key(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Return the row's sort key in the suite's order; tasks and methods no longer in the suite come last."""
        last = len(self.positions)
        return (*(self.positions.get(row[key], last) for key in ("task", "method")), row["seed"], row["steps"])

    def _is_current(self, plan: Plan, row: dict[str, Any]) -> bool:
        settings = (row["training"], row["shift"], row.get("solver"))
        return self._is_same_plan(plan, row) and settings == (plan.key(), plan.shift, plan.solver)

    def _is_same_plan(self, plan: Plan, row: dict[str, Any]) -> bool:
        return (row["task"], row["method"], row["seed"]) == (plan.task, plan.method, plan.seed)


def _train(plan: Plan, out: Path, device: str, deadline: float | None) -> list[Path] | None:
    """Train the stages that are not finished and return the folder of each; None where time ran out."""
    from ..models.backbones import with_network
    from ..training.distill import DistillRecipe, distill
    from ..training.recipe import build

    folders: list[Path] = []
    for stage, folder in zip(plan.stages, _folders(plan, out), strict=True):
        if not _finished(folder):
            overrides = {key: str(folders[-1]) for key in stage.refers}
            if "model" in overrides:
                overrides["model"] = str(
                    with_network(stage.recipe["model"], folders[-1] / "unet", folders[-1] / "model")
                )
            recipe = build(
                DistillRecipe, {**stage.recipe, **overrides, "out": str(folder), "device": device}, plan.method
            )
            minutes = (deadline - time.monotonic()) / 60 if deadline else None
            if minutes is not None and minutes <= 0:
                return None
            distill(recipe, quiet=not shows_progress(), minutes=minutes)
            if not _finished(folder):
                return None
        folders.append(folder)
    return folders


def _folders(plan: Plan, out: Path) -> list[Path]:
    """Return the training folder of each stage."""
    return [
        out / "runs" / f"{stage.recipe['task']}-{stage.recipe['objective']}-{plan.key(number)}"
        for number, stage in enumerate(plan.stages, 1)
    ]


def _finished(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text())["info"]["finished"]


def _measure(
    plan: Plan, steps: tuple[int, ...], suite: Suite, folders: list[Path], out: Path, device: str
) -> list[dict[str, Any]]:
    """Measure the plan at each of `steps` and return a row for each."""
    from ..training.distill_recipe import DistillRecipe
    from ..training.recipe import build

    method = _method(plan, steps, suite.base["model"], folders, device)
    cache_folders = {
        n: out / "measuring" / f"{plan.task}-{plan.method.replace('/', '-')}-{plan.measure(suite, n)}" for n in steps
    }
    if folders:
        method = with_disk_cache(method, cache_folders)
    with progress("pictures") as bar:
        line = bar.add_task(f"{plan.task}, {plan.method}", total=None)
        results = _evaluate(
            [method], suite, plan.task, suite.count, lambda *state: bar.update(line, completed=state[0], total=state[1])
        )
    for folder in cache_folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    infos = [json.loads((folder / "config.json").read_text())["info"] for folder in folders]
    cost = {key: sum(info[key] for info in infos) for key in ("images", "seconds")}
    recipes = [build(DistillRecipe, {**stage.recipe, "out": ""}, plan.method) for stage in plan.stages]
    cost["passes"] = round(sum(r.passes * info["images"] for r, info in zip(recipes, infos, strict=True)))
    shared_columns = {
        "task": plan.task,
        "seed": plan.seed,
        "training": plan.key(),
        "shift": plan.shift,
        "solver": plan.solver,
        **cost,
        "machine": results.machine,
    }
    rows = [asdict(row) | shared_columns for row in results.rows if row.method == plan.method]
    return [{"task": row.pop("task"), "method": row.pop("method"), **row} for row in rows]


def _evaluate(methods: list[Method], suite: Suite, name: str, count: int, progress: Any = None) -> Results:
    """Evaluate `methods` on the first `count` held-out pictures of the suite's task `name`."""
    from ..data.sources import open_source
    from ..evaluation import evaluate
    from ..training.distill import recipe_task
    from ..training.distill_recipe import DistillRecipe
    from ..training.recipe import build

    recipe = suite.base | suite.tasks[name] | {"task": name, "out": ""}
    task = recipe_task(build(DistillRecipe, recipe, name)).measured()
    source = open_source(suite.held_out, task.columns)
    return evaluate(methods, task, source, count, size=suite.base["size"], progress=progress)


def _time(plans: list[Plan], results: _Results, suite: Suite, out: Path, device: str) -> list[dict[str, Any]]:
    """Time one picture with each of `plans`, all of one task, at the step counts that were measured."""
    methods = {}
    for plan in plans:
        steps = tuple(n for n in plan.steps if n not in results.missing(plan))
        folders = _folders(plan, out)
        if steps and plan.method not in methods and all(map(_finished, folders)):  # time a method's first seed only
            methods[plan.method] = _method(plan, steps, suite.base["model"], folders, device)
    if not methods:
        return []
    evaluation = _evaluate(list(methods.values()), suite, plans[0].task, TIMED)
    return [
        {"method": row.method, "steps": row.steps, "ms": row.latency_ms, "machine": evaluation.machine}
        for row in evaluation.rows
        if row.method in methods
    ]


def with_disk_cache(method: Method, folders: Mapping[int, Path]) -> Method:
    """Return `method` with its batches cached on disk, in the folder of their step count, so that an interrupted
    evaluation, which can take hours with many steps, resumes. Single pictures are never cached, as they are timed."""
    from safetensors.torch import load_file, save_file

    from ..files import write_file

    def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        file = folders[steps] / f"{seeds[0]}-{len(seeds)}.safetensors"
        if len(seeds) == 1:
            return method.run(given, prompts, steps, seeds)
        if not file.is_file():
            tensors = {"pictures": method.run(given, prompts, steps, seeds).cpu().contiguous()}
            write_file(file, lambda temporary: save_file(tensors, temporary))
        return load_file(file)["pictures"]

    return replace(method, run=run)


def _method(plan: Plan, steps: tuple[int, ...], model: str, folders: list[Path], device: str) -> Method:
    """Return the method that the last stage trained; without stages, encoding and decoding by the VAE alone."""
    from ..evaluation import Method, pipeline_method
    from ..models import codec
    from ..models.backbones import load_backbone
    from ..sampling.solvers import SOLVERS
    from .common import load_pipeline

    if not folders:
        vae = load_backbone(model).to(choose_device(device)).vae

        def reconstruct(truth: Tensor, *_: Any) -> Tensor:
            return codec.decode(vae, codec.encode(vae, truth.to(vae.device)))

        return Method(plan.method, reconstruct, (0,), sees_truth=True)
    pipe = load_pipeline(model, plan.task, folders[-1], device)
    pipe.solver = SOLVERS[plan.solver](pipe.scheduler.config) if plan.solver else None
    pipe.shift = plan.shift
    return pipeline_method(pipe, steps, plan.method)
