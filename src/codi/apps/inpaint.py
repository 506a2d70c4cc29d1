"""`codi inpaint`: regenerate the part of a picture that is white in a mask."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from .common import Prompt, spinner
from .pictures import ImageFile, Out, Request, Settings, open_pipeline, shared, variants, write_pictures
from .planning import plan_one

EXAMPLE = 'Example: codi inpaint room.png --mask hole.png --prompt "a red ball" -o filled.png'


@shared
def inpaint(
    image: ImageFile,
    mask: Annotated[
        Path,
        typer.Option(
            help="A picture of IMAGE's shape: white, or marks on a transparent ground, where to regenerate.",
            show_default=False,
        ),
    ],
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
) -> None:
    """Regenerate a part of a picture, in 1 to 4 steps. All other pixels are kept exactly, with 16 bits, grey and alpha,
    in a lossless file (PNG); the regenerated part is opaque."""
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
    write_pictures(pipe, items, Request("inpaint", {"prompt": prompt}, {"prompt": prompt}), settings)
