"""`codi inpaint`: a picture with a part of it, white in the mask, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .common import Prompt, working
from .pictures import ImageFile, Order, Out, Settings, deliver, open_pipeline, plan_one, shared, variants

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.images import Picture

EXAMPLE = 'Example: codi inpaint room.png --mask hole.png --prompt "a red ball" -o filled.png'


@shared
def inpaint(
    image: ImageFile,
    mask: Annotated[
        Path, typer.Option(help="A picture of the same size, white where to make anew.", show_default=False)
    ],
    out: Out,
    settings: Settings,
    prompt: Prompt = "",
) -> None:
    """Make a part of a picture anew, in 1 to 4 steps. All other pixels come back exactly, 16 bits, grey and alpha too;
    what is made anew is opaque."""
    import torch

    with working("starting"):
        from ..data.images import read_image

        job = plan_one(image, out, settings, beside=[mask])
        picture = read_image(image)
        hole = read_mask(mask, picture)
    pipe = open_pipeline("inpaint", settings)
    alpha = None if picture.alpha is None else torch.where(hole > 0.5, 1.0, picture.alpha)
    items = variants(job, settings, {"image": picture.rgb, "mask": hole}, like=picture, alpha=alpha)
    deliver(pipe, items, Order("inpaint", {"prompt": prompt}, {"prompt": prompt}), settings)


def read_mask(path: Path, picture: Picture) -> Tensor:
    """(1, H, W) of 0 and 1 from a picture file: 1 where it is light and opaque. Raises UserError where it has another
    size than `picture`."""
    from ..data.images import read_image

    mask = read_image(path)
    height, width = mask.rgb.shape[-2:]
    if mask.rgb.shape != picture.rgb.shape:
        high, wide = picture.rgb.shape[-2:]
        raise UserError(f"{path}: {width} x {height} px, but {picture.path} has {wide} x {high}: "
                        "give a mask of the picture's size")  # fmt: skip
    light = mask.rgb.mean(0, keepdim=True)
    return ((light if mask.alpha is None else light * mask.alpha) > 0.5).float()
