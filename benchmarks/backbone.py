"""How good a text-to-image backbone is: codec reconstruction, and whether one-object prompts are obeyed.

    python benchmarks/backbone.py --model mini --out benchmarks/results/backbone.json
    python benchmarks/backbone.py --model mini --averages RUN/training/ldm/checkpoints/*/average.safetensors --out CURVE

Writes JSON: held-out reconstruction PSNR, velocity loss on held-out scenes, the share of held-out one-object prompts
whose picture shows an object of the colour asked for, and the same judge's score on true renders of the same scenes.
`--averages` measures checkpoints of a training run instead, one row each: a learning curve.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from reader import Reader, dominant_colour, labelled, train_reader
from safetensors.torch import load_file

from codi.data.check import contact_sheet
from codi.data.samples import Sample
from codi.data.scenes import sample_scene
from codi.data.sources import open_source
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.backbone import Backbone, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import ddim, initial_noise


def velocity_loss(backbone: Backbone, latents: torch.Tensor, captions: list[str]) -> float:
    """Mean squared error of the network's output on held-out latents: the same noise and times at every call."""
    generator, losses = torch.Generator().manual_seed(0), []
    schedule = backbone.schedule
    for start in range(0, len(latents), 32):
        x = latents[start : start + 32]
        t = schedule.draw(len(x), 1, False, generator)
        eps = torch.randn(x.shape, generator=generator)
        text = embed_prompts(backbone.tokenizer, backbone.text_encoder, captions[start : start + 32])
        output = Student(backbone.unet)(schedule.mix(x, eps, t), schedule.timestep(t), Conditioning(text))
        losses.append((output - schedule.output(x, eps, t)).square().mean((1, 2, 3)))
    return float(torch.cat(losses).mean())


def draw(backbone: Backbone, prompts: list[str], size: int, steps: int, guidance: float) -> torch.Tensor:
    """One picture a prompt, (B, 3, S, S); picture i starts from seed i."""
    shape = (backbone.unet.config["in_channels"], *[size // codec.downscale(backbone.vae)] * 2)
    pictures = []
    for start in range(0, len(prompts), 20):
        part = prompts[start : start + 20]
        text, blank = (embed_prompts(backbone.tokenizer, backbone.text_encoder, p) for p in (part, [""] * len(part)))
        noise = initial_noise(shape, range(start, start + len(part)))
        z = ddim(
            Student(backbone.unet), backbone.schedule, noise, Conditioning(text), steps, guidance, Conditioning(blank)
        )
        pictures.append(codec.decode(backbone.vae, z))
    return torch.cat(pictures)


def obedience(reader: Reader, pictures: torch.Tensor, wanted: list[str]) -> dict[str, float]:
    """Share of pictures with an object at all, and with the colour asked for."""
    found = dominant_colour(reader, pictures)
    return {
        "object_present": sum(f is not None for f in found) / len(found),
        "colour_as_asked": sum(f == w for f, w in zip(found, wanted, strict=True)) / len(found),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--averages", type=Path, nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=16, help="images of one update of the run behind --averages")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backbone.json"))
    parser.add_argument("--sheet", type=Path, help="write the first pictures there")
    args = parser.parse_args()

    backbone = load_backbone(args.model).freeze()
    reader = train_reader(args.size)
    truth, _, wanted = labelled("held-out", range(args.prompts), args.size, count=1)
    prompts = [sample_scene(0, "held-out", i, 1).caption for i in range(args.prompts)]
    samples = [s for s in open_source("scenes:held-out:256").read(range(256), args.size) if isinstance(s, Sample)]
    images, captions = torch.stack([s.image for s in samples]), [s.text for s in samples]

    with torch.no_grad():
        latents = torch.cat([codec.encode(backbone.vae, part) for part in images.split(32)])
        rebuilt = torch.cat([codec.decode(backbone.vae, part) for part in latents.split(32)])
        rows, made = [], truth
        for average in args.averages or [None]:
            trained = None
            if average is not None:
                trained = int(average.parent.name.rpartition("-")[2]) * args.batch
                weights = load_file(average)
                for name in ("unet", "text_encoder"):
                    part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
                    getattr(backbone, name).load_state_dict(part, strict=False)
            start = time.perf_counter()
            made = draw(backbone, prompts, args.size, args.steps, args.guidance)
            row = {"images_trained": trained} if average is not None else {}
            row |= obedience(reader, made, wanted)
            row["seconds_per_picture"] = (time.perf_counter() - start) / len(prompts)
            row["velocity_loss"] = velocity_loss(backbone, latents, captions)
            rows.append(row)
            print(row, file=sys.stderr)
    result = {
        "model": args.model,
        "codec_psnr_db": float(psnr(rebuilt, images).mean()),
        "prompts": len(prompts),
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "seed": 0,
        "judge_on_true_renders": obedience(reader, truth, wanted)["colour_as_asked"],
        "rows": rows,
        "command": f"python benchmarks/backbone.py --model {args.model} --prompts {args.prompts} --steps {args.steps} "
        f"--guidance {args.guidance:g} --size {args.size}" + (" --averages ..." if args.averages else ""),
        "machine": describe_machine(),
    }
    write_json(result, args.out)
    if args.sheet:
        contact_sheet(list(made[:48]), 8).save(args.sheet)


if __name__ == "__main__":
    main()
