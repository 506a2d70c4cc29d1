"""Every task in few steps beside the many-step model: FD-ENLite0, distance, obedience, latency on held-out scenes.

    python benchmarks/tasks.py --finetuned runs                  # the tasks that RESULTS does not hold yet
    python benchmarks/tasks.py --finetuned runs --tasks depth    # one of them again; the others' rows stay

Few steps, 1, 2 and 4, with the guidance that is distilled in: `pe-codi`, the adapter of each task, embedded or from
--adapters (backbone frozen), and `codi`, the adapter `<task>-full` of --full, if there is one (backbone trained too).

Many steps, 50, and 4 to compare: `finetuned`, the adapter `<task>-finetuned` (plain diffusion loss, same form and
budget), embedded or from --finetuned; for `generate` the `backbone` itself. Nothing is distilled into these, so they
get classifier-free guidance, two passes a step, at the text scale of `pe-codi`. For `edit` the text scale alone can be
matched that way: the picture's is distilled into the few-step adapter, and the reference has none. As another scale
may suit them better, 50 steps are measured at one more: without guidance, or the backbone at --guidance.

`ratios` compare each few-step row with the 50-step row of the better FD, so that nothing wins by a weak reference:
`against` names it; FD (lower is better), obedience (higher is better), speed (how many times faster).

Obedience is what the task measures itself (upscale, canny, edit) or what the scene reader says (inpaint, depth,
generate; see judges.py); `judge_on_truth` holds the same judge's figures on the true pictures, `judged` how many of
them have something to measure. `composition` sets the adapters of depth and inpaint at once and apart, on the same
holes and depth maps.
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
from command import command_line, public
from judges import Judge, Read, caption_judge, depth_judge, hole_judge
from reading import WEIGHTS, load_reader, read
from torch import Tensor

from codi.apps.common import choose_device
from codi.data.batches import Batch
from codi.data.sources import open_source
from codi.evaluation.evaluate import Method, describe_machine, evaluate, pipeline_method
from codi.evaluation.metrics import Features
from codi.evaluation.report import write_json
from codi.models.adapter_files import find_adapter
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS, Task, means
from codi.tasks.base import CAP
from codi.tasks.depth import Depth
from codi.tasks.inpaint import Inpaint

RESULTS = Path("benchmarks/results/tasks.json")
FEW, MANY = (1, 2, 4), 50
PE, FULL = "pe-codi", "codi"  # few-step methods: the backbone frozen, the backbone trained too
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

    def figures(self) -> dict[str, Tensor]:
        """Those on the truth, of all samples."""
        parts = list(self.truth.values())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


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

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading, hole = read(output), given[:, 3] > 0.5
        error = (reading.disparity - given[:, 4]).square().where(hole, 0).sum((1, 2)).double() / hole.sum((1, 2))
        depth = {"hole_depth_db": (-10 * error.clamp_min(1e-12).log10()).clamp_max(CAP)}
        return hole_judge(lambda _: reading)(output, given, batch) | depth

    return judge


def folder_of(adapter: str, *places: Path | None) -> Path | None:
    """Where an adapter lies: in the first of `places` that has it, else embedded; None where it is nowhere."""
    folders = [*(place / adapter for place in places if place), find_adapter(adapter)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(args: argparse.Namespace, task: str | None = None, adapter: Path | None = None) -> CoDiPipeline:
    """A pipeline that draws no bars. Raises UserError where there is no such adapter."""
    pipe = CoDiPipeline.from_pretrained(args.model, task=task, adapter=adapter).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def composition_methods(args: argparse.Namespace) -> list[Method]:
    """Inpaint alone, and inpaint with depth at several weights, 4 steps."""
    pipe = load(args)
    for name in ("inpaint", "depth"):
        pipe.load_adapter(folder_of(name, args.adapters) or name, as_=name)

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
    """The few-step adapters of a task and what they are compared with, and the task as it is measured."""
    pipe = load(args, name, folder_of(name, args.adapters))
    assert pipe.task is not None
    methods = [pipeline_method(pipe, FEW, PE)]
    if folder := folder_of(f"{name}-full", args.full):
        methods.append(pipeline_method(load(args, name, folder), FEW, FULL))
    return [*methods, *references(name, args, pipe.guidance().scales["text"])], pipe.task.measured()


def references(name: str, args: argparse.Namespace, scale: float) -> list[Method]:
    """A task's many-step model at the guidance scale of the few-step one, and at another; none if there is no such
    adapter."""
    if name == "generate":
        pipe, label, other = load(args), "backbone", args.guidance
    elif folder := folder_of(f"{name}-finetuned", args.finetuned):
        pipe, label, other = load(args, name, folder), "finetuned", 1.0
    else:
        print(f"{name}: no adapter {name}-finetuned: few-step rows alone", file=sys.stderr)
        return []
    methods = [pipeline_method(pipe, (4, MANY), label, scale)]
    if other != scale:
        how = "no guidance" if other == 1 else f"guidance {other:g}"
        methods.append(pipeline_method(pipe, (MANY,), f"{label}, {how}", other))
    return methods


def measure(name: str, args: argparse.Namespace, look: Read) -> dict[str, Any]:
    """One task's entry of the results."""
    if name == COMPOSITION:
        methods, task, make_judge = composition_methods(args), DepthInpaint(), composition_judge
    else:
        methods, task = methods_of(name, args)
        make_judge = JUDGES.get(name)
    witness = Witness(make_judge(look), task) if make_judge else None
    columns = list(task.columns)
    if make_judge in (hole_judge, composition_judge) and "mask" not in columns:
        columns.append("mask")
    results = evaluate(
        methods, task, open_source(args.data, columns), args.count, batch=25, size=args.size, judge=witness, keep=1,
        features=Features(device=args.device),
        progress=lambda done, total: print(f"\r{name} {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    rows = [asdict(row) | {"obedience": row.measures.get(HEADLINES[name])} for row in results.rows]
    truth = witness.figures() if witness else {}
    return {
        "count": results.count,
        "obedience": HEADLINES[name],
        "task_options": task.config(),
        "judge_on_truth": means(truth),
        "judged": {figure: int((~values.isnan()).sum()) for figure, values in truth.items()},
        "rows": rows,
        "ratios": ratios(rows),
        "model": public(args.model),
        "data": public(args.data),
        "size": args.size,
        "device": args.device,
        "machine": describe_machine(),
        "command": command_line(),
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{few-step method: {"1": {"against": many-step method, "fd": few / many, "obedience": few / many, "speed": ...},
    ...}, ...}; {} where there is no many-step row, obedience None where many steps have none."""
    many = min((row for row in rows if row["steps"] == MANY), key=lambda row: row["fd"], default=None)
    if many is None:
        return {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["method"] in (PE, FULL):
            found.setdefault(row["method"], {})[str(row["steps"])] = {
                "against": many["method"],
                "fd": row["fd"] / many["fd"],
                "obedience": row["obedience"] / many["obedience"] if many["obedience"] else None,
                "speed": many["latency_ms"] / row["latency_ms"],
            }
    return found


def main() -> None:
    """Measures task by task; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS, COMPOSITION], help="measure these, again if need be")
    parser.add_argument("--adapters", type=Path, help="folder of the adapters TASK; else embedded ones")
    parser.add_argument("--finetuned", type=Path, help="folder of the adapters TASK-finetuned; else embedded ones")
    parser.add_argument("--full", type=Path, help="folder of the adapters TASK-full, whose backbone was trained too")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the backbone's second 50-step row of generate")
    parser.add_argument("--data", default="scenes:held-out:500")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args()
    args.device = choose_device(args.device)

    look = functools.partial(read, load_reader(args.reader).to(args.device), device=args.device)
    told: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"tasks": {}}
    for name in args.tasks or [name for name in (*TASKS, COMPOSITION) if name not in told["tasks"]]:
        told["tasks"][name] = measure(name, args, look)
        write_json(told, args.out)


if __name__ == "__main__":
    main()
