"""`codi depth`: generate a picture with the geometry of a depth map or of a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import BadUsage, Prompt, choose_device, spinner
from .pictures import Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import plan_one

EXAMPLE = 'Example: codi depth room-depth.png --near bright --prompt "a red ball in a hall" -o room.png'


@shared
def depth(
    depthmap: Annotated[
        Path,
        typer.Argument(
            metavar="DEPTHMAP", help="A depth map of 8 or 16 bits, or .npy of any range.", show_default=False
        ),
    ],
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
    near: Annotated[
        Literal["guess", "bright", "dark"],
        typer.Option(help="The near end of the map; dark: values are distances."),
    ] = "guess",
    from_image: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="DEPTHMAP is a photo: estimate its depth with this transformers model, a folder or hub id.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a picture that has the geometry of a depth map, in 1 to 4 steps."""
    with spinner("reading"):
        from ..data.images import read_image
        from ..tasks.depth import estimate_depth, read_depth

        if from_image and near != "guess":
            raise BadUsage(f"--near {near}: the model of --from-image determines what is near: leave one out")
        job = plan_one(depthmap, out, settings.count, settings.overwrite)
        if from_image:
            depth_map = estimate_depth(read_image(depthmap).rgb, from_image, choose_device(settings.device))
        else:
            depth_map = read_depth(depthmap, near)
    pipe = open_pipeline("depth", settings)
    notes = {"prompt": prompt, **({} if from_image else {"near": near})}
    write_pictures(
        pipe, variants(job, settings, {"image": depth_map}), Request("depth", {"prompt": prompt}, notes), settings
    )
