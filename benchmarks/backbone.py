"""How good a text-to-image backbone is: codec reconstruction, and whether one-object prompts are obeyed.

    python benchmarks/backbone.py --model mini --out benchmarks/results/backbone.json

Writes JSON: held-out reconstruction PSNR, the share of held-out one-object prompts whose picture shows an object of the
colour asked for, the same judge's score on true renders of the same scenes, and the validation velocity loss.
`--sheet FILE` also writes the first pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from reader import dominant_colour, labelled, train_reader

from codi.data.check import contact_sheet
from codi.data.scenes import sample_scene
from codi.data.sources import open_source
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.backbone import load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import ddim, initial_noise


@torch.no_grad()
def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backbone.json"))
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()

    backbone = load_backbone(args.model).freeze()
    with torch.enable_grad():
        reader = train_reader(args.size)
    count, size = args.prompts, args.size

    held_out = open_source("scenes:held-out:256")
    samples = held_out.read(range(256), size)
    images = torch.stack([s.image for s in samples])  # type: ignore[union-attr]
    latents = torch.cat([codec.encode(backbone.vae, x) for x in images.split(32)])
    rebuilt = torch.cat([codec.decode(backbone.vae, z) for z in latents.split(32)])

    # Velocity loss on held-out scenes: the same noise and times at every call, so runs compare.
    generator = torch.Generator().manual_seed(0)
    schedule = backbone.schedule
    losses = []
    for part, batch in zip(latents.split(32), range(0, 256, 32), strict=True):
        t = schedule.draw(len(part), 1, False, generator)
        eps = torch.randn(part.shape, generator=generator)
        text = embed_prompts(backbone.tokenizer, backbone.text_encoder, [s.text for s in samples[batch : batch + 32]])  # type: ignore[union-attr]
        output = Student(backbone.unet)(schedule.mix(part, eps, t), schedule.timestep(t), Conditioning(text))
        losses.append((output - schedule.output(part, eps, t)).square().mean((1, 2, 3)))

    truth, _, wanted = labelled("held-out", range(count), size, count=1)
    prompts = [sample_scene(0, "held-out", i, 1).caption for i in range(count)]
    shape = (backbone.unet.config["in_channels"], *[size // codec.downscale(backbone.vae)] * 2)
    pictures = []
    start = time.perf_counter()
    for i in range(0, count, 20):
        chunk = prompts[i : i + 20]
        text, blank = (embed_prompts(backbone.tokenizer, backbone.text_encoder, p) for p in (chunk, [""] * len(chunk)))
        z = ddim(
            Student(backbone.unet), schedule, initial_noise(shape, range(i, i + len(chunk))), Conditioning(text),
            steps=args.steps, guidance_scale=args.guidance, unconditional=Conditioning(blank),
        )  # fmt: skip
        pictures.append(codec.decode(backbone.vae, z))
    seconds = time.perf_counter() - start
    made = torch.cat(pictures)

    def share(found: list[str | None]) -> float:
        return sum(a == b for a, b in zip(found, wanted, strict=True)) / count

    read, judged = dominant_colour(reader, made), dominant_colour(reader, truth)
    training = Path(args.model) / "training.json"
    result = {
        "model": str(args.model),
        "images_trained": json.loads(training.read_text())["images"] if training.is_file() else None,
        "codec_psnr_db": float(psnr(rebuilt, images).mean()),
        "velocity_loss": float(torch.cat(losses).mean()),
        "prompts": count,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "object_present": sum(r is not None for r in read) / count,
        "colour_as_asked": share(read),
        "judge_on_true_renders": share(judged),
        "seconds_per_picture": seconds / count,
        "seed": 0,
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
    }
    write_json(result, args.out)
    print(json.dumps(result, indent=1))
    if args.sheet:
        contact_sheet(list(made[:48]), 8).save(args.sheet)


if __name__ == "__main__":
    main()
