"""`codi generate`: generate a picture from a prompt alone."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .common import BadUsage, Prompt, spinner
from .pictures import Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import plan_new

EXAMPLE = 'Example: codi generate --prompt "a red ball and a blue box" -o scene.png'


@shared
def generate(
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels; by default the model's own.", show_default=False)
    ] = None,
) -> None:
    """Make a picture from a prompt, in 1 to 4 steps."""
    with spinner("starting"):
        width, height = parse_size(size)
        job = plan_new(out, "generated", settings.count, settings.overwrite)
    pipe = open_pipeline("generate", settings)

    check_cells(width, height, pipe.cell)
    arguments = {"prompt": prompt, "width": width, "height": height}
    write_pictures(pipe, variants(job, settings, {}), Request("generate", arguments, {"prompt": prompt}), settings)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Parse "512x384" to (512, 384), width first, and None to (None, None). Raises BadUsage for anything else."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip().lower())
    if match is None or not int(match[1]) or not int(match[2]):
        raise BadUsage(f"--size {text}: not a size: write width x height in pixels, such as 512x384")
    return int(match[1]), int(match[2])


def check_cells(width: int | None, height: int | None, cell: int) -> None:
    """Raise BadUsage for sides that are not multiples of `cell` pixels."""
    if width and height and (width % cell or height % cell):
        nearest = [max(1, round(side / cell)) * cell for side in (width, height)]
        raise BadUsage(f"--size {width}x{height}: not multiples of {cell} px: use {nearest[0]}x{nearest[1]}")
