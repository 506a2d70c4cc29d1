"""`codi upscale`: enlarge picture files `scale` times."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from .common import BadUsage, Prompt, spinner
from .pictures import Item, Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import Job, plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.pipeline import CoDiPipeline

EXAMPLE = "Example: codi upscale photos/ holiday.jpg -o larger/ --steps 4"
TOGETHER = 256 * 256  # maximum input pixels of pictures that share a batch
JUDGED, LEAST_JUDGED = 512, 64  # side of the center crop that tells whether a picture is soft, and the smallest side
# Least ratio of the finest octave's energy to the next one's. In 160 photographs it is at least 0.15; after enlarging
# them twofold, 95 % fall below 0.12.
SOFT = 0.12


@shared
def upscale(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN", help="Picture files, or folders of them.", show_default=False)
    ],
    out: Out,
    settings: Settings,
    scale: Annotated[
        float | None,
        typer.Option(min=1, help="Enlargement; by default the adapter's, also the largest: 4, or 8 for upscale-x8."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Side of tiles in input pixels; 0: no tiling. By default as needed.")
    ] = None,
    prompt: Prompt = "",
    colour: Annotated[
        Literal["wavelet", "back-projection", "adain", "none"] | None,
        typer.Option(help="How to keep the input's colours; by default the adapter's method."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep existing pictures, make the others.")] = False,
) -> None:
    """Make pictures 4 times larger, or 8 times with --adapter upscale-x8, in 1 to 4 steps.

    Alpha, grey, 16 bits, EXIF and the ICC profile are kept. A large PNG is made
    and written row by row, in little memory; other formats, a smaller --scale
    and --colour adain need memory for the whole picture.
    """
    with spinner("starting"):
        from ..data.images import read_image
        from ..files import locked

        if resume and settings.overwrite:
            raise BadUsage("--resume --overwrite: contradict each other: give one of them")
        jobs = plan(inputs, out, settings.count, settings.overwrite or resume)
        if resume:
            jobs = [job for job in jobs if not all(target.is_file() for target in job.targets)]
        if len(jobs) == 1 and jobs[0].source:
            read_image(jobs[0].source)  # report an unreadable file before loading the model
    pipe = open_pipeline("upscale", settings)
    check(pipe, scale, tile)
    enlargement = scale or pipe.task.scale  # type: ignore[union-attr]

    def fit(image: Tensor, item: Item) -> Tensor:
        height, width = (max(1, round(side * enlargement)) for side in item.given["image"].shape[-2:])
        return _resize(image, height, width)

    def rows(item: Item) -> Callable[[int, int], Tensor | None] | None:
        by_rows = item.target.suffix.lower() == ".png" and colour != "adain"  # adain needs the whole picture
        if not (item.alone and by_rows and enlargement == pipe.task.scale):  # type: ignore[union-attr]
            return None
        return alpha_rows(pipe, tile, item)

    arguments = {"prompt": prompt, "tile": tile, "colour": colour}
    request = Request("upscale", arguments, {"prompt": prompt, "scale": f"{enlargement:g}"}, fit, rows)
    folder = {target.parent for job in jobs for target in job.targets}
    with contextlib.ExitStack() as stack:
        if resume and len(folder) == 1:
            busy = "another codi upscale --resume is running there: wait for it to end, or give another -o"
            stack.enter_context(locked(folder.pop(), busy))
        write_pictures(pipe, _items(jobs, settings, resume), request, settings)


def check(pipe: CoDiPipeline, scale: float | None, tile: int | None) -> None:
    """Raise BadUsage for a scale or tile size that this pipeline does not support."""
    from ..sampling.tiles import alignment

    largest = pipe.task.scale  # type: ignore[union-attr]
    if scale is not None and scale > largest:
        advice = "--adapter upscale-x8, " if largest < scale <= 8 else ""
        raise BadUsage(
            f"--scale {scale:g}: this adapter enlarges {largest} times: use at most {largest}, {advice}or run twice"
        )
    align = alignment(pipe.cell, largest)
    if tile and (tile % align or tile < 2 * align):
        raise BadUsage(
            f"--tile {tile}: not a multiple of {align} from {2 * align} up: use {max(2, tile // align) * align}"
        )


def alpha_rows(pipe: CoDiPipeline, tile: int | None, item: Item) -> Callable[[int, int], Tensor | None] | None:
    """Return a function that enlarges rows of a tiled picture's alpha; None for a picture that is made as a whole."""
    tiles = pipe.tiles(item.given["image"][None], tile)
    if tiles is None:
        return None

    def enlarge(part: Tensor) -> Tensor:
        return _resize(part[0], *(tiles.scale * side for side in part.shape[-2:]))[None]

    def rows(first: int, end: int) -> Tensor | None:
        return None if item.alpha is None else tiles.enlarged(enlarge, item.alpha[None], first, end)[0]

    return rows


def _items(jobs: Sequence[Job], settings: Settings, resume: bool) -> Iterator[Item | UserError]:
    """Read the pictures one after the other. Large ones, which are cut into tiles, do not share a batch."""
    from ..data.images import read_image

    for job in jobs:
        assert job.source is not None
        try:
            picture = read_image(job.source, own_profile=True)
        except UserError as error:
            yield error
            continue
        if enlarged_already(picture.rgb):
            warnings.warn(f"{job.source}: is soft, as if enlarged before, and would stay so: "
                          "make it smaller first, or take the original", stacklevel=1)  # fmt: skip
        alone = picture.rgb[0].numel() > TOGETHER
        items = variants(job, settings, {"image": picture.rgb}, like=picture, alpha=picture.alpha, alone=alone)
        yield from (item for item in items if not (resume and item.target.is_file()))


def enlarged_already(rgb: Tensor) -> bool:
    """Return True if (3, H, W) in [0, 1] has almost no detail in its finest octave, compared with the next: the model,
    which adds only detail finer than the input's pixels, would then enlarge blur."""
    import torch.nn.functional as F

    def octave(image: Tensor) -> tuple[Tensor, Tensor]:
        small = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)
        detail = F.interpolate(small, size=image.shape[-2:], mode="bicubic") - image
        return small, detail[..., 4:-4, 4:-4].square().mean()

    top, left = (max(0, (side - JUDGED) // 2) for side in rgb.shape[-2:])
    crop = rgb[None, :, top : top + JUDGED, left : left + JUDGED]
    if min(crop.shape[-2:]) < LEAST_JUDGED:
        return False
    half, finest = octave(crop)
    return bool(finest < SOFT * octave(half)[1])


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (C, h, w) in [0, 1] by antialiased bicubic interpolation."""
    from ..tasks.degradations import resize

    if image.shape[-2:] == (height, width):
        return image
    return resize(image[None], (height, width))[0].clamp(0, 1)
