"""Every task in few steps beside the many-step model: FD-ENLite0, distance, obedience, latency on held-out scenes.

    python benchmarks/tasks.py --finetuned runs                  # the tasks that RESULTS does not hold yet
    python benchmarks/tasks.py --finetuned runs --tasks depth    # one of them again; the others' rows stay

Few steps: the adapter of each task, embedded or from --adapters (backbone frozen), at 1, 2 and 4 steps. Many steps:
the adapter `<task>-finetuned` (plain diffusion loss, same form and budget) at 50 and at 4, embedded or from
--finetuned; for `generate` the backbone itself with classifier-free guidance. Adapters use the guidance that they were
made for.

Obedience is what the task measures itself (upscale, canny, edit) or what the scene reader says (inpaint, depth,
generate; see judges.py); `judge_on_truth` holds the same judge's figures on the true pictures. `composition` sets the
adapters of depth and inpaint at once and apart, on the same holes and depth maps. `ratios` compare each few-step row
with the many-step one: FD (lower is better) and obedience (higher is better).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from judges import Judge, Read, caption_judge, depth_judge, hole_judge
from reading import WEIGHTS, load_reader, read
from torch import Tensor

from codi.data.batches import Batch
from codi.data.sources import open_source
from codi.evaluation.evaluate import Method, describe_machine, evaluate, pipeline_method
from codi.evaluation.report import write_json
from codi.models.adapter_files import find_adapter
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS, Task, means
from codi.tasks.depth import Depth
from codi.tasks.inpaint import Inpaint

RESULTS = Path("benchmarks/results/tasks.json")
FEW, MANY = (1, 2, 4), 50
COMPOSITION = "composition"

# The figure that stands for obedience in tables, of those that task and judge give.
HEADLINES = {
    "upscale": "input_psnr",
    "inpaint": "hole_objects",
    "depth": "depth_db",
    "canny": "edge_f1",
    "edit": "psnr_inside",
    "generate": "caption_all",
    COMPOSITION: "hole_objects",
}
JUDGES: dict[str, Callable[[Read], Judge]] = {
    "inpaint": hole_judge,
    "depth": depth_judge,
    "canny": caption_judge,
    "generate": caption_judge,
}


class Witness:
    """A judge that keeps what it says of the truth of each batch, to stand beside what it says of results."""

    def __init__(self, judge: Judge, task: Task) -> None:
        self.judge, self.task = judge, task
        self.truth: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __call__(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        key = tuple(batch.index)
        if key not in self.truth:  # every method is judged on the same batches
            self.truth[key] = self.judge(self.task.truth(batch), given, batch)
        return self.judge(output, given, batch)

    def means(self) -> dict[str, float]:
        """Of the figures on the truth, over all samples."""
        parts = list(self.truth.values())
        return means({name: torch.cat([part[name] for part in parts]) for name in parts[0]}) if parts else {}


@dataclass(frozen=True)
class DepthInpaint(Task):
    """Inpainting with the depth of the wanted picture: given is inpaint's four channels, then depth's one."""

    name: ClassVar[str] = COMPOSITION
    condition_channels: ClassVar[int] = 5

    @property
    def columns(self) -> tuple[str, ...]:
        """Depth maps."""
        return ("conditioning_image",)

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """(B, 5, H, W)."""
        return torch.cat([Inpaint().given(batch, generator), Depth().given(batch, generator)], 1)

    def condition(self, given: Tensor) -> Tensor:
        """(B, 5, H, W): the hole grey."""
        return torch.cat([Inpaint().condition(given[:, :4]), given[:, 4:]], 1)


def composition_judge(read: Read) -> Judge:
    """Objects asked for in the hole, as `hole_judge`; and how near the disparity read within it is to the one given."""
    holes = hole_judge(read)

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        hole = given[:, 3] > 0.5
        error = (read(output).disparity - given[:, 4]).square().where(hole, 0).sum((1, 2)).double() / hole.sum((1, 2))
        return holes(output, given, batch) | {"hole_depth_db": (-10 * error.clamp_min(1e-12).log10()).clamp_max(60)}

    return judge


def folder_of(adapter: str, *places: Path | None) -> Path | None:
    """Where an adapter lies: in the first of `places` that has it, else embedded; None where it is nowhere."""
    folders = [*(place / adapter for place in places if place), find_adapter(adapter)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(model: str, task: str | None = None, adapter: Path | None = None) -> CoDiPipeline:
    """A pipeline that draws no bars. Raises UserError where there is no such adapter."""
    pipe = CoDiPipeline.from_pretrained(model, task=task, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def composition_methods(model: str, adapters: Path | None) -> list[Method]:
    """Inpaint alone, and inpaint with depth at several weights, 4 steps."""
    pipe = load(model)
    for name in ("inpaint", "depth"):
        pipe.load_adapter(folder_of(name, adapters) or name, as_=name)

    def composed(weight: float) -> Method:
        def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
            pipe.set_adapters(["inpaint", "depth"] if weight else "inpaint", [1.0, weight] if weight else None)
            images: Any = {"inpaint": given[:, :3], **({"depth": given[:, 4:]} if weight else {})}
            made: Any = pipe(
                image=images, mask=given[:, 3:4], prompt=prompts, steps=steps, seed=seeds, output_type="pt"
            )
            return made.images

        return Method(f"inpaint + {weight:g} depth" if weight else "inpaint", run, (4,))

    return [composed(weight) for weight in (0, 0.5, 1)]


def methods_of(name: str, args: argparse.Namespace) -> tuple[list[Method], Task]:
    """The few-step adapter of a task and its many-step reference, and the task as the adapter has it."""
    pipe = load(args.model, name, folder_of(name, args.adapters))
    assert pipe.task is not None
    methods = [pipeline_method(pipe, FEW, "codi")]
    if name == "generate":
        methods.append(pipeline_method(load(args.model), (4, MANY), "backbone", args.guidance))
    elif folder := folder_of(f"{name}-finetuned", args.finetuned):
        methods.append(pipeline_method(load(args.model, name, folder), (4, MANY), "finetuned"))
    else:
        print(f"{name}: no adapter {name}-finetuned: few-step rows alone", file=sys.stderr)
    return methods, pipe.task


def measure(name: str, args: argparse.Namespace, look: Read) -> dict[str, Any]:
    """One task's entry of the results."""
    if name == COMPOSITION:
        methods, task, make_judge = composition_methods(args.model, args.adapters), DepthInpaint(), composition_judge
    else:
        methods, task = methods_of(name, args)
        make_judge = JUDGES.get(name)
    witness = Witness(make_judge(look), task) if make_judge else None
    columns = list(task.columns)
    if make_judge in (hole_judge, composition_judge) and "mask" not in columns:
        columns.append("mask")
    results = evaluate(
        methods, task, open_source(args.data, columns), args.count, batch=25, size=args.size, judge=witness,
        keep=1, progress=lambda done, total: print(f"\r{name} {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    rows = [asdict(row) | {"obedience": row.measures.get(HEADLINES[name])} for row in results.rows]
    return {
        "count": results.count,
        "obedience": HEADLINES[name],
        "task_options": task.config(),
        "judge_on_truth": witness.means() if witness else {},
        "rows": rows,
        "ratios": ratios(rows),
        "machine": describe_machine(),
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """{"1": {"fd": few / many, "obedience": few / many, "speed": ...}, ...} for the rows of "codi"; {} where there is
    no many-step row, obedience None where many steps have none."""
    many = next((row for row in rows if row["steps"] == MANY), None)
    if many is None:
        return {}
    return {
        str(row["steps"]): {
            "fd": row["fd"] / many["fd"],
            "obedience": row["obedience"] / many["obedience"] if many["obedience"] else None,
            "speed": many["latency_ms"] / row["latency_ms"],
        }
        for row in rows
        if row["method"] == "codi"
    }


def main() -> None:
    """Measures task by task; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS, COMPOSITION], help="measure these, again if need be")
    parser.add_argument("--adapters", type=Path, help="folder of the adapters TASK; else embedded ones")
    parser.add_argument("--finetuned", type=Path, help="folder of the adapters TASK-finetuned; else embedded ones")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the backbone's own rows of generate")
    parser.add_argument("--data", default="scenes:held-out:500")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    look = functools.partial(read, load_reader(args.reader))
    told: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"tasks": {}}
    for name in args.tasks or [name for name in (*TASKS, COMPOSITION) if name not in told["tasks"]]:
        told["tasks"][name] = measure(name, args, look)
        told |= {"model": args.model, "data": args.data, "command": f"python benchmarks/tasks.py --data {args.data}"}
        write_json(told, args.out)


if __name__ == "__main__":
    main()
