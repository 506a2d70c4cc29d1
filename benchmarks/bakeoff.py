"""Which layout for the embedded model? Compares text-to-image models that were trained on the same latents.

    python benchmarks/bakeoff.py --models runs/mini-flux runs/mini-unet --out benchmarks/results/bakeoff.json

Each model is a folder that `codi pretrain` wrote, in the FLUX.1 or the Stable Diffusion layout, and draws by diffusers'
own pipeline. Rows hold:

- `velocity_loss`: mean squared error of the velocity u = eps - x on the linear path z_t = (1 - t) x + t eps, for all
  models at the same held-out latents, noise and times. A v-prediction model sees z_t / sqrt((1 - t)^2 + t^2) at the
  level with the same signal-to-noise ratio; its x and eps give its u. `by_time`: the same in four quarters of t.
- `fd` and `fd_over_floor`: FD-ENLite0 between drawn pictures and true renders of the same captions, and less the floor,
  that of the renders after the codec. FD falls with the number of pictures: compare only figures of one file.
- with --reader, how many captions the pictures show (see backbone.py).
- `images_trained`, `seconds_trained` (of the training process, evaluation left out) and parameters.
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
    """Returns `count` discrete timesteps of a variance-preserving schedule, about evenly spaced in linear time, and
    their linear times t = sigma / (alpha + sigma), both (count,)."""
    alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    linear = sigma / (alpha + sigma)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    nearest = (linear[None] - wanted[:, None]).abs().argmin(1)
    return nearest, linear[nearest].float()


def velocity(pipe: Any, z: Tensor, t: Tensor, level: Tensor, captions: list[str]) -> Tensor:
    """Returns the model's u (B, C, h, w) at `z` on the linear path, times `t` (B,), for a U-Net's discrete `level`."""
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
    at = t[:, None, None, None]
    norm = ((1 - at) ** 2 + at**2).sqrt()
    alpha, sigma = (1 - at) / norm, at / norm
    noisy = z / norm
    v = pipe.unet(noisy, level, pipe.text_encoder(tokens)[0]).sample
    return (sigma * noisy + alpha * v) - (alpha * noisy - sigma * v)


@torch.no_grad()
def velocity_losses(pipe: Any, latents: Tensor, captions: list[str], alphas_cumprod: Tensor) -> Tensor:
    """Returns the squared error of u of each held-out latent (N,), in the order of rising times."""
    generator = torch.Generator().manual_seed(0)
    level, t = levels(len(latents), alphas_cumprod)
    eps = torch.randn(latents.shape, generator=generator)
    order = torch.randperm(len(latents), generator=generator)  # which scene gets which time
    losses = []
    for part in order.view(-1).split(50):
        rows = torch.arange(len(losses) * 50, len(losses) * 50 + len(part))
        x, noise, at = latents[part], eps[part], t[rows][:, None, None, None]
        u = velocity(pipe, (1 - at) * x + at * noise, t[rows], level[rows], [captions[i] for i in part.tolist()])
        losses.append((u - (noise - x)).square().mean((1, 2, 3)))
    return torch.cat(losses)


def pictures(pipe: Any, captions: list[str], size: int) -> Tensor:
    """Returns one picture a caption, (B, 3, S, S); picture i of each twenty starts from seed i."""
    options: dict[str, Any] = {"guidance_scale": GUIDANCE}
    if isinstance(pipe, FluxPipeline):
        options = {"true_cfg_scale": GUIDANCE, "max_sequence_length": pipe.tokenizer_2.model_max_length}
        options |= {"negative_prompt": "", "height": size, "width": size}
    parts = [captions[start : start + 20] for start in range(0, len(captions), 20)]
    return torch.cat([draw(pipe, part, **options).float() for part in parts])


def trained(folder: Path) -> dict[str, Any]:
    """Returns how long a model trained, from the newest checkpoint that `codi pretrain` left in its folder."""
    states = sorted((folder / "training" / "ldm" / "checkpoints").glob("step-*/state.json"))
    progress = json.loads(states[-1].read_text())["progress"] if states else {}
    return {"images_trained": progress.get("images"), "seconds_trained": progress.get("seconds")}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=int, default=50, help="captions of each number of objects, one to four")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--reader", type=Path, help="weights of a scene reader for this size (reader.py)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bakeoff.json"))
    parser.add_argument("--sheets", type=Path, help="a folder for a contact sheet of each model")
    args = parser.parse_args()

    look = functools.partial(read, load_reader(args.reader)) if args.reader else None
    scenes = [labelled("held-out", range(args.prompts), args.size, count) for count in COUNTS]
    captions = [scene.caption for part in scenes for scene in part.scenes]
    images = torch.cat([part.image for part in scenes]).float() / 255
    truth, rows = pooled(images), []
    floor, decibels = 0.0, 0.0
    alphas_cumprod = new_scheduler().alphas_cumprod
    for folder in args.models:
        pipe: Any = DiffusionPipeline.from_pretrained(folder)
        network = pipe.transformer if isinstance(pipe, FluxPipeline) else pipe.unet
        with torch.no_grad():
            latents = torch.cat([codec.encode(pipe.vae, part) for part in images.split(32)])
            rebuilt = torch.cat([codec.decode(pipe.vae, part) for part in latents.split(32)])
        if not rows:
            floor, decibels = frechet_distance(pooled(rebuilt), truth), float(psnr(rebuilt, images).mean())
        losses = velocity_losses(pipe, latents, captions, alphas_cumprod)
        began = time.perf_counter()
        made = pictures(pipe, captions, args.size)
        spent = (time.perf_counter() - began) / len(captions)
        row: dict[str, Any] = {
            "model": public(str(folder)),
            "layout": type(pipe).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            **trained(folder),
            "velocity_loss": float(losses.mean()),
            "by_time": [float(part.mean()) for part in losses.chunk(4)],
            "fd": frechet_distance(pooled(made), truth),
            "seconds_per_picture": spent,
        }
        row["fd_over_floor"] = row["fd"] - floor
        row |= captions_shown(look, made, captions) if look else {}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            first = torch.cat([part[:8] for part in made.split(args.prompts)])
            contact_sheet(list(first), 8).save(args.sheets / f"{folder.name}.png")
    result = {
        "size": args.size,
        "codec_psnr_db": decibels,
        "fd_floor": floor,
        "prompts": len(captions),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "reader_on_true_renders": captions_shown(look, images, captions) if look else None,
        "rows": rows,
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)


if __name__ == "__main__":
    main()
