"""`codi edit`: change a picture by an instruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from .common import spinner
from .pictures import ImageFile, Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import plan_one

EXAMPLE = 'Example: codi edit room.png --instruction "make the ball blue" -o edited.png'


@shared
def edit(
    image: ImageFile,
    instruction: Annotated[str, typer.Option(help="What to change.", show_default=False)],
    out: Out,
    settings: Settings,
    image_guidance: Annotated[
        float | None, typer.Option(min=0, help="How closely to follow IMAGE; by default the adapter's.")
    ] = None,
) -> None:
    """Change a picture as an instruction says, in 1 to 4 steps. Alpha and 16 bits are kept."""
    with spinner("starting"):
        from ..data.images import read_image

        job = plan_one(image, out, settings.count, settings.overwrite)
        picture = read_image(image)
    pipe = open_pipeline("edit", settings)
    like = replace(picture, grey=False)  # an instruction may ask for colour
    request = Request(
        "edit", {"prompt": instruction, "image_guidance_scale": image_guidance}, {"instruction": instruction}
    )
    write_pictures(
        pipe, variants(job, settings, {"image": picture.rgb}, like=like, alpha=picture.alpha), request, settings
    )
