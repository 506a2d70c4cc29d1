"""Measure the grain of `codi upscale` in flat areas, and the effect of its removal on photographs.

    python benchmarks/grain.py --photographs folder --out benchmarks/results/grain.json

Grain is the mean spectral power, in levels^2 of 255, at periods of one to three latent cells (the scale at which the
sampler's own noise remains in its result), of a wall with a smooth gradient; beside it that of the bicubically enlarged
input. For photographs (enlarged from a quarter of their size): PSNR, ENLite0 distance, and the power of the finest
detail where the true picture has texture. Each is measured without and with the removal, on the same samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import command_line
from torch import Tensor

from codi import CoDiPipeline
from codi.data.images import read_image
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import enlite0_distance, psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.sampling import colour
from codi.sampling.colour import low_frequencies, match_colour

TEXTURE = 6 / 255  # minimum local standard deviation of the true image's finest detail to count as texture


def wall(side: int = 96) -> Tensor:
    """Return an 8-bit image (1, 3, side, side): a bluish wall that gets darker from top to bottom."""
    ramp = torch.linspace(0.05, -0.05, side)[None, None, :, None]
    return ((torch.tensor([0.80, 0.82, 0.85])[None, :, None, None] + ramp).expand(-1, -1, -1, side) * 255).round() / 255


def power(picture: Tensor, cell: int) -> float:
    """Return the mean power of (1, 3, S, S) at periods of one to three cells of `cell` px, in levels^2 of 255."""
    gray = picture.mean(1)[0] * 255
    side = gray.shape[-1]
    window = torch.hann_window(side)[:, None] * torch.hann_window(side)
    spectrum = torch.fft.fft2((gray - gray.mean()) * window).abs().square() / side**2 / window.square().mean()
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    return float(spectrum[(radius >= 1 / (3 * cell)) & (radius <= 1 / cell)].mean())


def detail(picture: Tensor) -> Tensor:
    """Return the squared finest detail (1, 1, H, W), mean over channels."""
    return (picture - low_frequencies(picture, 2)).square().mean(1, keepdim=True)


def photograph(path: Path, scale: int, most: int = 256) -> Tensor:
    """Return the center (1, 3, H, W) of an image file, with sides of at most `most` px that are multiples of
    `scale`."""
    picture = read_image(path).rgb[None]
    height, width = (min(side, most) // scale * scale for side in picture.shape[-2:])
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[:, :, top : top + height, left : left + width]


def compare(pipe: CoDiPipeline, low: Tensor, steps: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input enlarged, and the result without and with the removal of grain."""
    task: Any = pipe.task
    sample = pipe(image=low, steps=steps, colour="none", output_type="pt").images
    enlarged, grain = task.condition(low), colour.GRAIN
    removed = match_colour(sample, enlarged, method, task.scale)
    try:
        colour.GRAIN = 1e-9  # type: ignore[assignment]
        return enlarged, match_colour(sample, enlarged, method, task.scale), removed
    finally:
        colour.GRAIN = grain  # type: ignore[assignment]


def measure(pipe: CoDiPipeline, files: list[Path], steps: int, method: str) -> dict[str, Any]:
    """Return the figures of one adapter at `steps`."""
    cell = codec.downscale(pipe.vae)
    enlarged, before, after = compare(pipe, wall(), steps, method)
    row: dict[str, Any] = {"steps": steps, "method": method}
    row["wall"] = {"input": power(enlarged, cell), "before": power(before, cell), "after": power(after, cell)}
    figures = []
    for file in files:
        truth = photograph(file, pipe.task.scale)  # type: ignore[union-attr]
        small = F.interpolate(truth, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
        results = compare(pipe, small, steps, method)[1:]
        textured = low_frequencies(detail(truth), 4).sqrt() > TEXTURE
        figures.append(
            [psnr(result, truth).item() for result in results]
            + [enlite0_distance(result, truth).item() for result in results]
            + [float(detail(result)[textured].sum()) for result in results]
        )
    if figures:
        table = torch.tensor(figures, dtype=torch.float64)
        means = table.mean(0).tolist()
        row["photographs"] = {
            "count": len(figures),
            "psnr_db": means[:2],
            "enlite0_distance": means[2:4],
            "texture_power_kept": float(table[:, 5].sum() / table[:, 4].sum()),
        }
    return row


def main() -> None:
    """Measure both embedded upscalers and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grain.json"))
    parser.add_argument("--photographs", type=Path, help="folder of photographs, of which every --every'th is taken")
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    files = sorted(args.photographs.glob("*.png"))[:: args.every] if args.photographs else []
    rows = []
    for adapter, method in (("upscale", "back-projection"), ("upscale-real", "wavelet")):
        pipe = CoDiPipeline.from_pretrained("photo", adapter=adapter)
        pipe.set_progress_bar_config(disable=True)
        rows += [{"adapter": adapter} | measure(pipe, files, steps, method) for steps in (1, 4)]
    write_json({"rows": rows, "seed": 0, "command": command_line(), "machine": describe_machine()}, args.out)


if __name__ == "__main__":
    main()
