"""`codi upscale`: picture files -> picture files `scale` times larger."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError
from .common import BadUsage, Prompt, spinner
from .pictures import Item, Order, Out, Settings, deliver, open_pipeline, shared, variants
from .planning import Job, plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.pipeline import CoDiPipeline

EXAMPLE = "Example: codi upscale photos/ holiday.jpg -o larger/ --steps 4"
TOGETHER = 256 * 256  # input pixels up to which pictures of one size share a batch
JUDGED, LEAST_JUDGED = 512, 64  # pixels: the middle that tells whether a picture is soft, and the least that does
# Of 160 photographs the lowest share is 0.15; enlarged twofold, 95 % fall below 0.12.
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
        typer.Option(min=1, help="Enlargement; by default the adapter's, which is the most: 4, or 8 of upscale-x8."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Side of tiles in input pixels; 0: none. By default as needed.")
    ] = None,
    prompt: Prompt = "",
    colour: Annotated[
        Literal["wavelet", "back-projection", "adain", "none"] | None,
        typer.Option(help="How the input's colours are kept; by default as the adapter has it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave pictures that are there, make the others.")] = False,
) -> None:
    """Make pictures 4 times larger, or 8 times with --adapter upscale-x8, in 1 to 4 steps.

    Alpha, grey, 16 bits, EXIF and the ICC profile are kept. A large PNG is made
    and written row by row, in little memory; the whole picture is held for
    other formats, a smaller --scale and --colour adain.
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
            read_image(jobs[0].source)  # a bad one should not cost the loading of a model
    pipe = open_pipeline("upscale", settings)
    check(pipe, scale, tile)
    enlargement = scale or pipe.task.scale  # type: ignore[union-attr]

    def fit(image: Tensor, item: Item) -> Tensor:
        height, width = (max(1, round(side * enlargement)) for side in item.given["image"].shape[-2:])
        return _resized(image, height, width)

    def rows(item: Item) -> Callable[[int, int], Tensor | None] | None:
        plain = item.target.suffix.lower() == ".png" and colour != "adain"  # which needs the whole picture
        if not (item.alone and plain and enlargement == pipe.task.scale):  # type: ignore[union-attr]
            return None
        return alpha_rows(pipe, tile, item)

    arguments = {"prompt": prompt, "tile": tile, "colour": colour}
    order = Order("upscale", arguments, {"prompt": prompt, "scale": f"{enlargement:g}"}, fit, rows)
    folder = {target.parent for job in jobs for target in job.targets}
    with contextlib.ExitStack() as stack:
        if resume and len(folder) == 1:
            busy = "another codi upscale --resume is at work there: wait for it to end, or give another -o"
            stack.enter_context(locked(folder.pop(), busy))
        deliver(pipe, _items(jobs, settings, resume), order, settings)


def check(pipe: CoDiPipeline, scale: float | None, tile: int | None) -> None:
    """Raises BadUsage for a scale or tile that this pipeline does not make."""
    from ..sampling.tiles import alignment

    most = pipe.task.scale  # type: ignore[union-attr]
    if scale is not None and scale > most:
        larger = "--adapter upscale-x8, " if most < scale <= 8 else ""
        raise BadUsage(
            f"--scale {scale:g}: this adapter enlarges {most} times: use at most {most}, {larger}or run twice"
        )
    align = alignment(pipe.cell, most)
    if tile and (tile % align or tile < 2 * align):
        raise BadUsage(
            f"--tile {tile}: not a multiple of {align} from {2 * align} up: use {max(2, tile // align) * align}"
        )


def alpha_rows(pipe: CoDiPipeline, tile: int | None, item: Item) -> Callable[[int, int], Tensor | None] | None:
    """What gives rows of the alpha of a picture that is made in tiles; None where it is made as a whole."""
    tiles = pipe.tiles(item.given["image"][None], tile)
    if tiles is None:
        return None

    def enlarge(part: Tensor) -> Tensor:
        return _resized(part[0], *(tiles.scale * side for side in part.shape[-2:]))[None]

    def rows(first: int, end: int) -> Tensor | None:
        return None if item.alpha is None else tiles.enlarged(enlarge, item.alpha[None], first, end)[0]

    return rows


def _items(jobs: Sequence[Job], settings: Settings, resume: bool) -> Iterator[Item | UserError]:
    """Read one after the other. Large pictures, which are cut into tiles, are made one by one."""
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
        made = variants(job, settings, {"image": picture.rgb}, like=picture, alpha=picture.alpha, alone=alone)
        yield from (item for item in made if not (resume and item.target.is_file()))


def enlarged_already(rgb: Tensor) -> bool:
    """Whether (3, H, W) in [0, 1] has next to no detail of its finest octave, compared with the next: the model, which
    adds what is finer than the input's pixels, then enlarges blur."""
    import torch.nn.functional as F

    def octave(image: Tensor) -> tuple[Tensor, Tensor]:
        small = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)
        lost = F.interpolate(small, size=image.shape[-2:], mode="bicubic") - image
        return small, lost[..., 4:-4, 4:-4].square().mean()

    top, left = (max(0, (side - JUDGED) // 2) for side in rgb.shape[-2:])
    part = rgb[None, :, top : top + JUDGED, left : left + JUDGED]
    if min(part.shape[-2:]) < LEAST_JUDGED:
        return False
    half, finest = octave(part)
    return bool(finest < SOFT * octave(half)[1])


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (C, h, w) in [0, 1] by antialiased bicubic interpolation."""
    from ..tasks.degradations import resize

    if image.shape[-2:] == (height, width):
        return image
    return resize(image[None], (height, width))[0].clamp(0, 1)
