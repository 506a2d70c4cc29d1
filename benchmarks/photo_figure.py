"""Make the README's first figure: photographs of scikit-image, downscaled and enlarged again.

    python benchmarks/photo_figure.py --out docs/photo.png

The astronaut is NASA's, in the public domain; the cat (Stéfan van der Walt) and the cup (Rachel Michetti) are CC0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from skimage import data
from torch import Tensor

from codi.evaluation.report import contact_sheet
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks.degradations import bicubic
from codi.tasks.upscale import Upscale

SCALE, SIDE = 4, 256
PARTS = {"chelsea": (20, 110), "astronaut": (10, 120), "coffee": (110, 150)}  # top and left of the visible crop


def main() -> None:
    """Save the figure. Columns: bicubic enlargement, codi in 1 and 4 steps, the photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipe = CoDiPipeline.from_pretrained("photo", task="upscale")
    pipe.set_progress_bar_config(disable=True)
    columns: dict[str, list[Tensor]] = {}
    for name, (top, left) in PARTS.items():
        pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
        truth = pixels[..., : pixels.shape[-2] // SCALE * SCALE, : pixels.shape[-1] // SCALE * SCALE]
        small = bicubic(truth, SCALE)
        results = {"bicubic": Upscale(SCALE).condition(small)}
        for steps, label in ((1, "codi, 1 step"), (4, "codi, 4 steps")):
            results[label] = pipe(image=small, steps=steps, output_type="pt").images  # type: ignore[union-attr]
        for label, picture in {**results, "photograph": truth}.items():
            columns.setdefault(label, []).append(picture[0, :, top : top + SIDE, left : left + SIDE])
    contact_sheet({label: torch.stack(parts) for label, parts in columns.items()}, SIDE).save(args.out)


if __name__ == "__main__":
    main()
