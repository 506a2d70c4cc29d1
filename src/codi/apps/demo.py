"""`codi demo`: a gallery of every task on the embedded model, then a short training."""

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
from .common import Device, DType, Json, Model, Seed, choose_device, hide_loading_bars, print_json, spinner

if TYPE_CHECKING:
    from ..sampling.pipeline import CoDiPipeline
    from .gallery import Section

EXAMPLE = "Example: codi demo --out demo"
PHOTOGRAPHS = {"astronaut": "astronaut", "chelsea": "cat", "coffee": "coffee"}  # scikit-image's names -> titles
NO_PHOTOGRAPHS = "scikit-image is not installed, so no photographs are shown: pip install scikit-image"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("demo"),
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out scenes per task; by default 2 to 6, depending on the machine's speed."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Duration of the training; 0: no training.")] = 0.5,
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
    """Show every task in 1, 2 and 4 steps beside many steps, as one HTML page, and train for half a minute."""
    with spinner(f"loading {model}"):
        import torch

        from ..sampling.pipeline import CoDiPipeline

        hide_loading_bars()
        pipe = CoDiPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(choose_device(device))
    pipe.set_progress_bar_config(disable=True)
    say = (lambda line: None) if json_ else print
    result = make_gallery(
        pipe, out, model=model, adapters=adapters, finetuned=finetuned, count=count, minutes=minutes, seed=seed,
        device=device, say=say,
    )  # fmt: skip
    if json_:
        print_json(result)
    else:
        print(f"{result['seconds']:.0f} s in all: open {out / 'index.html'}")


def make_gallery(
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
    """Show every task that has an adapter, upscale the `photographs`, train for `minutes`, and write pictures,
    index.html, gallery.png and timings.json below `out`, replacing those of an earlier call.

    `adapters` is a folder of adapters named after their tasks, `finetuned` one of many-step models, TASK-finetuned;
    None uses the embedded ones. `count`: number of held-out scenes; None uses Show.fitting. `changes` override keys of
    the training's recipe.

    Returns the content of timings.json. Raises UserError where no task can be shown, the folder cannot be written or
    the training fails.
    """
    from ..data.writing import check_writable
    from ..evaluation.evaluate import describe_machine
    from ..evaluation.report import write_json
    from ..tasks import TASKS
    from . import gallery, page
    from .lesson import train_upscaler
    from .show import FEW, Show

    start = time.perf_counter()
    check_writable(out / "gallery.png", overwrite=True)
    with spinner("loading adapters"):
        show = Show(pipe, out, seed, model, adapters, finetuned)
        count = count or show.fitting()
        samples = gallery.held_out(count, seed, show.side)
    result: dict[str, Any] = {
        "model": model, "seed": seed, "count": count, "size": show.side, "sections": [], "skipped": show.skipped,
        "adapters": show.adapters, "swap_ms": None, "training": None, "note": "", "machine": describe_machine(),
        "command": repeat_command(
            out=out, count=count, minutes=minutes, model=model, adapters=adapters, finetuned=finetuned, seed=seed,
            device=device, dtype=str(pipe.network.dtype).removeprefix("torch."),
        ),
    }  # fmt: skip

    def write() -> None:
        result["seconds"] = round(time.perf_counter() - start, 1)
        write_text(out / "index.html", page.build(result))
        write_json(result, out / "timings.json")

    def add(section: Section) -> None:
        result["sections"].append(asdict(section))
        timings = ", ".join(f"{section.columns[f['column']]} {f['ms']:.0f} ms" for f in section.figures if f["ms"])
        say(f"{section.title}: {timings}")
        write()  # after each section, so that the page can be viewed at once and survives an interruption

    for task in show.adapters:
        add(show.task(task, samples))
        if task == "upscale" and photographs:
            if photograph_section := show.photographs(photographs):
                add(photograph_section)
            else:
                result["note"] = NO_PHOTOGRAPHS
    result["swap_ms"] = show.swap_ms()
    for section in (show.guidance(samples[:FEW]), show.composition(samples[:FEW])):
        if section:
            add(section)
    gallery.overview([s for s in result["sections"] if s["name"] in TASKS], out / "gallery.png")
    for name, reason in show.skipped.items():
        say(f"skipped {name}: {reason}")
    if minutes:
        say(f"training an adapter for {minutes:g} min in {out / 'training'}")
        result["training"] = training = train_upscaler(
            pipe, out, minutes, model=model, side=show.side, seed=seed, device=device, changes=changes
        )
        say(f"trained on {training['images']:,} images so far; the same command resumes from there")
    write()
    return result


def repeat_command(**chosen: Any) -> str:
    """Return the command that makes the same page: the `chosen` options that differ from their defaults."""
    defaults = inspect.signature(demo).parameters
    words = [(f"--{name}", str(value)) for name, value in chosen.items() if value != defaults[name].default]
    return shlex.join(["codi", "demo", *(word for pair in words for word in pair)])
