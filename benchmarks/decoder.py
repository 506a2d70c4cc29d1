"""Compare a tiny decoder with the full one: similarity of their images, loss of quality, and speed.

    python benchmarks/decoder.py --model mini --decoder tiny --out benchmarks/results/decoder.json --sheet look.png

`to_full` is the PSNR of the tiny decoder's image to the full decoder's of the same latent; `tiny` and `full` are their
PSNRs to the true image: on held-out scenes (with FD-ENLite0 to the true ones), on the first of them at four times the
side, and on photographs of scikit-image, which neither decoder was trained on. `samples` are sampled latents: those of
the adapter `generate` in 4 steps for held-out captions. Times are CPU time of one image in one thread, which excludes
waiting on a busy machine: medians of decoders taking turns in one process; the ratio is the median of per-turn ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import command_line, public
from torch import Tensor

from codi.apps.gallery import photographs
from codi.data.check import contact_sheet
from codi.data.samples import Sample
from codi.data.sources import open_source
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import default_features, frechet_distance, psnr
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.backbones import load_vae
from codi.models.tiny import open_decoder
from codi.sampling.pipeline import CoDiPipeline

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def scenes(count: int, size: int) -> tuple[Tensor, list[str]]:
    """Return held-out scenes (B, 3, S, S) and their captions."""
    samples = [s for s in open_source(f"scenes:held-out:{count}").read(range(count), size) if isinstance(s, Sample)]
    return torch.stack([s.image for s in samples]), [s.text for s in samples]


def photos(side: int) -> Tensor:
    """Return the center square of each of PHOTOS, (B, 3, side, side)."""
    return torch.stack([s.image for s in photographs(dict.fromkeys(PHOTOS, ""), side, 1)])


def both(full: Any, tiny: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images that the full and the tiny decoder make of latents."""
    batches = latents.split(16)
    return torch.cat([codec.decode(full, z) for z in batches]), torch.cat([codec.decode(tiny, z) for z in batches])


def figures(full: Tensor, tiny: Tensor, truth: Tensor | None = None) -> dict[str, float]:
    """Return mean PSNRs in dB, by name."""
    pairs = {"to_full": (tiny, full)} | ({} if truth is None else {"tiny": (tiny, truth), "full": (full, truth)})
    return {name: float(psnr(a, b).mean()) for name, (a, b) in pairs.items()}


def times(full: Any, tiny: Any, latent: Tensor, turns: int) -> dict[str, float]:
    """Return CPU milliseconds of one image for each decoder, and how many times faster the tiny one is."""
    turns_taken: list[tuple[float, float]] = []
    for turn in range(turns + 2):
        milliseconds = []
        for vae in (full, tiny):
            started = time.process_time()
            codec.decode(vae, latent)
            milliseconds.append(1e3 * (time.process_time() - started))
        if turn >= 2:  # the first turns allocate memory
            turns_taken.append((milliseconds[0], milliseconds[1]))
    medians = [statistics.median(column) for column in zip(*turns_taken, strict=True)]
    return {"full_ms": medians[0], "tiny_ms": medians[1], "ratio": statistics.median(a / b for a, b in turns_taken)}


def main() -> None:
    """Measure both decoders and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--decoder", default="tiny")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decoder.json"))
    parser.add_argument("--sheet", type=Path, help="contact sheet of the true, full and tiny images side by side")
    args = parser.parse_args()

    torch.set_num_threads(1)
    with torch.inference_mode():
        vae = load_vae(args.model).eval()
        tiny = open_decoder(args.decoder, args.model, vae)
        assert tiny is not None, "--decoder: give a tiny decoder"
        decode_times = {}
        for side in (args.size, 4 * args.size):
            latent = codec.encode(vae, scenes(1, side)[0])
            decode_times[str(side)] = times(vae, tiny, latent, args.turns if side == args.size else args.turns // 2)
        quality: dict[str, dict[str, float]] = {}
        sheet: list[Tensor] = []
        (small, captions), (large, _) = scenes(args.count, args.size), scenes(max(1, args.count // 20), 4 * args.size)
        for name, truth in (("scenes", small), ("large_scenes", large), ("photographs", photos(4 * args.size))):
            latents = torch.cat([codec.encode(vae, part) for part in truth.split(16)])
            decoded = both(vae, tiny, latents)
            quality[name] = figures(*decoded, truth)
            if name == "scenes":
                true_features, full_features, tiny_features = (
                    torch.cat([default_features()(part).pooled for part in images.split(25)])
                    for images in (truth, *decoded)
                )
                quality[name] |= {
                    "fd_tiny": frechet_distance(tiny_features, true_features),
                    "fd_full": frechet_distance(full_features, true_features),
                }
            rows = torch.stack([truth, *decoded], dim=1)[: 8 if name == "scenes" else 2]
            sheet += [F.interpolate(x[None], 4 * args.size, mode="nearest")[0] for x in rows.flatten(0, 1)]
        pipe = CoDiPipeline.from_pretrained(args.model, task="generate")
        pipe.set_progress_bar_config(disable=True)
        prompts = captions[:64]
        samples: Any = pipe(prompt=prompts, steps=4, seed=list(range(len(prompts))), output_type="latent")
        quality["samples"] = figures(*both(vae, tiny, samples.images))
    parameters = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("full", vae.decoder), ("tiny", tiny.decoder))
    }
    result = {
        "model": public(args.model),
        "decoder": public(args.decoder),
        "size": args.size,
        "count": args.count,
        "psnr_db": quality,
        "decode": decode_times,
        "decoder_parameters": parameters,
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)
    print({"psnr_db": quality, "decode": decode_times})
    if args.sheet:
        contact_sheet(sheet, 6).save(args.sheet)


if __name__ == "__main__":
    main()
