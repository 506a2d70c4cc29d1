"""Trains the scene reader (reading.py) on exact renders and measures it on held-out ones.

    python benchmarks/reader.py --out benchmarks/results/reader.json

Two thirds of the training pictures are blurred, noisy or passed through the codec of --codec with noise on the
latents, so that soft pictures are read as well as sharp ones. Reported for scenes:held-out, sharp and through the
codec: the share of pictures whose number of objects is read right, of objects whose colour, shape and material are, and
the error of the disparity. For another size than 64 px, train again; --start goes on from weights that are there. The
committed weights saw 64,000 pictures, then 32,000 and 48,000 more at peak learning rates of 1.5e-3 and 1.2e-3: shine at
night was learnt last.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import command_line
from diffusers import AutoencoderKL
from reading import LEAST_PIXELS, OFFSET_UNIT, WEIGHTS, Reader, load_reader, pixels, read, save_reader
from safetensors import safe_open
from torch import Tensor, nn

from codi.data.raycast import render
from codi.data.scenes import COLOURS, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, Scene, sample_scene
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.backbones import load_backbone
from codi.tasks.depth import disparity
from codi.training.ema import average_copy, update, warmed_decay


@dataclass
class Labelled:
    """Exact renders: `image` (B, 3, S, S) uint8; `mask` (B, S, S) uint8, 0 or the number of an object; `disparity`
    (B, S, S) float16 in [0, 1]; `classes` (B, 1 + MAX_OBJECTS, 3): colour (from 1), shape, material by number."""

    image: Tensor
    mask: Tensor
    disparity: Tensor
    classes: Tensor
    scenes: list[Scene]


def labelled(split: str, indices: range, size: int, count: int | None = None) -> Labelled:
    """Renders the scenes `indices` of `split` (of `count` objects, if given) with what there is to read."""
    images, masks, disparities, scenes = [], [], [], []
    for start in range(0, len(indices), 16):
        part = [sample_scene(0, split, i, count) for i in indices[start : start + 16]]
        out = render(part, size)
        images.append(out.image)
        masks.append(out.mask)
        disparities.append(disparity(out.depth).half())
        scenes += part
    classes = torch.zeros(len(scenes), 1 + MAX_OBJECTS, 3, dtype=torch.long)
    for b, scene in enumerate(scenes):
        for k, s in enumerate(scene.solids, 1):
            numbers = 1 + list(COLOURS).index(s.colour), SHAPES.index(s.shape), MATERIALS.index(s.material)
            classes[b, k] = torch.tensor(numbers)
    return Labelled(torch.cat(images), torch.cat(masks), torch.cat(disparities), classes, scenes)


def losses(maps: dict[str, Tensor], mask: Tensor, near: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Named losses of the network's output against (B, S, S) masks and disparities `near` and (B, 1 + K, 3) classes.

    Cross entropies and offsets are means over objects, not pixels, so that small ones count alike; the heat map has
    CenterNet's focal loss against a Gaussian of one cell around the centre of what is visible of each object.
    """
    batch, side, _ = mask.shape
    one_hot = F.one_hot(mask.long(), classes.shape[1]).permute(0, 3, 1, 2).float()[:, 1:]  # (B, K, S, S)
    area = one_hot.sum((2, 3))
    at_pixels = pixels(side)
    centre = torch.einsum("bkyx,cyx->bkc", one_hot, at_pixels) / area.clamp_min(1)[..., None]  # pixels
    seen = area >= LEAST_PIXELS * side * side / 64**2
    weight = torch.einsum("bkyx,bk->byx", one_hot, seen / area.clamp_min(1)) / seen.sum().clamp_min(1)

    cells = pixels(side // 2) * 2
    distance = (cells - centre[..., None, None]).square().sum(2)  # (B, K, S/2, S/2), pixels squared
    distance = torch.where(seen[..., None, None], distance, torch.inf)
    target = torch.exp(-distance / 8).amax(1)
    at = distance.flatten(2).argmin(2)
    positive = torch.zeros(batch, (side // 2) ** 2).scatter_add_(1, at, seen.float()).clamp(max=1).view_as(target)
    logit = maps["centre"][:, 0]
    p = logit.sigmoid()
    focal = positive * (1 - p) ** 2 * F.logsigmoid(logit)
    focal = focal + (1 - positive) * (1 - target) ** 4 * p**2 * F.logsigmoid(-logit)

    truth = classes.gather(1, mask.long().flatten(1)[..., None].expand(-1, -1, 3)).view(batch, side, side, 3)
    way = torch.einsum("bkyx,bkc->bcyx", one_hot, centre) - at_pixels * (mask > 0)[:, None]
    off = (maps["offset"] - way * (OFFSET_UNIT / side)).abs().sum(1)
    out = {
        "centre": -focal.sum() / seen.sum().clamp_min(1),
        "outline": F.cross_entropy(maps["colour"], truth[..., 0]),
        "offset": (off * weight).sum(),
        "disparity": (maps["disparity"][:, 0] - near).abs().mean() * 4,
    }
    for k, key in enumerate(("colour", "shape", "material")):
        out[key] = (F.cross_entropy(maps[key], truth[..., k], reduction="none") * weight).sum()
    return out


@torch.no_grad()
def through_codec(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures uint8 as a sampler might return them: decoded from latents with noise of up to 0.3."""
    parts = []
    for part in images.split(25):
        z = codec.encode(vae, part.float() / 255)
        amount = torch.rand(len(z), 1, 1, 1, generator=generator) * 0.3
        out = codec.decode(vae, z + amount * torch.randn(z.shape, generator=generator))
        parts.append((out * 255).round().to(torch.uint8))
    return torch.cat(parts)


def softened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, S, S), in every fourth batch blurred, half of them with noise, mostly a little: shine on a
    small object at night is a matter of a few levels, which must be seen often to be learnt."""
    factor = float(torch.rand((), generator=generator)) * 4
    if factor < 1:
        small = F.interpolate(x, scale_factor=0.45 + 0.5 * factor, mode="area")
        x = F.interpolate(small, x.shape[-2:], mode="bilinear")
    amount = (torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1).clamp_min(0) ** 2 * 0.06
    return (x + torch.randn(x.shape, generator=generator) * amount).clamp(0, 1)


def train_reader(
    data: Labelled, decoded: Tensor, images: int, start: Reader | None = None, peak: float = 2e-3, seed: int = 0
) -> Reader:
    """A reader trained on `images` draws from `data`, going on from `start` if there is one; the first scenes' pictures
    are `decoded` instead, most of the time."""
    torch.manual_seed(seed)  # the network's initialisation
    generator, batch = torch.Generator().manual_seed(seed), 32
    reader = (start or Reader()).train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, updates = average_copy(reader), images // batch
    optimizer = torch.optim.AdamW(reader.parameters(), lr=peak, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=updates, pct_start=0.1)
    often = torch.tensor([2.0 if scene.time == "night" else 1.0 for scene in data.scenes])  # the hard ones
    began = time.perf_counter()
    for number in range(updates):
        pick = torch.multinomial(often, batch, generator=generator)
        x = data.image[pick].clone()
        reconstruct = (pick < len(decoded)) & (torch.rand(batch, generator=generator) < 0.7)
        x[reconstruct] = decoded[pick[reconstruct]]
        x, mask, near = softened(x.float() / 255, generator), data.mask[pick], data.disparity[pick].float()
        if number % 2:  # a mirrored scene is a scene too
            x, mask, near = x.flip(-1), mask.flip(-1), near.flip(-1)
        named = losses(reader(x.contiguous(memory_format=torch.channels_last)), mask, near, data.classes[pick])
        optimizer.zero_grad()
        torch.stack(list(named.values())).sum().backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        update(average, reader, warmed_decay(0.998, number))
        if (number + 1) % 100 == 0:
            told = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in named.items())
            done, spent = (number + 1) * batch, time.perf_counter() - began
            print(f"{done:,}/{updates * batch:,} images  {spent:.0f} s  {told}", file=sys.stderr, flush=True)
    return average


def measure(reader: Reader, data: Labelled, images: Tensor) -> dict[str, Any]:
    """Shares of objects read right, of pictures with the right count, and the disparity's error, on known scenes.

    A read object answers for the true object that it shares most pixels with, at least half of its own; a missed
    object is wrong in every attribute.
    """
    reading, least = read(reader, images), LEAST_PIXELS * data.mask[0].numel() / 64**2
    right: dict[str, dict[str, list[bool]]] = {}
    counts = []
    for b, scene in enumerate(data.scenes):
        numbers = [k for k in range(1, 1 + len(scene.solids)) if (data.mask[b] == k).sum() >= least]
        counts.append(len(numbers) == len(reading.objects[b]))
        for k in numbers:
            solid, mine = scene.solids[k - 1], data.mask[b] == k
            shared = reading.instances[b][mine].bincount(minlength=1 + len(reading.objects[b]))[1:]
            best = int(shared.argmax()) if len(shared) and shared.max() * 2 >= mine.sum() else None
            found = reading.objects[b][best] if best is not None else None
            for key in ("colour", "shape", "material"):
                ok = found is not None and getattr(found, key) == getattr(solid, key)
                for group in ("all", solid.size):
                    right.setdefault(key, {}).setdefault(group, []).append(ok)
    error = (reading.disparity - data.disparity.float()).abs()
    return {
        "count": sum(counts) / len(counts),
        **{key: sum(groups["all"]) / len(groups["all"]) for key, groups in right.items()},
        "objects": len(right["colour"]["all"]),
        "by_size": {size: {key: sum(g[size]) / len(g[size]) for key, g in right.items()} for size in SIZES},
        "disparity_error": float(error.mean()),
        "disparity_psnr_db": float(-10 * error.square().mean((1, 2)).clamp_min(1e-6).log10().mean()),
    }


def made_how(path: Path) -> dict[str, int]:
    """What the weights' file says of its making: `images` drawn and `seconds` taken in all, and the like."""
    with safe_open(path, "pt") as file:
        return {name: int(value) for name, value in (file.metadata() or {}).items()}


def main() -> None:
    """Trains, measures and writes weights and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reader.json"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--measure-only", action="store_true", help="measure the weights that are there")
    parser.add_argument("--start", type=Path, help="go on training these weights")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="mini", help="the model whose codec softens training pictures")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--decoded", type=int, default=5_000, help="scenes that also pass through the codec")
    parser.add_argument("--images", type=int, default=64_000, help="draws in training")
    args = parser.parse_args()

    vae = load_backbone(args.codec).freeze().vae
    if not args.measure_only:
        start = time.perf_counter()
        data = labelled("train", range(args.scenes), args.size)
        decoded = through_codec(vae, data.image[: args.decoded], torch.Generator().manual_seed(args.seed))
        begun = load_reader(args.start) if args.start else None
        trained = train_reader(data, decoded, args.images, begun, args.learning_rate, args.seed)
        before = made_how(args.start) if args.start else {"images": 0, "seconds": 0}
        how = {
            "size": args.size,
            "scenes": args.scenes,
            "images": before["images"] + args.images,
            "seconds": before["seconds"] + round(time.perf_counter() - start),
        }
        save_reader(trained, args.weights, {name: str(value) for name, value in how.items()})
    reader = load_reader(args.weights)
    held = labelled("held-out", range(500), args.size)
    soft = through_codec(vae, held.image, torch.Generator().manual_seed(1))
    start = time.perf_counter()
    result = {
        "held_out": measure(reader, held, held.image.float() / 255),
        "held_out_through_codec": measure(reader, held, soft.float() / 255),
        "pictures_per_second": 2 * len(soft) / (time.perf_counter() - start),
        "least_pixels_at_64": LEAST_PIXELS,
        "parameters": sum(p.numel() for p in reader.parameters()),
        "training": made_how(args.weights),
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)


if __name__ == "__main__":
    main()
