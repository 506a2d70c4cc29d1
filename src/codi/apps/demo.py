"""`codi demo`: a tour on the embedded model: real files upscaled in 1, 2 and 4 steps, then a minute of training."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .common import Adapter, Device, DType, Json, Model, Seed, load_pipeline, print_json, watched, working

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.pipeline import CoDiPipeline
    from ..training.distill import DistillRecipe

EXAMPLE = "Example: codi demo --out demo"
STEPS = (1, 2, 4)
PHOTOGRAPHS = {"astronaut": "astronaut", "chelsea": "cat", "coffee": "coffee"}  # scikit-image's files -> titles
NO_PHOTOGRAPHS = "scikit-image is not installed, so there are no photographs here: pip install scikit-image"


@dataclass(frozen=True)
class Original:
    """A true picture (3, H, W) in [0, 1] of a `group`, "scenes" or "photographs"."""

    name: str
    title: str
    group: str
    truth: Tensor


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0, help="How long to train; 0 leaves the training out.")] = 1.0,
    model: Model = "mini",
    adapter: Adapter = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "float32",
    json_: Json = False,
) -> None:
    """A tour on the embedded model: pictures, a page to look at them, timings, a minute of training."""
    pipe = load_pipeline(model, "upscale", adapter, device, dtype)
    say = (lambda line: None) if json_ else print
    told = tour(pipe, out, model=model, minutes=minutes, seed=seed, device=device, say=say)
    if json_:
        print_json(told)
    else:
        print(f"{told['seconds']:.0f} s in all: open {out / 'index.html'}")


def tour(
    pipe: CoDiPipeline,
    out: Path,
    *,
    model: str = "mini",
    minutes: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    scenes: int = 6,
    photographs: Sequence[str] = tuple(PHOTOGRAPHS),
    changes: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Upscales `scenes` held-out scenes and the `photographs` at `STEPS`, trains for `minutes`, and writes pictures,
    index.html and timings.json below `out`, over those of an earlier tour. `changes` go to the training's recipe.

    Returns what timings.json holds. Raises UserError where the folder cannot be written or the training fails.
    """
    from ..evaluation.evaluate import describe_machine
    from ..evaluation.report import write_json
    from . import page

    began = time.perf_counter()
    side = _side(pipe)
    with working("upscaling"):
        photos = _photographs(photographs, 3 * side, pipe.task.scale)  # type: ignore[union-attr]
        note = "" if photos or not photographs else NO_PHOTOGRAPHS
        originals = _scenes(scenes if photos else max(scenes, 8), side, seed) + photos
        seconds = _make(pipe, originals, out, seed, model)
        figures = _figures(pipe, originals, out, seconds)
        sheets = _sheets(originals, out)
    spent = {str(n): round(1000 * median(seconds[n]), 1) for n in STEPS}
    say(f"{out}: {len(originals)} files upscaled, " + ", ".join(f"{n} steps {ms:.0f} ms" for n, ms in spent.items()))
    told = {
        "model": model,
        "scale": pipe.task.scale,  # type: ignore[union-attr]
        "pictures": len(originals),
        "sheets": sheets,
        "upscale_ms": spent,
        "figures": figures,
        "training": None,
        "note": note,
        "machine": describe_machine(),
    }

    def write() -> None:
        told["seconds"] = round(time.perf_counter() - began, 1)
        page.write(out / "index.html", page.build([(o.name, o.title, o.group) for o in originals], told))
        write_json(told, out / "timings.json")

    write()  # there is something to look at while it trains, and if that is interrupted
    if note:
        say(note)
    if minutes:
        say(f"training an adapter for {minutes:g} min in {out / 'training'}")
        told["training"] = training = _train(_recipe(pipe, out, model, side, seed, device, changes or {}), minutes)
        say(f"trained on {training['images']:,} images so far; the same command again goes on from there")
        write()
    return told


def _side(pipe: CoDiPipeline) -> int:
    """The backbone's own picture size, as far as scenes are rendered at it."""
    from ..models import codec

    return max(32, min(512, pipe.unet.config["sample_size"] * codec.downscale(pipe.vae)))


def _scenes(count: int, side: int, seed: int) -> list[Original]:
    """The first held-out scenes: not picked."""
    from ..data.samples import Sample
    from ..data.sources import open_source

    samples = open_source(f"scenes:held-out:{count}:{seed}").read(range(count), side)
    return [Original(f"scene-{s.index}", s.text, "scenes", s.image) for s in samples if isinstance(s, Sample)]


def _photographs(names: Sequence[str], side: int, scale: int) -> list[Original]:
    """The centre squares of photographs that scikit-image ships, shrunk to at most `side` pixels; none without it."""
    try:
        import skimage.data
    except ImportError:
        return []
    import torch
    import torch.nn.functional as F

    found = []
    for name in names:
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255
        square = min(pixels.shape[-2:])
        top, left = ((length - square) // 2 for length in pixels.shape[-2:])
        pixels = pixels[None, :, top : top + square, left : left + square]
        size = min(side, square) // scale * scale
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        found.append(Original(name, PHOTOGRAPHS.get(name, name), "photographs", pixels[0]))
    return found


def _make(pipe: CoDiPipeline, originals: list[Original], out: Path, seed: int, model: str) -> dict[int, list[float]]:
    """Writes truth, input and bicubic files, then upscales the input files as `codi upscale` does. Returns the seconds
    of each picture by step count."""
    from ..data.images import read_image
    from ..data.writing import write_png
    from ..tasks.degradations import bicubic
    from .upscale import Settings, plan, run

    task = pipe.task
    assert task is not None
    for original in originals:
        name, truth = f"{original.name}.png", original.truth
        write_png(out / "truth" / name, truth, overwrite=True)
        write_png(out / "input" / name, bicubic(truth[None], task.scale)[0], overwrite=True)  # type: ignore[attr-defined]
        given = read_image(out / "input" / name).rgb  # the file's 8 bits are what everyone gets
        write_png(out / "bicubic" / name, task.condition(given[None])[0], overwrite=True)
    inputs = [out / "input" / f"{o.name}.png" for o in originals]

    def fail(error: UserError) -> None:
        raise error

    seconds: dict[int, list[float]] = {}
    pipe(image=read_image(inputs[0]).rgb, steps=1)  # the first call of a process is slower
    for steps in STEPS:
        jobs = plan(inputs, out / f"steps-{steps}", overwrite=True)
        settings = Settings(model=model, steps=steps, seed=seed, batch=1, overwrite=True)
        seconds[steps] = [row["seconds"] for row in run(pipe, jobs, settings, fail)]
    return seconds


def _figures(
    pipe: CoDiPipeline, originals: list[Original], out: Path, seconds: dict[int, list[float]]
) -> list[dict[str, Any]]:
    """Means over each group, measured on the files written: one row for bicubic and each step count."""
    from ..evaluation import enlite0_distance, psnr

    rows = []
    for group in dict.fromkeys(o.group for o in originals):
        members = [(k, o) for k, o in enumerate(originals) if o.group == group]
        for folder, steps in (("bicubic", 0), *((f"steps-{n}", n) for n in STEPS)):
            values: dict[str, list[float]] = {"psnr": [], "distance": [], "obedience": []}
            for _, original in members:
                truth, given, made = (_read(out, f, original)[None] for f in ("truth", "input", folder))
                values["psnr"].append(float(psnr(made, truth)))
                values["distance"].append(float(enlite0_distance(made, truth)))
                values["obedience"].append(float(pipe.task.obedience(made, given)))  # type: ignore[union-attr]
            spent = fmean(seconds[steps][k] for k, _ in members) * 1000 if steps else None
            means = {name: fmean(numbers) for name, numbers in values.items()}
            rows.append(
                {"group": group, "method": "codi" if steps else "bicubic", "steps": steps, **means, "ms": spent}
            )
    return rows


def _read(out: Path, folder: str, original: Original) -> Tensor:
    from ..data.images import read_image

    return read_image(out / folder / f"{original.name}.png").rgb


def _sheets(originals: list[Original], out: Path) -> list[str]:
    """Writes scenes.png and photographs.png, everything side by side; returns their names."""
    import numpy as np
    import torch

    from ..data.writing import write_png
    from ..evaluation import contact_sheet

    columns = {"input": "input", "bicubic": "bicubic", **{f"{n} step{'s' * (n > 1)}": f"steps-{n}" for n in STEPS}}
    names = []
    for group in dict.fromkeys(o.group for o in originals):
        members = [o for o in originals if o.group == group]
        shape = min(o.truth.shape[-1] for o in members)
        members = [o for o in members if o.truth.shape[-1] == shape]
        shown = {
            title: torch.stack([_read(out, folder, o) for o in members])
            for title, folder in {**columns, "truth": "truth"}.items()
        }
        pixels = np.asarray(contact_sheet(shown), np.float32) / 255
        write_png(out / f"{group}.png", torch.from_numpy(pixels).permute(2, 0, 1), overwrite=True)
        names.append(f"{group}.png")
    return names


def _recipe(
    pipe: CoDiPipeline, out: Path, model: str, side: int, seed: int, device: str, changes: dict[str, Any]
) -> DistillRecipe:
    """The training's recipe. Its folder is named after all that decides it, so that a tour of another model or version
    starts afresh instead of meeting checkpoints that do not fit."""
    from ..training.distill import DistillRecipe

    settings: dict[str, Any] = {
        "model": model, "data": "scenes:train:512", "held_out": "scenes:held-out:8",
        "size": side, "degradation": "bicubic", "images": 8_000, "batch_size": 8, "learning_rate": 3e-4, "warmup": 160,
        "ema": 0.99, "log_every": 40, "preview_every": 160, "checkpoint_every": 8_000, "keep": 1, "seed": seed,
        "device": device,
    }  # fmt: skip
    settings |= changes
    weights = float(pipe.unet.conv_in.weight.double().sum())
    key = zlib.crc32(json.dumps([settings, dict(pipe.unet.config), weights], sort_keys=True, default=str).encode())
    return DistillRecipe(out=str(out / "training" / f"{key:08x}"), **settings)


def _train(recipe: DistillRecipe, minutes: float) -> dict[str, Any]:
    """Trains from the backbone on, or goes on from where an earlier tour stopped; returns what the page shows of it."""
    from ..training.checkpoint import complete
    from ..training.distill import distill

    out = distill(recipe, quiet=not watched(), minutes=minutes)
    rows = {row["images"]: {} for row in _log(out)}
    for row in _log(out):  # losses and obedience come in lines of their own; a killed run's lines are passed again
        rows[row["images"]].update(row)
    curve = [rows[images] for images in sorted(rows)]
    previews = sorted((out / "previews").glob("*.png"))
    state = json.loads((complete(out / "checkpoints")[-1] / "state.json").read_text())
    return {
        "images": state["progress"]["images"],
        "of": recipe.images,
        "seconds": state["progress"]["seconds"],
        "objective": recipe.objective,
        "curve": curve,
        "previews": [f"training/{out.name}/previews/{p.name}" for p in previews],
    }


def _log(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
