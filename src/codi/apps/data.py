"""`codi data`: rendering scenes, and looking at a data set before training on it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Json, Overwrite, Seed, print_json, progress, usage, working

app = typer.Typer(name="data", help="Make and check training data.", no_args_is_help=True)

ENOUGH = 20  # pictures from which on the share of corrupt ones is judged, as in training


@app.command("render", epilog="Example: codi data render 1000 -o scenes --size 64")
def render(
    count: Annotated[int, typer.Argument(min=1, metavar="N", help="How many scenes.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    size: Annotated[int, typer.Option(min=32, max=512, help="Side in pixels.")] = 64,
    split: Annotated[str, typer.Option(help="train, held-out or composition.")] = "train",
    seed: Seed = 0,
    edits: Annotated[bool, typer.Option(help="Render the scene after each edit instruction too.")] = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Render scenes with captions, depth, masks and edit pairs, as an imagefolder with metadata.jsonl."""
    from ..data.render import render_folder
    from ..data.scenes import SPLITS

    if split not in SPLITS:
        from ..errors import nearest

        with usage():
            raise UserError(f"--split {split}: unknown{nearest(split, SPLITS)}: use one of {', '.join(SPLITS)}")
    began = time.perf_counter()
    with progress("scenes") as bar:
        task = bar.add_task("rendering", total=count)
        render_folder(
            count, out, size, split, seed, edits, overwrite=overwrite, progress=lambda n: bar.update(task, completed=n)
        )
    seconds = time.perf_counter() - began
    if json_:
        print_json({"out": str(out), "count": count, "size": size, "split": split, "seconds": round(seconds, 3)})
    else:
        print(f"{out}: {count:,} scenes of {size} px in {seconds:.1f} s ({count / seconds:.0f}/s)")


@app.command("check", epilog="Example: codi data check photos --task upscale --size 64 --sheet look.png")
def check(
    folder: Annotated[str, typer.Argument(help="A folder of pictures or .tar files.", show_default=False)],
    task: Annotated[str, typer.Option(help="What is to be trained.")] = "upscale",
    size: Annotated[int, typer.Option(min=8, help="Side of training pictures in pixels.")] = 64,
    sheet: Annotated[Path | None, typer.Option(help="Write a preview of the first pictures (.png).")] = None,
    max_corrupt: Annotated[
        float, typer.Option(min=0, max=1, help="Share of corrupt files that training skips.")
    ] = 0.05,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Look at a data set before training: sizes, captions, broken files. Exit code 1 where training would fail."""
    with working(f"reading {folder}"):
        from ..data.check import check_folder
        from ..data.writing import check_writable
        from ..tasks import get_task

        with usage():
            chosen = get_task(task)
            scale = getattr(chosen, "scale", 1)
            if size % scale:
                raise UserError(f"--size {size}: not a multiple of the scale {scale}: use {size // scale * scale}")
        if sheet is not None:
            check_writable(sheet, overwrite, extensions=(".png",))
        report = check_folder(folder, task, size)
        broken, readable = len(report.corrupt), report.images - len(report.corrupt)
        faults = []
        if not readable:
            faults.append("no picture can be read")
        elif report.images >= ENOUGH and broken > max_corrupt * report.images:
            faults.append(f"{broken} of {report.images} files are corrupt, more than {max_corrupt:.0%}")
        if sheet is not None and readable:
            _write_sheet(folder, size, sheet, overwrite)
    if json_:
        print_json({"folder": folder, "task": task, **asdict(report), "faults": faults})
    else:
        print(f"{folder}: {report.images:,} pictures, shorter side {report.side_min} to {report.side_max} px, "
              f"median {report.side_median}; {report.captions_missing:,} without a caption")  # fmt: skip
        for bad in report.corrupt[:10]:
            print(f"  corrupt: {bad.file}: {bad.why}")
        if broken > 10:
            print(f"  and {broken - 10} more")
        if report.too_small:
            names = ", ".join(report.too_small[:3])
            print(f"  {len(report.too_small):,} smaller than {size} px would be enlarged, which teaches blur: {names}")
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}: repair or remove them before training")


def _write_sheet(folder: str, size: int, sheet: Path, overwrite: bool) -> None:
    import torch

    from ..data.check import contact_sheet
    from ..data.samples import Sample
    from ..data.sources import open_source
    from ..data.writing import write_png

    source = open_source(folder)
    samples = [s for s in source.read(range(min(32, len(source))), size) if isinstance(s, Sample)]
    if not samples:
        return
    import numpy as np

    pixels = np.asarray(contact_sheet([s.image for s in samples], columns=8), np.float32) / 255
    texts = {"captions": json.dumps([s.text for s in samples], ensure_ascii=False)}
    write_png(sheet, torch.from_numpy(pixels).permute(2, 0, 1), metadata=texts, overwrite=overwrite)
