r"""Flow maps against the other one-stage objectives on pictures: trainings and figures of flow-maps.yaml.

    python benchmarks/flow_maps.py --work runs/flow-maps --tasks upscale --rows pe-finetune,pe-flow-map-5
    python benchmarks/flow_maps.py --work runs/flow-maps --own      # FD to 50 steps of the same network, same noise
    python benchmarks/flow_maps.py --work runs/flow-maps --write    # what is there -> benchmarks/results

Trains on the embedded backbone `mini` what is missing, with the candidates that are no part of the library too, and
writes benchmarks/results/flow-maps.json. The same command again goes on where it stopped. A training of 12,000 images
takes about 20 minutes of a core, `--own` about 6 minutes a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import tuning
from command import command_line
from torch import Tensor

from codi.apps.benchmark import _finished, _folders, benchmark
from codi.apps.common import load_pipeline
from codi.data.batches import collate
from codi.data.sources import open_source
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import default_features, frechet_distance
from codi.evaluation.report import write_json
from codi.evaluation.suite import Suite, load_suite
from codi.models import codec
from codi.models.backbones import load_backbone
from codi.objectives import OBJECTIVES, Objective
from codi.training.distill import DistillRecipe, recipe_task
from codi.training.recipe import build

HERE = Path(__file__).parent
OWN_STEPS, OWN_COUNT, BATCH = 50, 256, 32
FLOORS = ("floor", "codec")


def register_candidates() -> None:
    """Make the objectives of candidates.py available to recipes."""
    loss = partial(tuning, dt=250, dt_end=3)
    OBJECTIVES["tuning"] = Objective(loss, lambda options: 4, "tuning", sampler="renoise")


def own_distances(suite: Suite, work: Path, tasks: list[str], rows: list[str]) -> None:
    """Add to own.json what is missing: {"task method seed": {steps: FD to the network's own OWN_STEPS steps}}, and
    "task floor" and "task codec": the FD of two sets of true pictures, and of a set to itself through the codec."""
    path = work / "own.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for plan in suite.plans(tasks, rows, ()):
        key, folders = f"{plan.task} {plan.method} {plan.seed}", _folders(plan, work)
        if f"{plan.task} floor" not in found:
            found |= {f"{plan.task} {name}": fd for name, fd in floors(suite, plan.task).items()}
        if key not in found and all(map(_finished, folders)):
            pipe = load_pipeline(suite.base["model"], plan.task, folders[-1], "cpu")
            counts = [n for n in plan.steps if n != OWN_STEPS]
            made = features_of(suite, plan.task, OWN_COUNT, partial(sampled, pipe, [*counts, OWN_STEPS]))
            found[key] = {n: frechet_distance(a, made[-1]) for n, a in zip(counts, made, strict=False)}
        write_json(found, path)


def sampled(pipe: Any, steps: list[int], given: Tensor, truth: Tensor, prompts: list[str], first: int) -> list[Tensor]:
    """Return pictures (B, 3, H, W) for each of `steps`, from noise that depends on the position alone."""
    seeds = list(range(first, first + len(given)))
    return [pipe(image=given, prompt=prompts, steps=n, seed=seeds, output_type="pt").images for n in steps]


def features_of(suite: Suite, name: str, count: int, make: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Return the pooled features (count, D) of each list of pictures that `make(given, truth, prompts, first)` makes
    of the held-out samples of a task."""
    task = recipe_task(
        build(DistillRecipe, suite.base | suite.tasks[name] | {"task": name, "out": ""}, name)
    ).measured()
    source, features = open_source(suite.held_out, task.columns), default_features()
    parts = []
    for first in range(0, count, BATCH):
        samples: Any = source.read(range(first, min(first + BATCH, count)), suite.base["size"])
        batch = collate(samples)
        given = task.given(batch, torch.Generator().manual_seed(first))
        made = make(given, task.truth(batch), task.prompts(batch), first)
        parts.append([features(pictures.float().clamp(0, 1)).pooled for pictures in made])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def floors(suite: Suite, task: str) -> dict[str, float]:
    """Return the FD between two halves of the true pictures, and of all of them to what the codec makes of them."""
    vae = load_backbone(suite.base["model"]).vae

    def pair(given: Tensor, truth: Tensor, *_: Any) -> list[Tensor]:
        return [truth, codec.decode(vae, codec.encode(vae, truth))]

    with torch.no_grad():
        truth, decoded = features_of(suite, task, suite.count, pair)
    half = len(truth) // 2
    return {"floor": frechet_distance(truth[:half], truth[half:]), "codec": frechet_distance(decoded, truth)}


def write_rows(work: Path) -> None:
    """Write benchmarks/results/flow-maps.json from the suite's results: `pe-` in a row's name is its form."""
    measured = json.loads((work / "results.json").read_text())["rows"]
    path = work / "own.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    rows = []
    for row in measured:
        method = row["method"].removeprefix("pe-")
        form = "pe" if method != row["method"] else "full"
        key = {"task": row["task"], "method": method, "form": form, "seed": row["seed"], "steps": row["steps"]}
        fd_own = own.get(f"{row['task']} {row['method']} {row['seed']}", {}).get(str(row["steps"]))
        rows.append(key | {"fd": row["fd"], "fd_own": fd_own, "distance": row["distance"], "fidelity": row["obedience"]}
                    | {name: row[name] for name in ("psnr", "images", "passes")})  # fmt: skip
    kinds = {name: {key.split()[0]: fd for key, fd in own.items() if key.endswith(f" {name}")} for name in FLOORS}
    results = {"rows": rows, **kinds, "command": command_line(), "machine": describe_machine()}
    write_json(results, HERE / "results" / "flow-maps.json")


def main() -> None:
    """Run the rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/flow-maps"), help="folder of the trainings")
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--rows", default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="train nothing: compare with the networks' own many steps")
    parser.add_argument("--write", action="store_true", help="train nothing: write the rows that are there")
    args = parser.parse_args()
    if args.write:
        return write_rows(args.work)
    torch.set_num_threads(1)
    register_candidates()
    if args.own:
        suite = replace(load_suite(str(HERE / "flow-maps.yaml")), seeds=args.seeds)
        return own_distances(
            suite, args.work, *([*filter(None, (w or "").split(","))] for w in (args.tasks, args.rows))
        )
    benchmark(
        suite=str(HERE / "flow-maps.yaml"), out=args.work, rows=args.rows, tasks=args.tasks, steps=None,
        seeds=args.seeds, quick=False, report=False, time_=False, minutes=None, device="cpu", json_=False,
    )  # fmt: skip
    write_rows(args.work)


if __name__ == "__main__":
    main()
