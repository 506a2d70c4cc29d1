"""Measure a text-to-image backbone: codec reconstruction, velocity loss, caption accuracy, FD to true renders.

    python benchmarks/backbone.py --model mini --out benchmarks/results/backbone.json
    python benchmarks/backbone.py --model mini --averages RUN/training/ldm/checkpoints/*/average.safetensors --out CURVE

Images are sampled for held-out captions with one, two, three and four objects, an equal number of each. The scene
reader (benchmarks/reader.py) checks the colour, shape and material of each object in the caption, the object count, and
whether everything is right; its figures on true renders of the same scenes are the reference. FD-ENLite0 compares the
samples with those renders; `fd_codec`, that of the renders after the codec, is its lower bound.
`--averages` measures checkpoints of a training run instead, one row each: a learning curve.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from command import command_line, public
from judges import Read, caption_figures
from reader import labelled
from reading import WEIGHTS, load_reader, read
from safetensors.torch import load_file
from torch import Tensor

from codi.data.check import contact_sheet
from codi.data.scenes import MAX_OBJECTS
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import default_features, frechet_distance, psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.backbones import Backbone, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import initial_noise, sample

COUNTS = range(1, MAX_OBJECTS + 1)


def velocity_loss(backbone: Backbone, latents: Tensor, captions: list[str]) -> float:
    """Return the mean squared error of the network's output on held-out latents, with fixed noise and times."""
    generator, losses = torch.Generator().manual_seed(0), []
    schedule = backbone.schedule
    for start in range(0, len(latents), 32):
        x = latents[start : start + 32]
        t = schedule.draw(len(x), 1, False, generator)
        eps = torch.randn(x.shape, generator=generator)
        text = embed_prompts(backbone.text, captions[start : start + 32])[0]
        output = Student(backbone.unet)(schedule.mix(x, eps, t), schedule.timestep(t), Conditioning(text))
        losses.append((output - schedule.output(x, eps, t)).square().mean((1, 2, 3)))
    return float(torch.cat(losses).mean())


def draw(backbone: Backbone, prompts: list[str], size: int, steps: int, guidance: float) -> Tensor:
    """Return one image per prompt, (B, 3, S, S); image i starts from seed i."""
    shape = (backbone.unet.config["in_channels"], *[size // codec.downscale(backbone.vae)] * 2)
    images = []
    for start in range(0, len(prompts), 20):
        batch = prompts[start : start + 20]
        text, blank = (embed_prompts(backbone.text, p)[0] for p in (batch, [""] * len(batch)))
        noise = initial_noise(shape, range(start, start + len(batch)))
        z = sample(
            Student(backbone.unet), backbone.schedule, noise, Conditioning(text), steps, guidance, Conditioning(blank)
        )
        images.append(codec.decode(backbone.vae, z))
    return torch.cat(images)


def pooled(images: Tensor) -> Tensor:
    """Return the pooled ENLite0 features (B, 1280) of images."""
    return torch.cat([default_features()(part).pooled for part in images.split(25)])


def captions_shown(read_scenes: Read, images: Tensor, captions: list[str]) -> dict[str, Any]:
    """Return the means of `caption_figures`, over all captions and by object count; each count has the same number of
    captions, in order."""
    figures = caption_figures(read_scenes(images), captions)
    means = {name: values.view(len(COUNTS), -1).mean(1).tolist() for name, values in figures.items()}
    by_count = {str(n): {name: values[k] for name, values in means.items()} for k, n in enumerate(COUNTS)}
    return {name: float(values.mean()) for name, values in figures.items()} | {"by_count": by_count}


def main() -> None:
    """Measure the backbone or its checkpoints and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--averages", type=Path, nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=16, help="batch size of the training run of --averages")
    parser.add_argument("--prompts", type=int, default=125, help="captions per object count")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backbone.json"))
    parser.add_argument("--sheet", type=Path, help="contact sheet of the first images of each object count")
    args = parser.parse_args()

    backbone = load_backbone(args.model).freeze()
    read_scenes = functools.partial(read, load_reader(args.reader))
    scenes = [labelled("held-out", range(args.prompts), args.size, count) for count in COUNTS]
    captions = [scene.caption for part in scenes for scene in part.scenes]
    images = torch.cat([part.image for part in scenes]).float() / 255
    true_features = pooled(images)

    with torch.no_grad():
        latents = torch.cat([codec.encode(backbone.vae, part) for part in images.split(32)])
        reconstructions = torch.cat([codec.decode(backbone.vae, part) for part in latents.split(32)])
        rows, samples = [], images
        for average in args.averages or [None]:
            row: dict[str, Any] = {}
            if average is not None:
                row["images_trained"] = int(average.parent.name.rpartition("-")[2]) * args.batch
                weights = load_file(average)
                for name in ("unet", "text_encoder"):
                    part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
                    getattr(backbone, name).load_state_dict(part, strict=False)
            start = time.perf_counter()
            samples = draw(backbone, captions, args.size, args.steps, args.guidance)
            row["seconds_per_picture"] = (time.perf_counter() - start) / len(captions)
            row |= captions_shown(read_scenes, samples, captions)
            row["fd"] = frechet_distance(pooled(samples), true_features)
            row["velocity_loss"] = velocity_loss(backbone, latents, captions)
            rows.append(row)
            print(row, file=sys.stderr)
    result = {
        "model": public(args.model),
        "size": args.size,
        "codec_psnr_db": float(psnr(reconstructions, images).mean()),
        "fd_codec": frechet_distance(pooled(reconstructions), true_features),
        "prompts": len(captions),
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "seed": 0,
        "judge_on_true_renders": captions_shown(read_scenes, images, captions),
        "rows": rows,
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)
    if args.sheet:
        first = torch.cat([part[:12] for part in samples.split(args.prompts)])
        contact_sheet(list(first), 12).save(args.sheet)


if __name__ == "__main__":
    main()
