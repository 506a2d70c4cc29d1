"""Train the scene reader (reading.py) on exact renders and measure it on held-out ones.

    python benchmarks/reader.py --out benchmarks/results/reader.json

Two thirds of the training images are blurred, noisy or passed through the codec of --codec with noise on the latents,
so that soft images are read as well as sharp ones. Reported for scenes:held-out, sharp and through the codec: the share
of images with the right object count, of objects with the right color, shape and material, and the error of the
disparity. For a size other than 64 px, train again; --start continues from existing weights. The committed weights were
trained on 64,000 images, then on 32,000 and 48,000 more at peak learning rates of 1.5e-3 and 1.2e-3: the shine of
objects at night is learned last.
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
    """Exact renders with labels: `image` (B, 3, S, S) uint8; `mask` (B, S, S) uint8, 0 or an object's id; `disparity`
    (B, S, S) float16 in [0, 1]; `classes` (B, 1 + MAX_OBJECTS, 3): color (from 1), shape, material by object id."""

    image: Tensor
    mask: Tensor
    disparity: Tensor
    classes: Tensor
    scenes: list[Scene]


def labelled(split: str, indices: range, size: int, count: int | None = None) -> Labelled:
    """Render the scenes `indices` of `split` (with `count` objects, if given) with their labels."""
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
    """Return named losses of the network's output for masks and disparities `near` (B, S, S) and classes (B, 1 + K, 3).

    Cross entropies and offsets are means over objects, not pixels, so that small objects count as much as large ones;
    the heat map has CenterNet's focal loss against a Gaussian of one cell around the center of each object's visible
    pixels.
    """
    batch, side, _ = mask.shape
    one_hot = F.one_hot(mask.long(), classes.shape[1]).permute(0, 3, 1, 2).float()[:, 1:]  # (B, K, S, S)
    area = one_hot.sum((2, 3))
    pixel_centers = pixels(side)
    centers = torch.einsum("bkyx,cyx->bkc", one_hot, pixel_centers) / area.clamp_min(1)[..., None]  # pixels
    visible = area >= LEAST_PIXELS * side * side / 64**2
    weight = torch.einsum("bkyx,bk->byx", one_hot, visible / area.clamp_min(1)) / visible.sum().clamp_min(1)

    cells = pixels(side // 2) * 2
    distance = (cells - centers[..., None, None]).square().sum(2)  # (B, K, S/2, S/2), pixels squared
    distance = torch.where(visible[..., None, None], distance, torch.inf)
    target = torch.exp(-distance / 8).amax(1)
    center_cells = distance.flatten(2).argmin(2)
    positive = (
        torch.zeros(batch, (side // 2) ** 2).scatter_add_(1, center_cells, visible.float()).clamp(max=1).view_as(target)
    )
    logit = maps["centre"][:, 0]
    p = logit.sigmoid()
    focal = positive * (1 - p) ** 2 * F.logsigmoid(logit)
    focal = focal + (1 - positive) * (1 - target) ** 4 * p**2 * F.logsigmoid(-logit)

    truth = classes.gather(1, mask.long().flatten(1)[..., None].expand(-1, -1, 3)).view(batch, side, side, 3)
    true_offset = torch.einsum("bkyx,bkc->bcyx", one_hot, centers) - pixel_centers * (mask > 0)[:, None]
    offset_error = (maps["offset"] - true_offset * (OFFSET_UNIT / side)).abs().sum(1)
    out = {
        "centre": -focal.sum() / visible.sum().clamp_min(1),
        "outline": F.cross_entropy(maps["colour"], truth[..., 0]),
        "offset": (offset_error * weight).sum(),
        "disparity": (maps["disparity"][:, 0] - near).abs().mean() * 4,
    }
    for k, key in enumerate(("colour", "shape", "material")):
        out[key] = (F.cross_entropy(maps[key], truth[..., k], reduction="none") * weight).sum()
    return out


@torch.no_grad()
def through_codec(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return uint8 images like those of a sampler: decoded from their latents with noise of up to 0.3."""
    parts = []
    for part in images.split(25):
        z = codec.encode(vae, part.float() / 255)
        noise_level = torch.rand(len(z), 1, 1, 1, generator=generator) * 0.3
        out = codec.decode(vae, z + noise_level * torch.randn(z.shape, generator=generator))
        parts.append((out * 255).round().to(torch.uint8))
    return torch.cat(parts)


def softened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur images (B, 3, S, S) in every fourth batch and add noise to half of them, mostly little: the shine of a small
    object at night is only a few levels strong and takes many clear examples to learn."""
    factor = float(torch.rand((), generator=generator)) * 4
    if factor < 1:
        small = F.interpolate(x, scale_factor=0.45 + 0.5 * factor, mode="area")
        x = F.interpolate(small, x.shape[-2:], mode="bilinear")
    noise_level = (torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1).clamp_min(0) ** 2 * 0.06
    return (x + torch.randn(x.shape, generator=generator) * noise_level).clamp(0, 1)


def train_reader(
    data: Labelled, decoded: Tensor, images: int, start: Reader | None = None, peak: float = 2e-3, seed: int = 0
) -> Reader:
    """Return a reader trained on `images` draws from `data`, continuing from `start` if given. For the first scenes the
    images `decoded` replace the renders with probability 0.7."""
    torch.manual_seed(seed)  # for the network's initialization
    generator, batch = torch.Generator().manual_seed(seed), 32
    reader = (start or Reader()).train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, updates = average_copy(reader), images // batch
    optimizer = torch.optim.AdamW(reader.parameters(), lr=peak, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=updates, pct_start=0.1)
    sampling_weights = torch.tensor(
        [2.0 if scene.time == "night" else 1.0 for scene in data.scenes]
    )  # hard scenes more often
    started = time.perf_counter()
    for number in range(updates):
        indices = torch.multinomial(sampling_weights, batch, generator=generator)
        x = data.image[indices].clone()
        use_decoded = (indices < len(decoded)) & (torch.rand(batch, generator=generator) < 0.7)
        x[use_decoded] = decoded[indices[use_decoded]]
        x, mask, near = softened(x.float() / 255, generator), data.mask[indices], data.disparity[indices].float()
        if number % 2:  # augmentation: mirrored scenes are valid
            x, mask, near = x.flip(-1), mask.flip(-1), near.flip(-1)
        terms = losses(reader(x.contiguous(memory_format=torch.channels_last)), mask, near, data.classes[indices])
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        update(average, reader, warmed_decay(0.998, number))
        if (number + 1) % 100 == 0:
            message = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in terms.items())
            done, seconds = (number + 1) * batch, time.perf_counter() - started
            print(f"{done:,}/{updates * batch:,} images  {seconds:.0f} s  {message}", file=sys.stderr, flush=True)
    return average


def measure(reader: Reader, data: Labelled, images: Tensor) -> dict[str, Any]:
    """Return the shares of correct attributes and object counts, and the disparity's error, on scenes with labels.

    A true object is matched with the detected object that covers most of its pixels, if at least half; a missed object
    is wrong in every attribute.
    """
    reading, min_pixels = read(reader, images), LEAST_PIXELS * data.mask[0].numel() / 64**2
    correct: dict[str, dict[str, list[bool]]] = {}
    counts = []
    for b, scene in enumerate(data.scenes):
        ids = [k for k in range(1, 1 + len(scene.solids)) if (data.mask[b] == k).sum() >= min_pixels]
        counts.append(len(ids) == len(reading.objects[b]))
        for k in ids:
            solid, object_mask = scene.solids[k - 1], data.mask[b] == k
            overlap = reading.instances[b][object_mask].bincount(minlength=1 + len(reading.objects[b]))[1:]
            best = int(overlap.argmax()) if len(overlap) and overlap.max() * 2 >= object_mask.sum() else None
            detected = reading.objects[b][best] if best is not None else None
            for key in ("colour", "shape", "material"):
                ok = detected is not None and getattr(detected, key) == getattr(solid, key)
                for group in ("all", solid.size):
                    correct.setdefault(key, {}).setdefault(group, []).append(ok)
    error = (reading.disparity - data.disparity.float()).abs()
    return {
        "count": sum(counts) / len(counts),
        **{key: sum(groups["all"]) / len(groups["all"]) for key, groups in correct.items()},
        "objects": len(correct["colour"]["all"]),
        "by_size": {size: {key: sum(g[size]) / len(g[size]) for key, g in correct.items()} for size in SIZES},
        "disparity_error": float(error.mean()),
        "disparity_psnr_db": float(-10 * error.square().mean((1, 2)).clamp_min(1e-6).log10().mean()),
    }


def training_metadata(path: Path) -> dict[str, int]:
    """Return the training metadata of a weights file: total `images` and `seconds`, and more."""
    with safe_open(path, "pt") as file:
        return {name: int(value) for name, value in (file.metadata() or {}).items()}


def main() -> None:
    """Train and measure the reader, and write weights and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reader.json"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--measure-only", action="store_true", help="measure existing weights")
    parser.add_argument("--start", type=Path, help="continue training these weights")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="mini", help="model whose codec softens training images")
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
        start_reader = load_reader(args.start) if args.start else None
        trained = train_reader(data, decoded, args.images, start_reader, args.learning_rate, args.seed)
        previous = training_metadata(args.start) if args.start else {"images": 0, "seconds": 0}
        metadata = {
            "size": args.size,
            "scenes": args.scenes,
            "images": previous["images"] + args.images,
            "seconds": previous["seconds"] + round(time.perf_counter() - start),
        }
        save_reader(trained, args.weights, {name: str(value) for name, value in metadata.items()})
    reader = load_reader(args.weights)
    held_out = labelled("held-out", range(500), args.size)
    decoded_held_out = through_codec(vae, held_out.image, torch.Generator().manual_seed(1))
    start = time.perf_counter()
    result = {
        "held_out": measure(reader, held_out, held_out.image.float() / 255),
        "held_out_through_codec": measure(reader, held_out, decoded_held_out.float() / 255),
        "pictures_per_second": 2 * len(decoded_held_out) / (time.perf_counter() - start),
        "least_pixels_at_64": LEAST_PIXELS,
        "parameters": sum(p.numel() for p in reader.parameters()),
        "training": training_metadata(args.weights),
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)


if __name__ == "__main__":
    main()
