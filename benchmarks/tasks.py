"""Compare few-step adapters with the many-step model on every task: FD-ENLite0, distance, obedience and latency.

    python benchmarks/tasks.py --finetuned runs                  # entries that are missing or out of date
    python benchmarks/tasks.py --finetuned runs --tasks depth    # measure one entry again, keep the others
    python benchmarks/tasks.py --finetuned runs --rows codi=runs/depth-full hint=runs/depth-hint

Results are measured on held-out scenes. An entry is a task, or `upscale-x8` or `upscale-real`: upscaling with the
adapter of that name. Entries without an adapter are skipped. `adapters` records what an entry was measured with; when
one of them has been trained further, or on other weights of the backbone, the entry is measured again.

Few steps, 1, 2 and 4, with distilled guidance: `pe-codi-tuned`, the entry's adapter, embedded or from --adapters
(backbone frozen), and those of --rows with the same task options: `codi`, the recipes `<task>-full` (backbone trained
too), and `hint`, another form of adapter, `depth-hint`.

Many steps, 50, and 4 for comparison: `finetuned`, the adapter `<entry>-finetuned` (plain diffusion loss, same form and
budget), embedded or from --finetuned, if it exists; for `generate` the `backbone` itself. These have no distilled
guidance, so they get classifier-free guidance, two passes per step, at the text scale of `pe-codi-tuned`. For `edit`
only the text scale can be matched: the few-step adapter has distilled image guidance, and the reference has none. As
another scale may suit them better, 50 steps are also measured without guidance, or the backbone at --guidance.

`ratios` compare each few-step row with the 50-step row of lower FD, named in `against`: `fd` (ratio, lower is better),
`obedience` (ratio) or `obedience_db` (difference), higher is better, and `speed` (how many times faster).

Obedience is how well a result follows its input: measured by the task itself (upscale, canny, edit) or by the scene
reader (inpaint, depth, generate; see judges.py). `judge_on_truth` holds the same judge's figures on the true images,
`judged` how many of them have something to measure. `composition` applies the adapters of depth and inpaint together,
and inpaint alone, to the same holes and depth maps.
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
from codi.tasks import TASKS, Task, get_task, means
from codi.tasks.base import CAP
from codi.tasks.depth import Depth
from codi.tasks.inpaint import Inpaint

RESULTS = Path("benchmarks/results/tasks.json")
FEW, MANY = (1, 2, 4), 50
PE, REFERENCE = "pe-codi-tuned", "finetuned"  # few-step and many-step method of every entry
COMPOSITION = "composition"
ENTRIES = {**{name: name for name in TASKS}, "upscale-x8": "upscale", "upscale-real": "upscale"}  # adapter -> task

# The figure of task or judge that tables show as obedience.
HEADLINES = {
    "upscale": "input_psnr",
    "inpaint": "hole_objects",
    "depth": "depth_db",
    "canny": "edge_f1",
    "edit": "psnr_inside",
    "generate": "caption_all",
    COMPOSITION: "hole_objects",
}
DECIBELS = {"input_psnr", "depth_db", "psnr_inside"}  # headlines compared by difference, as they are logarithmic
JUDGES: dict[str, Callable[[Read], Judge]] = {
    "inpaint": hole_judge,
    "depth": depth_judge,
    "canny": caption_judge,
    "generate": caption_judge,
}


class RecordingJudge:
    """A judge that also judges the true images of each batch once and records the figures, for comparison."""

    def __init__(self, judge: Judge, task: Task) -> None:
        self.judge, self.task = judge, task
        self.truth: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __call__(self, output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        key = tuple(batch.index)
        if key not in self.truth:  # every method is judged on the same batches
            self.truth[key] = self.judge(self.task.truth(batch), inputs, batch)
        return self.judge(output, inputs, batch)

    def figures(self) -> dict[str, Tensor]:
        """Return the figures of the true images of all samples."""
        parts = list(self.truth.values())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


@dataclass(frozen=True)
class DepthInpaint(Task):
    """Inpainting with the target's depth map: the input is inpaint's four channels, then depth's one."""

    name: ClassVar[str] = COMPOSITION
    condition_channels: ClassVar[int] = 5

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns read: depth maps."""
        return ("conditioning_image",)

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the inputs (B, 5, H, W)."""
        return torch.cat([Inpaint().given(batch, generator), Depth().given(batch, generator)], 1)

    def condition(self, given: Tensor) -> Tensor:
        """Return the condition (B, 5, H, W) with a gray hole."""
        return torch.cat([Inpaint().condition(given[:, :4]), given[:, 4:]], 1)


def composition_judge(read: Read) -> Judge:
    """Return a judge of objects in the hole, as `hole_judge`, and of the disparity read there against the input's
    (dB)."""

    def judge(output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading, hole = read(output), inputs[:, 3] > 0.5
        error = (reading.disparity - inputs[:, 4]).square().where(hole, 0).sum((1, 2)).double() / hole.sum((1, 2))
        depth = {"hole_depth_db": (-10 * error.clamp_min(1e-12).log10()).clamp_max(CAP)}
        return hole_judge(lambda _: reading)(output, inputs, batch) | depth

    return judge


def folder_of(adapter: str, model: str, root: Path | None) -> Path | None:
    """Return the folder of an adapter, in `place` if it exists there, else embedded with `model`; None if neither."""
    folders = [*([root / adapter] if root else []), find_adapter(adapter, model)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(args: argparse.Namespace, task: str | None = None, adapter: Path | None = None) -> CoDiPipeline:
    """Return a pipeline without progress bars. Raises UserError if there is no such adapter."""
    pipe = CoDiPipeline.from_pretrained(args.model, task=task, adapter=adapter).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapters_of(entry: str, args: argparse.Namespace) -> dict[str, Path]:
    """Return the adapters of an entry, {method: folder}, for composition {adapter name: folder}; {} if its adapter does
    not exist."""
    if entry == COMPOSITION:
        parts = {name: folder_of(name, args.model, args.adapters) for name in ("inpaint", "depth")}
        return {name: folder for name, folder in parts.items() if folder} if all(parts.values()) else {}
    adapter = folder_of(entry, args.model, args.adapters)
    if adapter is None:
        return {}
    finetuned = None if entry == "generate" else folder_of(f"{entry}-finetuned", args.model, args.finetuned)
    extra = {name: folder for name, folder in args.rows if measured_task(folder) == measured_task(adapter)}
    return {PE: adapter, **extra, **({REFERENCE: finetuned} if finetuned else {})}


def info_of(folder: Path) -> dict[str, Any]:
    """Return the info dict of an adapter's config.json."""
    return json.loads((folder / "config.json").read_text())["info"]


def measured_task(folder: Path) -> Task:
    """Return the task that an adapter is evaluated on."""
    info = info_of(folder)
    return get_task(info["task"], **info["task_options"]).measured()


def described(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return for each adapter the images it was trained on, its size in bytes and its backbone's digest."""
    descriptions = {}
    for name, folder in folders.items():
        info, files = info_of(folder), [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        descriptions[name] = {"images": info.get("images"), "bytes": size, "backbone": info.get("backbone")}
    return descriptions


def stale(entry: str, entry_results: dict[str, Any], args: argparse.Namespace) -> bool:
    """Return whether an existing adapter differs from the one that `entry_results` were measured with. Deleted adapters
    do not count."""
    previous = entry_results.get("adapters", {})
    return any(previous.get(name) != current for name, current in described(adapters_of(entry, args)).items())


def composition_methods(args: argparse.Namespace) -> list[Method]:
    """Return inpaint alone and inpaint with depth at several weights, at 4 steps."""
    pipe = load(args)
    for name, folder in adapters_of(COMPOSITION, args).items():
        pipe.load_adapter(folder, as_=name)

    def composed(weight: float) -> Method:
        def run(inputs: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
            pipe.set_adapters(["inpaint", "depth"] if weight else "inpaint", [1.0, weight] if weight else None)
            images: Any = {"inpaint": inputs[:, :3], **({"depth": inputs[:, 4:]} if weight else {})}
            output: Any = pipe(
                image=images, mask=inputs[:, 3:4], prompt=prompts, steps=steps, seed=seeds, output_type="pt"
            )
            return output.images

        return Method(f"inpaint + {weight:g} depth" if weight else "inpaint", run, (4,))

    return [composed(weight) for weight in (0, 0.5, 1)]


def methods_of(entry: str, args: argparse.Namespace) -> tuple[list[Method], Task]:
    """Return the few-step adapters and many-step references of an entry, and the task that they are evaluated on."""
    name = ENTRIES[entry]
    pipes = {method: load(args, name, folder) for method, folder in adapters_of(entry, args).items()}
    label, reference_pipe = (REFERENCE, pipes.pop(REFERENCE, None)) if name != "generate" else ("backbone", load(args))
    adapter_pipe = pipes[PE]
    assert adapter_pipe.task is not None
    methods = [pipeline_method(pipe, FEW, method) for method, pipe in pipes.items()]
    if reference_pipe is not None:
        scale, second_scale = adapter_pipe.guidance().scales["text"], args.guidance if name == "generate" else 1.0
        methods.append(pipeline_method(reference_pipe, (4, MANY), label, scale))
        if second_scale != scale:
            guidance_label = "no guidance" if second_scale == 1 else f"guidance {second_scale:g}"
            methods.append(pipeline_method(reference_pipe, (MANY,), f"{label}, {guidance_label}", second_scale))
    return methods, adapter_pipe.task.measured()


def measure(entry: str, args: argparse.Namespace, read_scenes: Read) -> dict[str, Any]:
    """Measure one entry and return its results."""
    if entry == COMPOSITION:
        methods, task, make_judge = composition_methods(args), DepthInpaint(), composition_judge
    else:
        methods, task = methods_of(entry, args)
        make_judge = JUDGES.get(task.name)
    headline = HEADLINES[task.name]
    print(f"{entry}: {', '.join(method.name for method in methods)}", file=sys.stderr)
    judge = RecordingJudge(make_judge(read_scenes), task) if make_judge else None
    columns = list(task.columns)
    if make_judge in (hole_judge, composition_judge) and "mask" not in columns:
        columns.append("mask")
    results = evaluate(
        methods, task, open_source(args.data, columns), args.count, batch=25, size=args.size, judge=judge, keep=1,
        features=Features(device=args.device),
        progress=lambda done, total: print(f"\r{entry} {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    rows = [asdict(row) | {"obedience": row.measures.get(headline)} for row in results.rows]
    truth = judge.figures() if judge else {}
    return {
        "count": results.count,
        "obedience": headline,
        "adapters": described(adapters_of(entry, args)),
        "task_options": task.config(),
        "judge_on_truth": means(truth),
        "judged": {figure: int((~values.isnan()).sum()) for figure, values in truth.items()},
        "rows": rows,
        "ratios": ratios(rows, headline in DECIBELS),
        "model": public(args.model),
        "data": public(args.data),
        "size": args.size,
        "device": args.device,
        "machine": describe_machine(),
        "command": command_line(),
    }


def ratios(rows: list[dict[str, Any]], decibels: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {few-step method: {"1": {"against": many-step method, "fd": few / many, "obedience": few / many, "speed":
    many / few latency}, ...}, ...}; with `decibels` "obedience_db", few - many, instead of "obedience". Returns {}
    without a many-step row; obedience is None if the many-step row has none."""
    references = [row for row in rows if row["steps"] == MANY]
    if not references:
        return {}
    many = min(references, key=lambda row: row["fd"])
    key = "obedience_db" if decibels else "obedience"
    ratios_by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["method"] in {reference["method"] for reference in references} or row["steps"] == 0:  # 0: no model
            continue
        row_obedience, reference_obedience = row["obedience"], many["obedience"]
        obedience = (
            None
            if reference_obedience is None
            else row_obedience - reference_obedience
            if decibels
            else row_obedience / reference_obedience
            if reference_obedience
            else None
        )
        ratios_by_method.setdefault(row["method"], {})[str(row["steps"])] = {
            "against": many["method"],
            "fd": row["fd"] / many["fd"],
            key: obedience,
            "speed": many["latency_ms"] / row["latency_ms"],
        }
    return ratios_by_method


def named_folder(word: str) -> tuple[str, Path]:
    """Parse NAME=FOLDER of an adapter."""
    name, _, folder = word.partition("=")
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{word}: not NAME=FOLDER with an adapter's config.json in FOLDER")
    return name, Path(folder)


def main() -> None:
    """Measure entry by entry and write the results after each."""
    entries = [*ENTRIES, COMPOSITION]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tasks", nargs="*", choices=entries, help="measure these even if they are up to date")
    parser.add_argument("--adapters", type=Path, help="folder of adapters named ENTRY; default: embedded ones")
    parser.add_argument(
        "--finetuned", type=Path, help="folder of adapters named ENTRY-finetuned; default: embedded ones"
    )
    parser.add_argument("--rows", nargs="*", type=named_folder, default=[], help="NAME=FOLDER: more few-step adapters")
    parser.add_argument(
        "--guidance", type=float, default=3.0, help="guidance scale of the second 50-step backbone row of generate"
    )
    parser.add_argument("--data", default="scenes:held-out:500")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device")
    args = parser.parse_args()
    args.device = choose_device(args.device)

    read_scenes = functools.partial(read, load_reader(args.reader).to(args.device), device=args.device)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"tasks": {}}
    for entry in args.tasks or []:
        if not adapters_of(entry, args):
            parser.error(f"{entry}: its adapter is neither embedded nor in --adapters")
    for entry in args.tasks or [entry for entry in entries if stale(entry, results["tasks"].get(entry, {}), args)]:
        results["tasks"][entry] = measure(entry, args, read_scenes)
        results["tasks"] = {entry: results["tasks"][entry] for entry in entries if entry in results["tasks"]}
        write_json(results, args.out)


if __name__ == "__main__":
    main()
