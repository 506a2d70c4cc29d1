"""`codi upscale`: picture files -> picture files `scale` times larger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import __version__
from ..errors import UserError
from .common import (
    Adapter,
    BadUsage,
    Batch,
    Count,
    Device,
    DType,
    Guidance,
    Json,
    Model,
    Overwrite,
    Prompt,
    Seed,
    Steps,
    load_pipeline,
    print_json,
    say_error,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.images import Picture
    from ..sampling.pipeline import CoDiPipeline

EXAMPLE = "Example: codi upscale photos/ holiday.jpg -o larger/ --steps 4"
TOGETHER = 256 * 256  # input pixels up to which pictures of one size share a batch


@dataclass(frozen=True)
class Job:
    """One picture file and where its variants go."""

    source: Path
    targets: list[Path]


@dataclass(frozen=True)
class Settings:
    """What the options of `codi upscale` say about the pictures. `scale` None: the adapter's own."""

    model: str = "mini"
    adapter: str | None = None
    scale: float | None = None
    tile: int | None = None
    steps: int = 4
    guidance: float = 1.0
    prompt: str = ""
    seed: int = 0
    batch: int = 4
    colour: str = "wavelet"
    overwrite: bool = False


def upscale(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN", help="Picture files, or folders of them.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A file for one picture, a folder for several.", show_default=False)
    ],
    scale: Annotated[
        float | None, typer.Option(min=1, help="Enlargement; by default the adapter's (4), its maximum.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Side of tiles in input pixels; 0: none. By default as needed.")
    ] = None,
    model: Model = "mini",
    adapter: Adapter = None,
    steps: Steps = 4,
    guidance: Guidance = 1.0,
    prompt: Prompt = "",
    seed: Seed = 0,
    count: Count = 1,
    batch: Batch = 4,
    colour: Annotated[
        Literal["wavelet", "adain", "none"], typer.Option(help="How the input's colours are kept.")
    ] = "wavelet",
    device: Device = "auto",
    dtype: DType = "float32",
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Make pictures 4 times larger, in 1 to 4 steps. Alpha, grey and 16 bits are kept."""
    with working("starting"):
        jobs = plan(inputs, out, count, overwrite)
    pipe = load_pipeline(model, "upscale", adapter, device, dtype)
    settings = Settings(model, adapter, scale, tile, steps, guidance, prompt, seed, batch, colour, overwrite)
    check(pipe, settings)
    faults = []

    def report(error: UserError) -> None:
        faults.append(error)
        say_error(error)

    rows = []
    for row in run(pipe, jobs, settings, report):
        rows.append(row)
        if not json_:
            print(f"{row['input']} -> {row['output']}  {row['width']} x {row['height']} px, {row['seconds']:.2f} s")
    if json_:
        print_json(rows)
    if faults:
        raise typer.Exit(1)


def plan(inputs: Sequence[Path], out: Path, count: int = 1, overwrite: bool = False) -> list[Job]:
    """Which file becomes which: `out` itself for one picture file, else `out`/NAME.png; variants are NAME-0.png, ...

    Every target is checked before anything is computed. Raises UserError for one that cannot be written, that is an
    input, or that two inputs share, and for a folder without pictures.
    """
    from ..data.images import read_image
    from ..data.writing import WRITABLE, check_writable

    sources = [file for path in inputs for file in _pictures(path)]
    if len(sources) == 1:
        read_image(sources[0])  # a bad one should not cost the loading of a model
    into = len(sources) > 1 or inputs[0].is_dir() or out.is_dir()
    if into and out.suffix.lower() in WRITABLE and not out.is_dir():
        raise BadUsage(f"{out}: is one file for {len(sources)} pictures: name a folder after -o")
    jobs, taken = [], {path.resolve(): path for path in sources}
    for source in sources:
        target = out / f"{source.stem}.png" if into else out
        targets = [target] if count == 1 else [target.with_stem(f"{target.stem}-{k}") for k in range(count)]
        for one in targets:
            check_writable(one, overwrite)
            owner = taken.setdefault(one.resolve(), source)
            if owner.resolve() == one.resolve():
                raise UserError(f"{one}: is an input: name another file or folder")
            if owner is not source:
                raise UserError(f"{one}: {owner} is written there too: rename one of the pictures")
        jobs.append(Job(source, targets))
    return jobs


def _pictures(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    from ..data.crops import SUFFIXES

    try:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    if not found:
        raise UserError(f"{path}: no pictures in this folder: name one that holds {', '.join(SUFFIXES)} files")
    return found


def check(pipe: CoDiPipeline, settings: Settings) -> None:
    """Raises BadUsage for a scale or tile that this pipeline does not make."""
    from ..models import codec
    from ..sampling.pipeline import alignment

    most = pipe.task.scale  # type: ignore[union-attr]
    if settings.scale is not None and settings.scale > most:
        raise BadUsage(
            f"--scale {settings.scale:g}: this adapter enlarges {most} times: use at most {most}, or run twice"
        )
    align = alignment(codec.downscale(pipe.vae), most)
    if settings.tile and (settings.tile % align or settings.tile < 2 * align):
        raise BadUsage(
            f"--tile {settings.tile}: not a multiple of {align} from {2 * align} up: "
            f"use {max(2, settings.tile // align) * align}"
        )


def run(
    pipe: CoDiPipeline, jobs: Sequence[Job], settings: Settings, report: Callable[[UserError], None]
) -> Iterator[dict[str, Any]]:
    """Upscales and writes; yields a row for each picture written. What is wrong with a file goes to `report`, and the
    others follow. Each picture's seeds are settings.seed, + 1, ... for its variants, whatever else is in the run."""
    import torch

    from ..data.writing import write_image

    notes = {
        "Software": f"codi {__version__}",
        "codi model": _public(settings.model),
        "codi adapter": _public(settings.adapter or "upscale"),
        "codi task": "upscale",
        "codi steps": str(settings.steps),
        "codi guidance": f"{settings.guidance:g}",
        "codi prompt": settings.prompt,
    }
    scale = settings.scale or pipe.task.scale  # type: ignore[union-attr]
    bar: dict[str, Any] = getattr(pipe, "_progress_bar_config", {})
    for group in _groups(jobs, settings, report):
        began = time.perf_counter()
        pipe.set_progress_bar_config(**{**bar, "desc": group[0][1].name})
        try:
            made: Tensor = pipe(
                image=torch.stack([picture.rgb for picture, _, _ in group]),
                prompt=settings.prompt,
                steps=settings.steps,
                guidance_scale=settings.guidance,
                seed=[seed for _, _, seed in group],
                tile=settings.tile,
                colour=settings.colour,
                batch_size=settings.batch,
                output_type="pt",
            ).images  # type: ignore[union-attr]
        except UserError as error:
            report(UserError(f"{group[0][0].path}: {error}"))
            continue
        seconds = (time.perf_counter() - began) / len(group)
        for (picture, target, seed), rgb in zip(group, made, strict=True):
            height, width = (max(1, round(side * scale)) for side in picture.rgb.shape[-2:])
            extra = {"codi scale": f"{scale:g}", "codi seed": str(seed)}
            try:
                write_image(
                    target,
                    _resized(rgb, height, width),
                    None if picture.alpha is None else _resized(picture.alpha, height, width),
                    metadata={**notes, **extra},
                    bits=picture.bits,
                    grey=picture.grey,
                    overwrite=settings.overwrite,
                )
            except UserError as error:
                report(error)
                continue
            yield {
                "input": picture.path,
                "output": str(target),
                "width": width,
                "height": height,
                "seconds": round(seconds, 4),
                "seed": seed,
                "steps": settings.steps,
            }


def _public(name: str) -> str:
    """A model's name for a picture that may be passed on: of a path its last part, not where the user keeps it."""
    path = Path(name)
    return path.name if path.exists() else name


def _groups(
    jobs: Sequence[Job], settings: Settings, report: Callable[[UserError], None]
) -> Iterator[list[tuple[Picture, Path, int]]]:
    """(picture, target, seed) in batches of one size; large pictures, which are cut into tiles, one by one."""
    from ..data.images import read_image

    group: list[tuple[Picture, Path, int]] = []
    for job in jobs:
        try:
            picture = read_image(job.source)
        except UserError as error:
            report(error)
            continue
        most = settings.batch if picture.rgb[0].numel() <= TOGETHER else 1
        for number, target in enumerate(job.targets):
            if group and (len(group) >= most or group[0][0].rgb.shape != picture.rgb.shape):
                yield group
                group = []
            group.append((picture, target, settings.seed + number))
    if group:
        yield group


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """(C, h, w) in [0, 1] at another size: bicubic, antialiased where it shrinks."""
    import torch.nn.functional as F

    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
