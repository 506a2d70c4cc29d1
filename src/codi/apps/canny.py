"""`codi canny`: generate a picture with the edges of another."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import BadUsage, Prompt, spinner, usage_errors
from .pictures import ImageFile, Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import plan_one

EXAMPLE = 'Example: codi canny house.jpg --prompt "a green house at dusk" -o painted.png'

Threshold = Annotated[
    float | None,
    typer.Option(min=0, max=255, help="Threshold of the gradient; by default the adapter's.", show_default=False),
]


@shared
def canny(
    image: ImageFile,
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
    edges: Annotated[bool, typer.Option("--edges", help="IMAGE is an edge map: white lines on black.")] = False,
    low: Threshold = None,
    high: Threshold = None,
) -> None:
    """Make a picture that has the edges of another, in 1 to 4 steps."""
    with spinner("starting"):
        from ..data.images import read_image
        from ..tasks import get_task

        if edges and (low is not None or high is not None):
            raise BadUsage("--edges: takes the edges from IMAGE, so --low and --high have no effect: leave them out")
        job = plan_one(image, out, settings.count, settings.overwrite)
        picture = read_image(image)
    pipe = open_pipeline("canny", settings)
    thresholds = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    with usage_errors():
        task = get_task("canny", **{**pipe.task.config(), **thresholds})  # type: ignore[union-attr]
    if edges:
        edge_map = picture.rgb.mean(0, keepdim=True)
        edge_map = edge_map if picture.alpha is None else edge_map * picture.alpha  # transparent pixels have no edge
    else:
        edge_map = task.bring(picture.rgb[None])[0]
    notes = {"prompt": prompt, **({} if edges else {k: f"{task.config()[k]:g}" for k in ("low", "high")})}
    write_pictures(
        pipe, variants(job, settings, {"image": edge_map}), Request("canny", {"prompt": prompt}, notes), settings
    )
