"""The pictures of `codi demo`: inputs, results and ground truth of every task, as files and figures.

A `Section` is one heading of the page and serializes to JSON: the page is rendered from timings.json alone.
"""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.batches import Batch, collate
from ..data.images import read_image
from ..data.samples import Sample
from ..data.sources import open_source
from ..data.writing import write_png
from ..evaluation import contact_sheet, psnr
from ..evaluation.metrics import default_features, maps_distance
from ..sampling.pipeline import CoDiPipeline
from ..tasks import Task, means
from ..tasks.masks import KINDS

STEPS = (1, 2, 4)
ONE_ANSWER = ("upscale", "inpaint", "edit")  # tasks whose results can be compared with the truth pixel by pixel
TILE = 128  # side of a picture on the overview, in pixels
LARGEST = 288  # largest side of a photograph, in pixels: all of scikit-image's have that many


@dataclass(frozen=True)
class Column:
    """One column of generated pictures: its adapters (none: the plain backbone), step count and guidance scale (None:
    the adapter's default)."""

    key: str
    heading: str
    adapters: tuple[str, ...]
    steps: int
    guidance: float | None = None


@dataclass
class Inputs:
    """The inputs of a section's pictures. `given`: adapter name -> user input (N, C, H, W), rounded to the 8 bits of
    files; `shown`: column -> pictures (N, 1 or 3, H, W) written beside the generated ones; `batch`: the samples."""

    names: list[str]
    titles: list[str]
    prompts: list[str]
    given: dict[str, Tensor]
    shown: dict[str, Tensor]
    batch: Batch

    def first(self, count: int) -> Inputs:
        """Return the first `count` inputs."""
        given, shown = ({k: v[:count] for k, v in d.items()} for d in (self.given, self.shown))
        texts = self.names[:count], self.titles[:count], self.prompts[:count]
        return Inputs(*texts, given, shown, self.batch.part(slice(count)))


@dataclass
class Section:
    """One heading of the page. `sides`: the two columns that the sliders compare initially; `columns`: key -> heading;
    `rows`: {"name", "title", "pictures": {key: file}}; `figures`: {"column", "steps", "ms", ...}, one per column;
    `commands`: shell commands that reproduce the pictures, one per row."""

    name: str
    title: str
    about: str
    sides: list[str]
    columns: dict[str, str]
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def held_out(count: int, seed: int, side: int) -> list[Sample]:
    """Return the first `count` held-out scenes, not cherry-picked, with the columns that any task needs."""
    source = open_source(f"scenes:held-out:{count}:{seed}", ("conditioning_image", "mask", "edited_image"))
    return [replace(s, name=f"scene-{s.index}") for s in source.read(range(count), side) if isinstance(s, Sample)]


def photographs(titles: Mapping[str, str], side: int, scale: int) -> list[Sample]:
    """Return the central squares of scikit-image's photographs `titles` (its name -> title), resized to at most `side`
    and LARGEST pixels, a multiple of `scale`; an empty list where scikit-image is not installed."""
    try:
        import skimage.data
    except ImportError:
        return []
    samples, size = [], min(side, LARGEST) // scale * scale
    for number, (name, title) in enumerate(titles.items()):
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255
        square = min(pixels.shape[-2:])
        top, left = ((length - square) // 2 for length in pixels.shape[-2:])
        pixels = pixels[None, :, top : top + square, left : left + square]
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        samples.append(Sample(number, name, pixels[0], title))
    return samples


def make_inputs(task: Task, name: str, samples: Sequence[Sample], seed: int) -> Inputs:
    """Return the inputs that the adapter `name` of `task` gets for `samples`. Inpainting masks cycle through all kinds,
    and are redrawn where they cover everything or nothing."""
    task, user_inputs = task.measured(), []
    for number, sample in enumerate(samples):
        kind = {"masks": (KINDS[number % len(KINDS)],)} if task.takes_mask else {}
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        for _ in range(8):
            user_input = replace(task, **kind).given(collate([sample]), generator)  # type: ignore[type-var]
            if not task.takes_mask or 0 < float(user_input[:, 3:].mean()) < 1:  # some masks cover everything or nothing
                break
        user_inputs.append(user_input)
    rounded = (torch.cat(user_inputs) * 255).round() / 255
    batch = collate(list(samples))
    shown: dict[str, Tensor] = {}
    if rounded.shape[1]:
        shown["given"] = rounded if rounded.shape[1] in (1, 3) else task.condition(rounded)[:, :3]
        shown["truth"] = task.truth(batch)
    if task.takes_mask:
        shown["mask"] = rounded[:, 3:]
    if task.name == "upscale":
        shown["bicubic"] = task.condition(rounded)
    prompts = task.prompts(batch)
    titles = [prompt or sample.text for prompt, sample in zip(prompts, samples, strict=True)]
    return Inputs([s.name for s in samples], titles, prompts, {name: rounded}, shown, batch)


def format_steps(steps: int) -> str:
    """Return "1 step", "2 steps", ..."""
    return f"{steps} step{'s' * (steps > 1)}"


def make_pictures(
    pipe: CoDiPipeline,
    section: Section,
    inputs: Inputs,
    columns: Sequence[Column],
    out: Path,
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Generate every picture on its own, as a user would, and write all files below `out`/SECTION/.

    Fills in the section's rows and milliseconds; calls `done` after each picture. Returns column key -> generated
    pictures (N, 3, H, W).
    """
    results: dict[str, Tensor] = {}
    for column in columns:
        pipe.set_adapters(list(column.adapters))
        _sample(pipe, inputs, 0, replace(column, steps=1), seed)  # the first call is slower
        images, milliseconds = [], []
        for i in range(len(inputs.names)):
            start = time.perf_counter()
            images.append(_sample(pipe, inputs, i, column, seed))
            milliseconds.append(1000 * (time.perf_counter() - start))
            done()
        results[column.key] = torch.cat(images)
        section.figures.append({"column": column.key, "steps": column.steps, "ms": round(median(milliseconds), 1)})
    files = {**inputs.shown, **results}
    for i, (name, title) in enumerate(zip(inputs.names, inputs.titles, strict=True)):
        for key, images in files.items():
            rgb, grey = images[i].expand(3, -1, -1), images.shape[1] == 1
            write_png(out / section.name / key / f"{name}.png", rgb, grey=grey, overwrite=True)
        paths = {key: f"{section.name}/{key}/{name}.png" for key in section.columns}
        section.rows.append({"name": name, "title": title, "pictures": paths})
    return results


def _sample(pipe: CoDiPipeline, inputs: Inputs, i: int, column: Column, seed: int) -> Tensor:
    """Generate picture i, (1, 3, H, W)."""
    user_inputs = {name: inputs.given[name][i : i + 1] for name in column.adapters}
    images: dict[str, Any] = {name: tensor[:, :3] for name, tensor in user_inputs.items() if tensor.shape[1]}
    mask = next((tensor[:, 3:] for tensor in user_inputs.values() if tensor.shape[1] == 4), None)
    return pipe(
        image=(images if len(images) > 1 else next(iter(images.values()), None)),
        mask=mask,
        prompt=inputs.prompts[i],
        steps=column.steps,
        guidance_scale=column.guidance,
        seed=seed,
        output_type="pt",
    ).images  # type: ignore[union-attr]


def measure(section: Section, task: Task, inputs: Inputs, results: dict[str, Tensor]) -> None:
    """Add to the section's figures the task's obedience, the PSNR of tasks in ONE_ANSWER, and the ENLite0 distance.

    `results`: column key -> generated pictures.
    """
    task, truth, extract = task.measured(), inputs.shown.get("truth"), default_features()
    given = next(iter(inputs.given.values()))
    truth_features = None if truth is None else extract(truth)
    if "bicubic" in inputs.shown:
        section.figures.insert(0, {"column": "bicubic", "steps": 0, "ms": None})
        results = {**results, "bicubic": inputs.shown["bicubic"]}
    for row in section.figures:
        pictures = results[row["column"]]
        figures = task.obedience(pictures, given, inputs.batch)
        figures.pop("known_psnr", None)  # known pixels are copied to the result, whatever the network predicts
        if truth is not None and task.name in ONE_ANSWER:
            figures = {"psnr": psnr(pictures, truth), **figures}
        if truth_features is not None:
            figures["distance"] = maps_distance(extract(pictures), truth_features)
        row |= {name: round(value, 4) for name, value in means(figures).items()}


def commands(section: Section, task: Task, inputs: Inputs, seed: int, options: Sequence[str]) -> list[str]:
    """Return for each row the command that reproduces its 4-step picture, run in the page's folder."""
    lines = []
    for name, prompt in zip(inputs.names, inputs.prompts, strict=True):
        words = ["codi", task.name]
        if task.name != "generate":
            words.append(f"{section.name}/{'truth' if task.takes_mask else 'given'}/{name}.png")
        if task.takes_mask:
            words += ["--mask", f"{section.name}/mask/{name}.png"]
        words += {"depth": ["--near", "bright"], "canny": ["--edges"]}.get(task.name, [])
        if task.prompted:
            words += ["--instruction" if task.name == "edit" else "--prompt", prompt]
        lines.append(shlex.join([*words, "--steps", "4", "--seed", str(seed), *options, "-o", "again.png"]))
    return lines


def overview(sections: Sequence[dict[str, Any]], path: Path) -> None:
    """Write an overview sheet to `path`, with row k of each section k: title, prompt and many-step model; then the
    input, the results by step count and the truth. `sections` are those of timings.json, their files relative to the
    folder of `path`."""
    headings = {
        "given": "input",
        **{f"steps-{n}": format_steps(n) for n in STEPS},
        "many": "many steps",
        "truth": "truth",
    }
    rows = [(section, section["rows"][number % len(section["rows"])]) for number, section in enumerate(sections)]
    labels = [
        _label(section["title"], row["title"], f"many steps: {section['columns']['many']}") for section, row in rows
    ]
    columns = {"": torch.stack(labels)}
    for key, heading in headings.items():
        columns[heading] = torch.stack([_tile(path.parent, row["pictures"].get(key)) for _, row in rows])
    sheet = np.asarray(contact_sheet(columns, TILE), np.float32) / 255
    write_png(path, torch.from_numpy(sheet).permute(2, 0, 1), overwrite=True)


def _tile(folder: Path, file: str | None) -> Tensor:
    """Return a picture file enlarged to (3, TILE, TILE); white for None."""
    if file is None:
        return torch.ones(3, TILE, TILE)
    return F.interpolate(read_image(folder / file).rgb[None], (TILE, TILE), mode="nearest-exact")[0]


def _label(title: str, prompt: str, foot: str) -> Tensor:
    """Return a tile (3, TILE, TILE) with text on white."""
    tile = Image.new("RGB", (TILE, TILE), "white")
    draw = ImageDraw.Draw(tile)
    draw.text((4, 2), title, fill="black", font_size=16)
    for top, text, most in ((26, prompt, 6), (TILE - 26, foot, 2)):
        lines = textwrap.wrap(text, 24, max_lines=most, placeholder=" ...")
        draw.multiline_text((4, top), "\n".join(lines), fill=(90, 90, 90), font_size=10, spacing=2)
    return torch.from_numpy(np.asarray(tile, np.float32) / 255).permute(2, 0, 1)
