"""Every task in few steps beside the many-step model: FD-ENLite0, distance, obedience, latency on held-out scenes.

    python benchmarks/tasks.py --finetuned runs                  # what RESULTS lacks, or holds of other adapters
    python benchmarks/tasks.py --finetuned runs --tasks depth    # one of them again; the others' rows stay
    python benchmarks/tasks.py --finetuned runs --rows codi=runs/depth-full hint=runs/depth-hint

An entry is a task, or `upscale-x8`, `upscale-real`: upscaling with the adapter of that name. Those whose adapter is
nowhere are left out. `adapters` says what an entry was measured with: when one of them is trained further, or on other
weights of the backbone, the entry is measured again.

Few steps, 1, 2 and 4, with the guidance that is distilled in: `pe-codi-tuned`, the entry's adapter, embedded or from
--adapters (backbone frozen), and any that --rows names, at the task whose options it was trained with: as `codi` the
recipes `<task>-full` (backbone trained too), as `hint` another form of adapter, `depth-hint`.

Many steps, 50, and 4 to compare: `finetuned`, the adapter `<entry>-finetuned` (plain diffusion loss, same form and
budget), embedded or from --finetuned, if there is one; for `generate` the `backbone` itself. Nothing is distilled into
these, so they get classifier-free guidance, two passes a step, at the text scale of `pe-codi-tuned`. For `edit` the
text scale alone can be matched that way: the picture's is distilled into the few-step adapter, and the reference has
none. As another scale may suit them better, 50 steps are measured at one more: without guidance, or the backbone at
--guidance.

`ratios` compare each few-step row with the 50-step row of the better FD: `against` names it; `fd` (times, lower is
better), `obedience` (times) or `obedience_db` (more), higher is better, `speed` (how many times faster).

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
from codi.tasks import TASKS, Task, get_task, means
from codi.tasks.base import CAP
from codi.tasks.depth import Depth
from codi.tasks.inpaint import Inpaint

RESULTS = Path("benchmarks/results/tasks.json")
FEW, MANY = (1, 2, 4), 50
PE, REFERENCE = "pe-codi-tuned", "finetuned"  # methods that every entry may have: in few steps, in many
COMPOSITION = "composition"
ENTRIES = {**{name: name for name in TASKS}, "upscale-x8": "upscale", "upscale-real": "upscale"}  # adapter -> task

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
DECIBELS = {"input_psnr", "depth_db", "psnr_inside"}  # headlines that are compared by difference: logarithms already
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


def folder_of(adapter: str, model: str, place: Path | None) -> Path | None:
    """Where an adapter lies: in `place` if it is there, else among those of `model`; None where it is nowhere."""
    folders = [*([place / adapter] if place else []), find_adapter(adapter, model)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(args: argparse.Namespace, task: str | None = None, adapter: Path | None = None) -> CoDiPipeline:
    """A pipeline that draws no bars. Raises UserError where there is no such adapter."""
    pipe = CoDiPipeline.from_pretrained(args.model, task=task, adapter=adapter).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapters_of(entry: str, args: argparse.Namespace) -> dict[str, Path]:
    """What an entry is measured with: method -> adapter folder, of composition name -> folder; {} where its adapter is
    nowhere."""
    if entry == COMPOSITION:
        parts = {name: folder_of(name, args.model, args.adapters) for name in ("inpaint", "depth")}
        return {name: folder for name, folder in parts.items() if folder} if all(parts.values()) else {}
    own = folder_of(entry, args.model, args.adapters)
    if own is None:
        return {}
    many = None if entry == "generate" else folder_of(f"{entry}-finetuned", args.model, args.finetuned)
    more = {name: folder for name, folder in args.rows if measured_task(folder) == measured_task(own)}
    return {PE: own, **more, **({REFERENCE: many} if many else {})}


def info_of(folder: Path) -> dict[str, Any]:
    """What an adapter says of itself."""
    return json.loads((folder / "config.json").read_text())["info"]


def measured_task(folder: Path) -> Task:
    """The task that figures of an adapter are taken with."""
    info = info_of(folder)
    return get_task(info["task"], **info["task_options"]).measured()


def described(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Of each adapter how long it was trained, on which weights of the backbone, and its size on disk."""
    told = {}
    for name, folder in folders.items():
        info, files = info_of(folder), [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        told[name] = {"images": info.get("images"), "bytes": size, "backbone": info.get("backbone")}
    return told


def stale(entry: str, told: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether an adapter at hand is not the one that the results `told` were measured with. One that is not at hand
    any more changes nothing."""
    before = told.get("adapters", {})
    return any(before.get(name) != now for name, now in described(adapters_of(entry, args)).items())


def composition_methods(args: argparse.Namespace) -> list[Method]:
    """Inpaint alone, and inpaint with depth at several weights, 4 steps."""
    pipe = load(args)
    for name, folder in adapters_of(COMPOSITION, args).items():
        pipe.load_adapter(folder, as_=name)

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


def methods_of(entry: str, args: argparse.Namespace) -> tuple[list[Method], Task]:
    """The few-step adapters of an entry and what they are compared with, and the task as it is measured."""
    name = ENTRIES[entry]
    pipes = {method: load(args, name, folder) for method, folder in adapters_of(entry, args).items()}
    label, many = (REFERENCE, pipes.pop(REFERENCE, None)) if name != "generate" else ("backbone", load(args))
    few = pipes[PE]
    assert few.task is not None
    methods = [pipeline_method(pipe, FEW, method) for method, pipe in pipes.items()]
    if many is not None:
        scale, other = few.guidance().scales["text"], args.guidance if name == "generate" else 1.0
        methods.append(pipeline_method(many, (4, MANY), label, scale))
        if other != scale:
            how = "no guidance" if other == 1 else f"guidance {other:g}"
            methods.append(pipeline_method(many, (MANY,), f"{label}, {how}", other))
    return methods, few.task.measured()


def measure(entry: str, args: argparse.Namespace, look: Read) -> dict[str, Any]:
    """One entry of the results."""
    if entry == COMPOSITION:
        methods, task, make_judge = composition_methods(args), DepthInpaint(), composition_judge
    else:
        methods, task = methods_of(entry, args)
        make_judge = JUDGES.get(task.name)
    headline = HEADLINES[task.name]
    print(f"{entry}: {', '.join(method.name for method in methods)}", file=sys.stderr)
    witness = Witness(make_judge(look), task) if make_judge else None
    columns = list(task.columns)
    if make_judge in (hole_judge, composition_judge) and "mask" not in columns:
        columns.append("mask")
    results = evaluate(
        methods, task, open_source(args.data, columns), args.count, batch=25, size=args.size, judge=witness, keep=1,
        features=Features(device=args.device),
        progress=lambda done, total: print(f"\r{entry} {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    rows = [asdict(row) | {"obedience": row.measures.get(headline)} for row in results.rows]
    truth = witness.figures() if witness else {}
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
    """{few-step method: {"1": {"against": many-step method, "fd": few / many, "obedience": few / many, "speed": ...},
    ...}, ...}; with `decibels` "obedience_db", few - many, instead. {} where there is no many-step row, obedience None
    where many steps have none."""
    references = [row for row in rows if row["steps"] == MANY]
    if not references:
        return {}
    many = min(references, key=lambda row: row["fd"])
    key = "obedience_db" if decibels else "obedience"
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["method"] in {reference["method"] for reference in references} or row["steps"] == 0:  # 0: no model
            continue
        few, best = row["obedience"], many["obedience"]
        obedience = None if best is None else few - best if decibels else few / best if best else None
        found.setdefault(row["method"], {})[str(row["steps"])] = {
            "against": many["method"],
            "fd": row["fd"] / many["fd"],
            key: obedience,
            "speed": many["latency_ms"] / row["latency_ms"],
        }
    return found


def named_folder(word: str) -> tuple[str, Path]:
    """NAME=FOLDER of an adapter."""
    name, _, folder = word.partition("=")
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{word}: not NAME=FOLDER with an adapter's config.json in FOLDER")
    return name, Path(folder)


def main() -> None:
    """Measures entry by entry; writes after each."""
    entries = [*ENTRIES, COMPOSITION]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tasks", nargs="*", choices=entries, help="measure these, again if need be")
    parser.add_argument("--adapters", type=Path, help="folder of the adapters ENTRY; else embedded ones")
    parser.add_argument("--finetuned", type=Path, help="folder of the adapters ENTRY-finetuned; else embedded ones")
    parser.add_argument("--rows", nargs="*", type=named_folder, default=[], help="NAME=FOLDER: more few-step adapters")
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
    for entry in args.tasks or []:
        if not adapters_of(entry, args):
            parser.error(f"{entry}: its adapter is neither embedded nor in --adapters")
    for entry in args.tasks or [entry for entry in entries if stale(entry, told["tasks"].get(entry, {}), args)]:
        told["tasks"][entry] = measure(entry, args, look)
        told["tasks"] = {entry: told["tasks"][entry] for entry in entries if entry in told["tasks"]}
        write_json(told, args.out)


if __name__ == "__main__":
    main()
