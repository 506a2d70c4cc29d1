"""`codi canny`: a picture with the edges of another."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import BadUsage, Prompt, spinner, usage_errors
from .pictures import ImageFile, Order, Out, Settings, deliver, open_pipeline, shared, variants
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
            raise BadUsage("--edges: finds no edges, so --low and --high say nothing: leave them out")
        job = plan_one(image, out, settings.count, settings.overwrite)
        picture = read_image(image)
    pipe = open_pipeline("canny", settings)
    given = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    with usage_errors():
        task = get_task("canny", **{**pipe.task.config(), **given})  # type: ignore[union-attr]
    if edges:
        found = picture.rgb.mean(0, keepdim=True)
        found = found if picture.alpha is None else found * picture.alpha  # what is clear shows no line
    else:
        found = task.bring(picture.rgb[None])[0]
    notes = {"prompt": prompt, **({} if edges else {k: f"{task.config()[k]:g}" for k in ("low", "high")})}
    deliver(pipe, variants(job, settings, {"image": found}), Order("canny", {"prompt": prompt}, notes), settings)
