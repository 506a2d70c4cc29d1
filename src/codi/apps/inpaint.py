"""`codi inpaint`: a picture with a part of it, white in the mask, made anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from .common import Prompt, spinner
from .pictures import ImageFile, Order, Out, Settings, deliver, open_pipeline, shared, variants
from .planning import plan_one

EXAMPLE = 'Example: codi inpaint room.png --mask hole.png --prompt "a red ball" -o filled.png'


@shared
def inpaint(
    image: ImageFile,
    mask: Annotated[
        Path,
        typer.Option(
            help="A picture of IMAGE's shape: white, or marks on a clear ground, where to make anew.",
            show_default=False,
        ),
    ],
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
) -> None:
    """Make a part of a picture anew, in 1 to 4 steps. All other pixels come back exactly, 16 bits, grey and alpha too,
    in a lossless file (PNG); what is made anew is opaque."""
    import torch

    with spinner("starting"):
        from ..data.images import read_image
        from ..tasks.masks import read_mask

        job = plan_one(image, out, settings.count, settings.overwrite, [mask])
        picture = read_image(image, own_profile=True)
        height, width = picture.rgb.shape[-2:]
        hole = read_mask(mask, (height, width))
        if (suffix := job.targets[0].suffix.lower()) != ".png":
            warnings.warn(f"{out}: {suffix} changes known pixels a little: .png keeps them exactly", stacklevel=1)
    pipe = open_pipeline("inpaint", settings)
    alpha = None if picture.alpha is None else torch.where(hole > 0.5, 1.0, picture.alpha)
    items = variants(job, settings, {"image": picture.rgb, "mask": hole}, like=picture, alpha=alpha)
    deliver(pipe, items, Order("inpaint", {"prompt": prompt}, {"prompt": prompt}), settings)
