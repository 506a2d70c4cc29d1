"""The pictures of `codi demo`: of every task what is given, what is made of it and the truth, as files and figures.

A `Section` is one heading of the page. All that it holds is JSON-able: the page is a function of timings.json.
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
ONE_ANSWER = ("upscale", "inpaint", "edit")  # tasks whose results can be held against the truth pixel by pixel
TILE = 128  # pixels of a picture on the overview
LARGEST = 288  # pixels of a photograph: what all of scikit-image's have


@dataclass(frozen=True)
class Way:
    """One column of made pictures: by which adapters (none: the plain backbone), in how many steps, how guided (None:
    the adapter's own)."""

    key: str
    heading: str
    adapters: tuple[str, ...]
    steps: int
    guidance: float | None = None


@dataclass
class Subject:
    """What pictures are made of. `given`: by adapter, what users bring (N, C, H, W), at the 8 bits that files have;
    `shown`: what is written beside the made pictures, (N, 1 or 3, H, W); `batch`: the samples."""

    names: list[str]
    titles: list[str]
    prompts: list[str]
    given: dict[str, Tensor]
    shown: dict[str, Tensor]
    batch: Batch

    def first(self, count: int) -> Subject:
        """The first of them."""
        given, shown = ({k: v[:count] for k, v in d.items()} for d in (self.given, self.shown))
        texts = self.names[:count], self.titles[:count], self.prompts[:count]
        return Subject(*texts, given, shown, self.batch.part(slice(count)))


@dataclass
class Section:
    """One heading of the page. `sides`: the columns that the sliders compare at first; `columns`: key -> heading;
    `rows`: {"name", "title", "pictures": {key: file}}; `figures`: {"column", "steps", "ms", ...}, one a column;
    `commands`: what makes a row's pictures again."""

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
    """The first `count` held-out scenes, not picked, with all that any task asks for."""
    source = open_source(f"scenes:held-out:{count}:{seed}", ("conditioning_image", "mask", "edited_image"))
    return [replace(s, name=f"scene-{s.index}") for s in source.read(range(count), side) if isinstance(s, Sample)]


def photographs(titles: Mapping[str, str], side: int, scale: int) -> list[Sample]:
    """The centre squares of photographs that scikit-image ships, by its names, shrunk to `side` pixels or LARGEST;
    none without it."""
    try:
        import skimage.data
    except ImportError:
        return []
    found, size = [], min(side, LARGEST) // scale * scale
    for number, (name, title) in enumerate(titles.items()):
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255
        square = min(pixels.shape[-2:])
        top, left = ((length - square) // 2 for length in pixels.shape[-2:])
        pixels = pixels[None, :, top : top + square, left : left + square]
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        found.append(Sample(number, name, pixels[0], title))
    return found


def subject(task: Task, name: str, samples: Sequence[Sample], seed: int) -> Subject:
    """The samples as the adapter `name` of `task` meets them. Masks to inpaint go through all kinds in turn, and
    are drawn again where they cover everything or nothing."""
    task, given = task.measured(), []
    for number, sample in enumerate(samples):
        kind = {"masks": (KINDS[number % len(KINDS)],)} if task.takes_mask else {}
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        for _ in range(8):
            one = replace(task, **kind).given(collate([sample]), generator)  # type: ignore[type-var]
            if not task.takes_mask or 0 < float(one[:, 3:].mean()) < 1:  # some masks cover everything or nothing
                break
        given.append(one)
    brought = (torch.cat(given) * 255).round() / 255
    batch = collate(list(samples))
    shown: dict[str, Tensor] = {}
    if brought.shape[1]:
        shown["given"] = brought if brought.shape[1] in (1, 3) else task.condition(brought)[:, :3]
        shown["truth"] = task.truth(batch)
    if task.takes_mask:
        shown["mask"] = brought[:, 3:]
    if task.name == "upscale":
        shown["bicubic"] = task.condition(brought)
    prompts = task.prompts(batch)
    titles = [prompt or sample.text for prompt, sample in zip(prompts, samples, strict=True)]
    return Subject([s.name for s in samples], titles, prompts, {name: brought}, shown, batch)


def counted(steps: int) -> str:
    """ "1 step", "2 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def make(
    pipe: CoDiPipeline,
    section: Section,
    what: Subject,
    ways: Sequence[Way],
    out: Path,
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Makes every picture on its own, as a user would, and writes all files below `out`/NAME/; fills the section's
    rows and milliseconds. Returns the made pictures by column, (N, 3, H, W). `done` is called after each."""
    made: dict[str, Tensor] = {}
    for way in ways:
        pipe.set_adapters(list(way.adapters))
        _sample(pipe, what, 0, replace(way, steps=1), seed)  # the first call is slower
        pictures, spent = [], []
        for k in range(len(what.names)):
            began = time.perf_counter()
            pictures.append(_sample(pipe, what, k, way, seed))
            spent.append(1000 * (time.perf_counter() - began))
            done()
        made[way.key] = torch.cat(pictures)
        section.figures.append({"column": way.key, "steps": way.steps, "ms": round(median(spent), 1)})
    files = {**what.shown, **made}
    for k, (name, title) in enumerate(zip(what.names, what.titles, strict=True)):
        for key, pictures in files.items():
            rgb, grey = pictures[k].expand(3, -1, -1), pictures.shape[1] == 1
            write_png(out / section.name / key / f"{name}.png", rgb, grey=grey, overwrite=True)
        shown = {key: f"{section.name}/{key}/{name}.png" for key in section.columns}
        section.rows.append({"name": name, "title": title, "pictures": shown})
    return made


def _sample(pipe: CoDiPipeline, what: Subject, k: int, way: Way, seed: int) -> Tensor:
    """Picture k, (1, 3, H, W)."""
    given = {name: what.given[name][k : k + 1] for name in way.adapters}
    images: dict[str, Any] = {name: tensor[:, :3] for name, tensor in given.items() if tensor.shape[1]}
    mask = next((tensor[:, 3:] for tensor in given.values() if tensor.shape[1] == 4), None)
    return pipe(
        image=(images if len(images) > 1 else next(iter(images.values()), None)),
        mask=mask,
        prompt=what.prompts[k],
        steps=way.steps,
        guidance_scale=way.guidance,
        seed=seed,
        output_type="pt",
    ).images  # type: ignore[union-attr]


def measure(section: Section, task: Task, what: Subject, made: dict[str, Tensor]) -> None:
    """Adds to the section's figures the task's own, PSNR where there is one right answer, and the ENLite0 distance."""
    task, truth, features = task.measured(), what.shown.get("truth"), default_features()
    given = next(iter(what.given.values()))
    seen = None if truth is None else features(truth)
    if "bicubic" in what.shown:
        section.figures.insert(0, {"column": "bicubic", "steps": 0, "ms": None})
        made = {**made, "bicubic": what.shown["bicubic"]}
    for row in section.figures:
        pictures = made[row["column"]]
        figures = task.obedience(pictures, given, what.batch)
        figures.pop("known_psnr", None)  # known pixels are given back as they are, whatever the network made of them
        if truth is not None and task.name in ONE_ANSWER:
            figures = {"psnr": psnr(pictures, truth), **figures}
        if seen is not None:
            figures["distance"] = maps_distance(features(pictures), seen)
        row |= {name: round(value, 4) for name, value in means(figures).items()}


def commands(section: Section, task: Task, what: Subject, seed: int, options: Sequence[str]) -> list[str]:
    """For each row, what makes its picture in 4 steps again, in the page's folder."""
    lines = []
    for name, prompt in zip(what.names, what.prompts, strict=True):
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
    """Writes one sheet with a row of each section, of section k row k: its title, its prompt and what made many steps;
    what was given, the steps, the truth. `sections` are as in timings.json, their files below the folder of `path`."""
    headings = {"given": "given", **{f"steps-{n}": counted(n) for n in STEPS}, "many": "many steps", "truth": "truth"}
    rows = [(one, one["rows"][k % len(one["rows"])]) for k, one in enumerate(sections)]
    labels = [_label(one["title"], row["title"], f"many steps: {one['columns']['many']}") for one, row in rows]
    columns = {"": torch.stack(labels)}
    for key, heading in headings.items():
        columns[heading] = torch.stack([_tile(path.parent, row["pictures"].get(key)) for _, row in rows])
    sheet = np.asarray(contact_sheet(columns, TILE), np.float32) / 255
    write_png(path, torch.from_numpy(sheet).permute(2, 0, 1), overwrite=True)


def _tile(folder: Path, file: str | None) -> Tensor:
    """A picture file enlarged to (3, TILE, TILE); white for None."""
    if file is None:
        return torch.ones(3, TILE, TILE)
    return F.interpolate(read_image(folder / file).rgb[None], (TILE, TILE), mode="nearest-exact")[0]


def _label(title: str, prompt: str, foot: str) -> Tensor:
    """(3, TILE, TILE): text on white."""
    tile = Image.new("RGB", (TILE, TILE), "white")
    draw = ImageDraw.Draw(tile)
    draw.text((4, 2), title, fill="black", font_size=16)
    for top, text, most in ((26, prompt, 6), (TILE - 26, foot, 2)):
        lines = textwrap.wrap(text, 24, max_lines=most, placeholder=" ...")
        draw.multiline_text((4, top), "\n".join(lines), fill=(90, 90, 90), font_size=10, spacing=2)
    return torch.from_numpy(np.asarray(tile, np.float32) / 255).permute(2, 0, 1)
