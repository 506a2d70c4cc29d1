"""`codi upscale`: picture files -> picture files `scale` times larger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError
from . import pictures
from .common import BadUsage, Prompt, working
from .pictures import Item, Job, Order, deliver, make, open_pipeline, plan, shared, variants

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.pipeline import CoDiPipeline

EXAMPLE = "Example: codi upscale photos/ holiday.jpg -o larger/ --steps 4"
TOGETHER = 256 * 256  # input pixels up to which pictures of one size share a batch


@dataclass(frozen=True)
class Settings(pictures.Settings):
    """What the options of `codi upscale` say about the pictures. `scale` None: the adapter's own."""

    prompt: str = ""
    scale: float | None = None
    tile: int | None = None
    colour: str = "wavelet"


@shared
def upscale(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN", help="Picture files, or folders of them.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A file for one picture, a folder for several.", show_default=False)
    ],
    settings: pictures.Settings,
    scale: Annotated[
        float | None, typer.Option(min=1, help="Enlargement; by default the adapter's (4), its maximum.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Side of tiles in input pixels; 0: none. By default as needed.")
    ] = None,
    prompt: Prompt = "",
    colour: Annotated[
        Literal["wavelet", "adain", "none"], typer.Option(help="How the input's colours are kept.")
    ] = "wavelet",
) -> None:
    """Make pictures 4 times larger, in 1 to 4 steps. Alpha, grey and 16 bits are kept."""
    with working("starting"):
        from ..data.images import read_image

        jobs = plan(inputs, out, settings.count, settings.overwrite)
        if len(jobs) == 1:
            read_image(jobs[0].source)  # a bad one should not cost the loading of a model
    pipe = open_pipeline("upscale", settings)
    chosen = Settings(**vars(settings), prompt=prompt, scale=scale, tile=tile, colour=colour)
    check(pipe, chosen)
    deliver(pipe, _items(jobs, chosen), _order(pipe, chosen), chosen)


def check(pipe: CoDiPipeline, settings: Settings) -> None:
    """Raises BadUsage for a scale or tile that this pipeline does not make."""
    from ..models import codec
    from ..sampling.tiles import alignment

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
    """Upscales and writes; yields a row for each picture written, as pictures.make."""
    return make(pipe, _items(jobs, settings), _order(pipe, settings), settings, report)


def _order(pipe: CoDiPipeline, settings: Settings) -> Order:
    scale = settings.scale or pipe.task.scale  # type: ignore[union-attr]

    def fit(image: Tensor, item: Item) -> Tensor:
        height, width = (max(1, round(side * scale)) for side in item.given["image"].shape[-2:])
        return _resized(image, height, width)

    arguments = {"prompt": settings.prompt, "tile": settings.tile, "colour": settings.colour}
    return Order("upscale", arguments, {"prompt": settings.prompt, "scale": f"{scale:g}"}, fit)


def _items(jobs: Sequence[Job], settings: Settings) -> Iterator[Item | UserError]:
    """Read one after the other. Large pictures, which are cut into tiles, are made one by one."""
    from ..data.images import read_image

    for job in jobs:
        assert job.source is not None
        try:
            picture = read_image(job.source)
        except UserError as error:
            yield error
            continue
        alone = picture.rgb[0].numel() > TOGETHER
        yield from variants(job, settings, {"image": picture.rgb}, like=picture, alpha=picture.alpha, alone=alone)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """(C, h, w) in [0, 1] at another size: bicubic, antialiased where it shrinks."""
    import torch.nn.functional as F

    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
