"""Compare text-to-image models trained on the same latents, to choose a layout for the embedded model.

    python benchmarks/bakeoff.py --models runs/mini-flux runs/mini-unet --out benchmarks/results/bakeoff.json

Each model is a folder that `codi pretrain` wrote, in the FLUX.1 or the Stable Diffusion layout, and samples through
diffusers' own pipeline. Rows hold:

- `velocity_loss`: mean squared error of the velocity u = eps - x on the linear path z_t = (1 - t) x + t eps, for all
  models at the same held-out latents, noise and times. A v-prediction model gets z_t / sqrt((1 - t)^2 + t^2) at the
  level with the same signal-to-noise ratio; its x and eps give its u. `by_time`: the same in four quarters of t.
- `fd` and `fd_over_floor`: FD-ENLite0 between samples and true renders of the same captions, and its excess over the
  floor, the FD of the renders after the codec. FD falls with the number of images: compare only figures of one file.
- with --reader, caption accuracy (see backbone.py).
- `images_trained`, `seconds_trained` (training time without evaluation) and parameters.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from backbone import COUNTS, captions_shown, pooled
from command import command_line, public
from diffusers import DiffusionPipeline, FluxPipeline
from reader import labelled
from reading import load_reader, read
from torch import Tensor

from codi.data.check import contact_sheet
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import frechet_distance, psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.training.flux import flow
from codi.training.latents import draw
from codi.training.unet import new_scheduler

STEPS = 20
GUIDANCE = 3.0


def levels(count: int, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Return `count` discrete timesteps of a variance-preserving schedule, about evenly spaced in linear time, and
    their linear times t = sigma / (alpha + sigma), both (count,)."""
    alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    linear = sigma / (alpha + sigma)
    evenly_spaced = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    nearest = (linear[None] - evenly_spaced[:, None]).abs().argmin(1)
    return nearest, linear[nearest].float()


def velocity(pipe: Any, z: Tensor, t: Tensor, level: Tensor, captions: list[str]) -> Tensor:
    """Return the model's u (B, C, h, w) at `z` on the linear path, times `t` (B,); a U-Net gets timesteps `level`
    (B,)."""
    if isinstance(pipe, FluxPipeline):
        clip, t5 = (
            tokenizer(captions, padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids
            for tokenizer, n in (
                (pipe.tokenizer, pipe.tokenizer.model_max_length),
                (pipe.tokenizer_2, pipe.tokenizer_2.model_max_length),
            )
        )
        return flow(pipe.components, z, t, torch.cat([clip, t5], dim=1), clip.shape[1])
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    time = t[:, None, None, None]
    norm = ((1 - time) ** 2 + time**2).sqrt()
    alpha, sigma = (1 - time) / norm, time / norm
    noisy = z / norm
    v = pipe.unet(noisy, level, pipe.text_encoder(tokens)[0]).sample
    return (sigma * noisy + alpha * v) - (alpha * noisy - sigma * v)


@torch.no_grad()
def velocity_losses(pipe: Any, latents: Tensor, captions: list[str], alphas_cumprod: Tensor) -> Tensor:
    """Return the squared error of u of each held-out latent (N,), in order of increasing time."""
    generator = torch.Generator().manual_seed(0)
    timesteps, times = levels(len(latents), alphas_cumprod)
    eps = torch.randn(latents.shape, generator=generator)
    order = torch.randperm(len(latents), generator=generator)  # assigns times to scenes at random
    losses = []
    for indices in order.view(-1).split(50):
        rows = torch.arange(len(losses) * 50, len(losses) * 50 + len(indices))
        x, noise, time = latents[indices], eps[indices], times[rows][:, None, None, None]
        u = velocity(
            pipe, (1 - time) * x + time * noise, times[rows], timesteps[rows], [captions[i] for i in indices.tolist()]
        )
        losses.append((u - (noise - x)).square().mean((1, 2, 3)))
    return torch.cat(losses)


def pictures(pipe: Any, captions: list[str], size: int) -> Tensor:
    """Return one image per caption, (B, 3, S, S); image i of each batch of twenty starts from seed i."""
    options: dict[str, Any] = {"guidance_scale": GUIDANCE}
    if isinstance(pipe, FluxPipeline):
        options = {"true_cfg_scale": GUIDANCE, "max_sequence_length": pipe.tokenizer_2.model_max_length}
        options |= {"negative_prompt": "", "height": size, "width": size}
    parts = [captions[start : start + 20] for start in range(0, len(captions), 20)]
    return torch.cat([draw(pipe, part, **options).float() for part in parts])


def trained(folder: Path) -> dict[str, Any]:
    """Return images and seconds trained, from the newest checkpoint of `codi pretrain` in the model's folder."""
    states = sorted((folder / "training" / "ldm" / "checkpoints").glob("step-*/state.json"))
    progress = json.loads(states[-1].read_text())["progress"] if states else {}
    return {"images_trained": progress.get("images"), "seconds_trained": progress.get("seconds")}


def main() -> None:
    """Measure all models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=int, default=50, help="captions per object count, one to four")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--reader", type=Path, help="weights of a scene reader for this size (reader.py)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bakeoff.json"))
    parser.add_argument("--sheets", type=Path, help="a folder for a contact sheet of each model")
    args = parser.parse_args()

    read_scenes = functools.partial(read, load_reader(args.reader)) if args.reader else None
    scenes = [labelled("held-out", range(args.prompts), args.size, count) for count in COUNTS]
    captions = [scene.caption for part in scenes for scene in part.scenes]
    images = torch.cat([part.image for part in scenes]).float() / 255
    true_features, rows = pooled(images), []
    floor, codec_psnr = 0.0, 0.0
    alphas_cumprod = new_scheduler().alphas_cumprod
    for folder in args.models:
        pipe: Any = DiffusionPipeline.from_pretrained(folder)
        network = pipe.transformer if isinstance(pipe, FluxPipeline) else pipe.unet
        with torch.no_grad():
            latents = torch.cat([codec.encode(pipe.vae, part) for part in images.split(32)])
            reconstructions = torch.cat([codec.decode(pipe.vae, part) for part in latents.split(32)])
        if not rows:
            floor, codec_psnr = (
                frechet_distance(pooled(reconstructions), true_features),
                float(psnr(reconstructions, images).mean()),
            )
        losses = velocity_losses(pipe, latents, captions, alphas_cumprod)
        started = time.perf_counter()
        samples = pictures(pipe, captions, args.size)
        seconds_per_image = (time.perf_counter() - started) / len(captions)
        row: dict[str, Any] = {
            "model": public(str(folder)),
            "layout": type(pipe).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            **trained(folder),
            "velocity_loss": float(losses.mean()),
            "by_time": [float(part.mean()) for part in losses.chunk(4)],
            "fd": frechet_distance(pooled(samples), true_features),
            "seconds_per_picture": seconds_per_image,
        }
        row["fd_over_floor"] = row["fd"] - floor
        row |= captions_shown(read_scenes, samples, captions) if read_scenes else {}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            first = torch.cat([part[:8] for part in samples.split(args.prompts)])
            contact_sheet(list(first), 8).save(args.sheets / f"{folder.name}.png")
    result = {
        "size": args.size,
        "codec_psnr_db": codec_psnr,
        "fd_floor": floor,
        "prompts": len(captions),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "reader_on_true_renders": captions_shown(read_scenes, images, captions) if read_scenes else None,
        "rows": rows,
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)


if __name__ == "__main__":
    main()
