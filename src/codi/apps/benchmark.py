"""`codi benchmark`: trains and measures the rows of a suite, one after the other; tables and plots of them."""

from __future__ import annotations

import json
import shutil
import sys
import time
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
    usage,
    watched,
    working,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Method
    from ..evaluation.suite import Plan, Suite

EXAMPLE = "Example: codi benchmark --suite mini --out runs/benchmark --rows codi,ldm --tasks depth"
RESULTS = "results.json"


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
    minutes: Minutes = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train and measure the methods of the paper's tables. The same command again goes on where this one stopped."""
    with working("starting"):
        from ..evaluation.suite import load_suite
        from ..evaluation.tables import write_report

        hide_loading_bars()
        with usage():
            chosen = load_suite(suite)
            chosen = chosen.quickly() if quick else chosen
            chosen = replace(chosen, seeds=seeds) if seeds else chosen
            plans = list(chosen.plans(_words(tasks), _words(rows), parse_steps(steps) if steps else ()))
            if not plans:
                raise UserError(f"--steps {steps}: no row asked for is measured there: see the suite")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    results = _Results(out / RESULTS, chosen)
    failed: list[str] = []
    for number, plan in enumerate([] if report else plans):
        steps_left = results.missing(plan)
        if not steps_left or (deadline and time.monotonic() > deadline):
            continue
        if watched():
            print(f"{number + 1}/{len(plans)} {plan.task}, {plan.method}, seed {plan.seed}", file=sys.stderr)
        try:
            folders = _trained(plan, out, device, deadline)
            if folders is None:  # out of time, with a checkpoint
                break
            results.add(plan, _measured(plan, steps_left, chosen, folders, out, device))
        except UserError as error:  # of this row alone, e.g. a loss that is no longer finite
            failed.append(f"{plan.task}, {plan.method}, seed {plan.seed}: {error}")
    missing = [plan for plan in plans if results.missing(plan)]
    write_report(results.told, out)
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
        self.path = path
        self.of = {"suite": suite.name, "images": suite.images, "count": suite.count, "held_out": suite.held_out}
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
    from ..models.backbone import with_unet
    from ..training.distill import DistillRecipe, distill
    from ..training.recipe import build

    folders: list[Path] = []
    for number, stage in enumerate(plan.stages, 1):
        folder = out / "runs" / f"{stage.recipe['task']}-{stage.recipe['objective']}-{plan.key(number)}"
        if not _finished(folder):
            made = {key: str(folders[-1]) for key in stage.refers}
            if "model" in made:
                made["model"] = str(with_unet(stage.recipe["model"], folders[-1] / "unet", folders[-1] / "model"))
            recipe = build(DistillRecipe, {**stage.recipe, **made, "out": str(folder), "device": device}, plan.method)
            minutes = (deadline - time.monotonic()) / 60 if deadline else None
            if minutes is not None and minutes <= 0:
                return None
            distill(recipe, quiet=not watched(), minutes=minutes)
            if not _finished(folder):
                return None
        folders.append(folder)
    return folders


def _finished(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text())["info"]["finished"]


def _measured(
    plan: Plan, steps: tuple[int, ...], suite: Suite, folders: list[Path], out: Path, device: str
) -> list[dict[str, Any]]:
    """A row for each of `steps`."""
    from ..data.sources import open_source
    from ..evaluation import evaluate
    from ..training.distill import recipe_task
    from ..training.distill_recipe import DistillRecipe
    from ..training.recipe import build

    recipe = suite.base | suite.tasks[plan.task] | {"task": plan.task, "out": ""}
    task = recipe_task(build(DistillRecipe, recipe, plan.task)).measured()
    method = _method(plan, steps, suite.base["model"], folders, device)
    made = out / "measuring" / f"{plan.task}-{plan.method.replace('/', '-')}-{plan.key()}"
    if folders:
        method = remembering(method, made)
    with progress("pictures") as bar:
        line = bar.add_task(f"{plan.task}, {plan.method}", total=None)
        results = evaluate(
            [method],
            task,
            open_source(suite.held_out, task.columns),
            suite.count,
            size=suite.base["size"],
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    shutil.rmtree(made, ignore_errors=True)
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


def remembering(method: Method, folder: Path) -> Method:
    """The same, but batches of pictures that were made once are read from `folder`: many steps take hours, and a run
    that was cut off goes on where it was. Single pictures, whose time is taken, are always made."""
    from safetensors.torch import load_file, save_file

    def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        file = folder / f"{steps}-{seeds[0]}-{len(seeds)}.safetensors"
        if len(seeds) == 1:
            return method.run(given, prompts, steps, seeds)
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file({"pictures": method.run(given, prompts, steps, seeds).cpu().contiguous()}, partial)
            partial.replace(file)
        return load_file(file)["pictures"]

    return replace(method, run=run)


def _method(plan: Plan, steps: tuple[int, ...], model: str, folders: list[Path], device: str) -> Method:
    """What the last stage made; without stages the latent codec alone."""
    from ..evaluation import Method, pipeline_method
    from ..models import codec
    from ..models.backbone import load_backbone
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
