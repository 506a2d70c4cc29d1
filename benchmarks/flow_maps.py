r"""Flow maps against the other one-stage objectives on pictures: trainings and figures of flow-maps.yaml.

    python benchmarks/flow_maps.py --work runs/flow-maps --tasks upscale --rows pe-finetune,pe-flow-map-5

Trains on the embedded backbone `mini` what is missing, with the candidates that are no part of the library too, and
writes benchmarks/results/flow-maps.json. The same command again goes on where it stopped. A training of 12,000 images
takes about 20 minutes of a core.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import tuning
from command import command_line

from codi.apps.benchmark import benchmark
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.training import objective

HERE = Path(__file__).parent


def register_candidates() -> None:
    """Make the objectives of candidates.py available to recipes."""
    module: Any = objective
    module.OBJECTIVES["tuning"] = partial(tuning, dt=250, dt_end=3)
    module.PASSES["tuning"] = 4
    module.SAMPLERS["tuning"] = "renoise"


def write_rows(work: Path) -> None:
    """Write benchmarks/results/flow-maps.json from the suite's results: `pe-` in a row's name is its form."""
    measured = json.loads((work / "results.json").read_text())["rows"]
    rows = []
    for row in measured:
        method = row["method"].removeprefix("pe-")
        form = "pe" if method != row["method"] else "full"
        key = {"task": row["task"], "method": method, "form": form, "seed": row["seed"], "steps": row["steps"]}
        rows.append(key | {"fd": row["fd"], "distance": row["distance"], "fidelity": row["obedience"]}
                    | {name: row[name] for name in ("psnr", "images", "passes")})  # fmt: skip
    results = {"rows": rows, "command": command_line(), "machine": describe_machine()}
    write_json(results, HERE / "results" / "flow-maps.json")


def main() -> None:
    """Run the rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/flow-maps"), help="folder of the trainings")
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--rows", default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="train nothing: write the rows that are there")
    args = parser.parse_args()
    if args.write:
        return write_rows(args.work)
    torch.set_num_threads(1)
    register_candidates()
    benchmark(
        suite=str(HERE / "flow-maps.yaml"), out=args.work, rows=args.rows, tasks=args.tasks, steps=None,
        seeds=args.seeds, quick=False, report=False, time_=False, minutes=None, device="cpu", json_=False,
    )  # fmt: skip
    write_rows(args.work)


if __name__ == "__main__":
    main()
