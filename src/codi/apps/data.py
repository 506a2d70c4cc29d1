"""`codi data`: render scenes, and check a data set before training on it."""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, one_line
from .common import BadUsage, Json, Overwrite, Seed, print_json, progress, spinner, usage_errors

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..data.check import DataReport
    from ..tasks import Task

app = typer.Typer(name="data", help="Make and check training data.", no_args_is_help=True)

PREVIEWED = 16  # maximum number of samples on the sheet
NAMED = 10  # maximum number of corrupt files listed by name


@app.command("render", epilog="Example: codi data render 1000 -o scenes --size 64")
def render(
    count: Annotated[int, typer.Argument(min=1, metavar="N", help="Number of scenes.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    size: Annotated[int, typer.Option(min=32, max=512, help="Side in pixels.")] = 64,
    split: Annotated[str, typer.Option(help="train, held-out or composition.")] = "train",
    seed: Seed = 0,
    edits: Annotated[bool, typer.Option(help="Render the scene after each edit instruction too.")] = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Render scenes with captions, depth, masks and edit pairs, as an imagefolder with metadata.jsonl.

    The same command completes an interrupted render.
    """
    from ..data.render import render_folder
    from ..data.scenes import SPLITS

    if split not in SPLITS:
        from ..errors import nearest

        with usage_errors():
            raise UserError(f"--split {split}: unknown{nearest(split, SPLITS)}: use one of {', '.join(SPLITS)}")
    start = time.perf_counter()
    with progress("scenes") as bar:
        task = bar.add_task("rendering", total=count)
        render_folder(
            count, out, size, split, seed, edits, overwrite=overwrite, progress=lambda n: bar.update(task, completed=n)
        )
    seconds = time.perf_counter() - start
    if json_:
        print_json({"out": str(out), "count": count, "size": size, "split": split, "seconds": round(seconds, 3)})
    else:
        print(f"{out}: {count:,} scenes of {size} px in {seconds:.1f} s ({count / seconds:.0f}/s)")


@app.command("check", epilog="Example: codi data check photos --task upscale --size 64 --sheet look.png")
def check(
    folder: Annotated[
        str, typer.Argument(help="A folder of pictures, .tar files, scenes:SPLIT or datasets:NAME.", show_default=False)
    ],
    task: Annotated[str, typer.Option(help="The task to train.")] = "upscale",
    task_options: Annotated[
        str | None, typer.Option(help="Options of the task, as in a recipe: '{masks: \\[boxes, objects]}'.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of training pictures in pixels.")] = 64,
    model: Annotated[str, typer.Option(help="The model to train: its latent cells must fit the size.")] = "mini",
    count: Annotated[int | None, typer.Option(min=1, help="Check the first N pictures only (scenes: 256).")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the first samples as training sees them (.png).")] = None,
    max_corrupt: Annotated[
        float, typer.Option(min=0, max=1, help="Share of corrupt files that training tolerates.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the training, for the sheet.")] = 0,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Check a data set before training: pairs, sizes, ranges, captions, duplicates, broken files, conditions.

    Exit code 1 where training would fail.
    """
    with spinner(f"opening {folder}"):
        from ..data.check import check_data
        from ..data.writing import check_writable

        chosen = _parse_task(task, task_options)
        if size % chosen.scale:
            raise BadUsage(f"--size {size}: not a multiple of the scale {chosen.scale}: "
                           f"use {max(1, size // chosen.scale) * chosen.scale}")  # fmt: skip
        if sheet is not None:
            check_writable(sheet, overwrite, extensions=(".png",))
        cell = latent_cell(model)
    with progress("pictures") as bar:
        line = bar.add_task("reading", total=None)
        report = check_data(
            folder, chosen.columns, size, count, lambda done, total: bar.update(line, completed=done, total=total)
        )
    faults = report.faults(chosen.prompt_column, max_corrupt)
    if size % cell:
        fitting = max(1, round(size / cell)) * cell
        faults.append(f"size {size} is not a multiple of {cell}, the model's latent cell: use {fitting}")
    remarks: list[str] = []
    if report.readable and not any(column.missing for column in report.columns.values()):
        try:
            with spinner("making conditions"):
                batch = first_batch(chosen, folder, size, seed, min(PREVIEWED, report.looked))
                remarks = batch.remarks(chosen)
                if sheet is not None:
                    _write_sheet(batch, sheet, overwrite)
        except UserError as error:
            faults.append(str(error))
    if json_:
        print_json({"folder": folder, "task": task, **asdict(report), "remarks": remarks, "faults": faults})
    else:
        _print_report(folder, [_headline(report), *_report_lines(report, chosen, size), *remarks])
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}: correct this before training")


def _print_report(folder: str, lines: list[str]) -> None:
    """Print the first line after the folder's name, and the others below it."""
    for line in (f"{folder}: {lines[0]}", *(f"  {line}" for line in lines[1:])):
        print(line.encode(errors="backslashreplace").decode())  # file names may be invalid Unicode


def latent_cell(model: str) -> int:
    """Return the side of a latent cell in pixels from the model's config, without reading weights. Raises UserError for
    a folder that is not a model."""
    from diffusers import AutoencoderKL

    from ..models.backbones import find_model

    source = find_model(model)
    if source.endswith(".safetensors"):
        return 8  # such a file has no config; assume that of Stable Diffusion
    try:
        config: dict[str, Any] = AutoencoderKL.load_config(source, subfolder="vae")  # type: ignore[assignment]
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no model there: give mini, a Stable Diffusion folder or a hub id") from error
    return 2 ** (len(config["block_out_channels"]) - 1)


def _parse_task(name: str, options: str | None) -> Task:
    from ..data.text_files import parse_yaml
    from ..tasks import get_task

    try:
        values = parse_yaml(options) if options else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise BadUsage(f"--task-options {one_line(options)}: not `key: value` pairs: write '{{scale: 8}}'")
    with usage_errors():
        return get_task(name, **values)


@dataclass
class FirstBatch:
    """The first batch of a training: `given` from the task, `condition` (B, condition_channels, S, S), `truth`
    (B, 3, S, S)."""

    given: Tensor
    condition: Tensor
    truth: Tensor
    prompts: list[str]

    def remarks(self, task: Task) -> list[str]:
        """Return warnings on the batch: faults with which training would not fail."""
        remarks, count = [], len(self.prompts)
        flat = int((self.condition.flatten(1).amax(1) == self.condition.flatten(1).amin(1)).sum())
        if flat and self.given.shape[1]:  # a task without an input image has no condition
            remarks.append(f"{flat} of {count} conditions are flat, without any information: look at the sheet")
        if task.prompted and not any(self.prompts):
            remarks.append(f"none of {count} samples has a prompt: task {task.name} would learn to ignore prompts")
        return remarks


def first_batch(task: Task, spec: str, size: int, seed: int, count: int) -> FirstBatch:
    """Return the first `count` samples as a training of `task` with this seed would see them in its first batch: the
    same files, crops, inputs and conditions. Raises UserError where that training would, and for a condition or a truth
    of a wrong shape or range."""
    from ..data.batches import batches
    from ..data.sources import open_source
    from ..training.trainer import step_generator

    batch = next(batches(open_source(spec, task.columns), count, size, seed, max_corrupt=1.0))
    given = task.given(batch, step_generator(seed, 0, 0))
    condition, truth = task.condition(given).float(), task.truth(batch)
    for name, pixels, channels in (("condition", condition, task.condition_channels), ("truth", truth, 3)):
        expected = (count, channels, size, size)
        if pixels.shape != expected:
            raise UserError(
                f"task {task.name}: its {name} is {tuple(pixels.shape)}, not {expected}: correct the task or the data"
            )
        if not bool(pixels.isfinite().all()) or pixels.min() < 0 or pixels.max() > 1:
            raise UserError(f"task {task.name}: its {name} leaves [0, 1]: correct the task or the data")
    return FirstBatch(given, condition, truth, task.prompts(batch))


def _headline(report: DataReport) -> str:
    checked = "" if report.looked == report.images else f", {report.looked:,} of them checked"
    return (f"{report.images:,} pictures{checked}, shorter side {report.side_min} to {report.side_max} px, "
            f"median {report.side_median}; {report.captions_missing:,} without a caption")  # fmt: skip


def _report_lines(report: DataReport, task: Task, size: int) -> list[str]:
    lines = []
    for unit, (least, middle, most) in (("captions", report.caption_words), ("instructions", report.instruction_words)):
        if most:
            lines.append(f"{unit}: {least} to {most} words, median {middle}")
    if task.prompt_column == "instruction" and report.instructions_missing:
        lines.append(f"{report.instructions_missing:,} without an instruction")
    for name, column in report.columns.items():
        facts = [f"{name}: {column.found:,} of {report.readable:,} pairs"]
        if column.found:
            bits = " and ".join(map(str, column.bits))
            facts.append(f"{bits} bit, values {column.low:g} to {column.high:g}, {column.zero_share:.1%} of pixels 0")
        for number, description in (
            (column.most_ids, "ids in one file at most"),
            (column.resized, "of another resolution than their picture, scaled to fit"),
            (column.unchanged, "equal to their picture"),
        ):
            facts += [f"{number:,} {description}"] if number else []
        lines.append("; ".join(facts))
    lines += [f"corrupt: {bad.file}: {bad.why}" for bad in report.corrupt[:NAMED]]
    if len(report.corrupt) > NAMED:
        lines.append(f"and {len(report.corrupt) - NAMED} more")
    if report.too_small:
        names = ", ".join(report.too_small[:3])
        lines.append(
            f"{len(report.too_small):,} smaller than {size} px would be enlarged, so training would teach blur: {names}"
        )
    if report.unused:
        names = ", ".join(report.unused[:3])
        lines.append(
            f"{len(report.unused):,} left out, without a line in the metadata or a picture in the tar: {names}"
        )
    for groups, description in ((report.duplicates, "the same file"), (report.near_duplicates, "look alike")):
        if groups:
            number = sum(map(len, groups))
            lines.append(f"{number:,} pictures in {len(groups):,} groups are {description}: {', '.join(groups[0][:3])}")
    return lines


def _write_sheet(batch: FirstBatch, path: Path, overwrite: bool) -> None:
    """Write a row for each sample: the condition's picture, its maps, the truth and the prompt."""
    import numpy as np
    import torch

    from ..data.writing import write_png
    from ..evaluation import contact_sheet

    channels = range(3, batch.condition.shape[1])
    maps = {f"map {channel - 2}": batch.condition[:, channel : channel + 1] for channel in channels}
    sheet = contact_sheet({"condition": batch.condition[:, :3], **maps, "truth": batch.truth})
    if any(batch.prompts):
        sheet = _add_texts(sheet, batch.prompts)
    pixels = torch.from_numpy(np.asarray(sheet, np.float32) / 255).permute(2, 0, 1)
    write_png(path, pixels, metadata={"prompts": json.dumps(batch.prompts)}, overwrite=overwrite)


def _add_texts(sheet: Image.Image, texts: list[str], width: int = 260) -> Image.Image:
    """Return the sheet with a text at the right of each row."""
    from PIL import Image, ImageDraw

    wide = Image.new("RGB", (sheet.width + width, sheet.height), "white")
    wide.paste(sheet)
    draw = ImageDraw.Draw(wide)
    row = (sheet.height - 20) / len(texts)  # below a heading of about 20 pixels
    for number, text in enumerate(texts):
        draw.multiline_text((sheet.width, 20 + number * row), textwrap.fill(text, 40), fill="black", font_size=12)
    return wide
