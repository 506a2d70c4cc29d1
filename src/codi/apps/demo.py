"""`codi demo`: a gallery of every task on the embedded model, then a little training."""

from __future__ import annotations

import inspect
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import write_text
from .common import Device, DType, Json, Model, Seed, choose_device, hide_loading_bars, print_json, working

if TYPE_CHECKING:
    from ..sampling.pipeline import CoDiPipeline
    from .gallery import Section

EXAMPLE = "Example: codi demo --out demo"
PHOTOGRAPHS = {"astronaut": "astronaut", "chelsea": "cat", "coffee": "coffee"}  # scikit-image's names -> titles
NO_PHOTOGRAPHS = "scikit-image is not installed, so there are no photographs here: pip install scikit-image"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("demo"),
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out scenes a task; by default what this machine makes in time, 2 to 6."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="How long to train; 0 leaves the training out.")] = 0.5,
    model: Model = "mini",
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters named after their tasks; by default the embedded ones.")
    ] = None,
    finetuned: Annotated[
        Path | None, typer.Option(help="A folder of TASK-finetuned adapters: the many-step models to compare with.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "float32",
    json_: Json = False,
) -> None:
    """A gallery of every task in 1, 2 and 4 steps beside many steps, as one page, and half a minute of training."""
    with working(f"loading {model}"):
        import torch

        from ..sampling.pipeline import CoDiPipeline

        hide_loading_bars()
        pipe = CoDiPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(choose_device(device))
    pipe.set_progress_bar_config(disable=True)
    say = (lambda line: None) if json_ else print
    told = tour(
        pipe, out, model=model, adapters=adapters, finetuned=finetuned, count=count, minutes=minutes, seed=seed,
        device=device, say=say,
    )  # fmt: skip
    if json_:
        print_json(told)
    else:
        print(f"{told['seconds']:.0f} s in all: open {out / 'index.html'}")


def tour(
    pipe: CoDiPipeline,
    out: Path,
    *,
    model: str = "mini",
    adapters: Path | None = None,
    finetuned: Path | None = None,
    count: int | None = None,
    minutes: float = 0.5,
    seed: int = 0,
    device: str = "auto",
    photographs: Mapping[str, str] = PHOTOGRAPHS,
    changes: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Shows every task whose adapter is here, upscales the `photographs`, trains for `minutes`, and writes pictures,
    index.html, gallery.png and timings.json below `out`, over those of an earlier tour.

    `adapters` is a folder of adapters named after their tasks, `finetuned` one of many-step models, TASK-finetuned;
    None takes the embedded ones. `count`: the first held-out scenes; None takes what Show.fitting finds. `changes` go
    to the training's recipe.

    Returns what timings.json holds. Raises UserError where no task can be shown, the folder cannot be written or the
    training fails.
    """
    from ..data.writing import check_writable
    from ..evaluation.evaluate import describe_machine
    from ..evaluation.report import write_json
    from ..tasks import TASKS
    from . import gallery, page
    from .lesson import lesson
    from .show import FEW, Show

    began = time.perf_counter()
    check_writable(out / "gallery.png", overwrite=True)
    with working("loading adapters"):
        show = Show(pipe, out, seed, model, adapters, finetuned)
        count = count or show.fitting()
        samples = gallery.held_out(count, seed, show.side)
    told: dict[str, Any] = {
        "model": model, "seed": seed, "count": count, "size": show.side, "sections": [], "skipped": show.skipped,
        "adapters": show.adapters, "swap_ms": None, "training": None, "note": "", "machine": describe_machine(),
        "command": again(
            out=out, count=count, minutes=minutes, model=model, adapters=adapters, finetuned=finetuned, seed=seed,
            device=device, dtype=str(pipe.network.dtype).removeprefix("torch."),
        ),
    }  # fmt: skip

    def write() -> None:
        told["seconds"] = round(time.perf_counter() - began, 1)
        write_text(out / "index.html", page.build(told))
        write_json(told, out / "timings.json")

    def add(section: Section) -> None:
        told["sections"].append(asdict(section))
        spent = ", ".join(f"{section.columns[f['column']]} {f['ms']:.0f} ms" for f in section.figures if f["ms"])
        say(f"{section.title}: {spent}")
        write()  # there is something to look at from the first task on, and if the rest is interrupted

    for task in show.adapters:
        add(show.task(task, samples))
        if task == "upscale" and photographs:
            if found := show.photographs(photographs):
                add(found)
            else:
                told["note"] = NO_PHOTOGRAPHS
    told["swap_ms"] = show.swap_ms()
    for section in (show.guidance(samples[:FEW]), show.composition(samples[:FEW])):
        if section:
            add(section)
    gallery.overview([s for s in told["sections"] if s["name"] in TASKS], out / "gallery.png")
    for name, why in show.skipped.items():
        say(f"skipped {name}: {why}")
    if minutes:
        say(f"training an adapter for {minutes:g} min in {out / 'training'}")
        told["training"] = training = lesson(
            pipe, out, minutes, model=model, side=show.side, seed=seed, device=device, changes=changes
        )
        say(f"trained on {training['images']:,} images so far; the same command again goes on from there")
    write()
    return told


def again(**chosen: Any) -> str:
    """The command that makes the same page: what was chosen, as far as it is not the default."""
    usual = inspect.signature(demo).parameters
    words = [(f"--{name}", str(value)) for name, value in chosen.items() if value != usual[name].default]
    return shlex.join(["codi", "demo", *(word for pair in words for word in pair)])
