"""What a tiny decoder learns from: latents, and what the full decoder makes of them. Made once, kept in memory maps."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ..data.batches import judge, report_corrupt
from ..data.samples import CorruptSample
from ..data.sources import Source
from ..data.textures import dead_leaves
from ..errors import UserError
from ..files import write_text
from ..models import codec
from ..models.backbones import Backbone
from ..models.student import Conditioning, Student
from ..models.text import embed_prompts
from ..sampling.sampler import initial_noise, sample
from .pretrain_recipe import read_pictures
from .trainer import step_generator

CHUNK = 4  # pairs made at a time: decoding large pictures in float32 takes a gigabyte each
SEEDS = 1_000_000  # sample i of seed s starts from noise s * SEEDS + i

# Numbers -> latents (B, C, h, w) of those that can be had, and the others.
Origin = Callable[[Sequence[int]], tuple[Tensor, list[CorruptSample]]]


@dataclass(frozen=True)
class Pairs:
    """Latents (N, C, h, w), float16, and pictures (N, 3, H, W), uint8."""

    latents: np.ndarray
    pictures: np.ndarray

    def at(self, index: Sequence[int] | slice) -> tuple[Tensor, Tensor]:
        """Latents, and pictures in [0, 1], both float32."""
        return torch.from_numpy(self.latents[index]).float(), torch.from_numpy(self.pictures[index]).float() / 255


def of_pictures(vae: Any, source: Source, count: int, size: int, noise: float, seed: int) -> Origin:
    """Latents of the first `count` pictures, and of textures after them, each with Gaussian noise of a standard
    deviation drawn from [0, noise] in it: samplers' latents are not clean either."""

    def grain(i: int, shape: Sequence[int]) -> Tensor:
        generator = step_generator(seed, i, 1)
        return noise * torch.rand(1, generator=generator) * torch.randn(*shape, generator=generator)

    def origin(numbers: Sequence[int]) -> tuple[Tensor, list[CorruptSample]]:
        images, _, corrupt = read_pictures(source, [i for i in numbers if i < count], size)
        for i in (i for i in numbers if i >= count):
            images.append(dead_leaves(1, size, step_generator(seed, i, 0))[0].float() / 255)
        if not images:
            return torch.empty(0), corrupt
        z = codec.encode(vae, torch.stack(images).to(vae.device)).float()
        read = [i for i in numbers if i not in {c.index for c in corrupt}]
        return z + torch.stack([grain(i, z.shape[1:]) for i in read]).to(z), corrupt

    return origin


def of_samples(backbone: Backbone, prompts: Sequence[str], size: int, steps: int, guidance: float, seed: int) -> Origin:
    """Latents that the backbone draws by DDIM from `prompts` in turn; the empty one is not guided."""
    cells = size // codec.downscale(backbone.vae)
    shape = (codec.channels(backbone.vae), cells, cells)

    def embed(words: list[str]) -> Conditioning:
        text, added = embed_prompts(backbone.text, words, (size, size))
        return Conditioning(text, added=added)

    def origin(numbers: Sequence[int]) -> tuple[Tensor, list[CorruptSample]]:
        words = [prompts[i % len(prompts)] for i in numbers]
        text, blank = embed(words), embed([""] * len(words))
        noise = initial_noise(shape, [seed * SEEDS + i for i in numbers]).to(text.text)
        scale = guidance if any(words) else 1.0
        schedule = backbone.schedule_for((cells, cells))
        return sample(Student(backbone.network), schedule, noise, text, steps, scale, blank), []

    return origin


def parse_samples(spec: str) -> tuple[int, int] | None:
    """ "samples:2000:1" -> (2000, 1), count and seed; None for data of another kind. Raises UserError."""
    if not spec.startswith("samples:") or Path(spec).exists():
        return None
    match = re.fullmatch(r"samples:(\d{1,6})(?::(\d{1,6}))?", spec)
    if match is None or not int(match[1]):
        raise UserError(f"{spec}: not a count of samples: write samples:COUNT or samples:COUNT:SEED")
    return int(match[1]), int(match[2] or 0)


def read_prompts(file: str | None) -> list[str]:
    """One a line; without a file the empty prompt. Raises UserError for a file without any."""
    if file is None:
        return [""]
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): name a text file, a prompt a line") from error
    if not prompts:
        raise UserError(f"{file}: no prompt in it: write one a line")
    return prompts


@torch.no_grad()
def make_pairs(
    vae: Any,
    origin: Origin,
    count: int,
    size: int,
    folder: Path,
    mark: dict[str, Any],
    max_corrupt: float = 0.05,
    deadline: float | None = None,
    quiet: bool = True,
) -> Pairs | None:
    """`count` pairs of `size` px by `vae`'s decoder, in `folder`; None where `deadline` (of time.monotonic) came
    first. What is there of the same `mark` stays, so that the next call goes on.

    Raises UserError where more than the share `max_corrupt` cannot be read, or the disk is too small for them.
    """
    cell, index = codec.downscale(vae), folder / "pairs.json"
    kept = json.loads(index.read_text()) if index.is_file() else {}
    if kept.get("mark") != json.loads(json.dumps(mark)):
        kept = {"mark": mark, "at": 0, "pairs": 0, "corrupt": []}
    folder.mkdir(parents=True, exist_ok=True)
    latent = (count, codec.channels(vae), size // cell, size // cell)
    needed = 2 * int(np.prod(latent)) + 3 * count * size * size
    if not kept["at"] and shutil.disk_usage(folder).free < needed:  # a memory map on a full disk ends the process
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB are needed, not free: lower pairs or size, or change --out")
    mode = "r+" if kept["at"] else "w+"
    latents = open_memmap(folder / "latents.npy", mode, np.float16, latent)
    pictures = open_memmap(folder / "pictures.npy", mode, np.uint8, (count, 3, size, size))
    corrupt = [CorruptSample(**row) for row in kept["corrupt"]]
    for start in range(kept["at"], count, CHUNK):
        if deadline and time.monotonic() > deadline:
            return None
        numbers = range(start, min(start + CHUNK, count))
        z, unread = origin(numbers)
        if len(z):
            z, places = z.half(), slice(kept["pairs"], kept["pairs"] + len(z))
            latents[places] = z.cpu().numpy()
            pictures[places] = (codec.decode(vae, z.to(vae.dtype)) * 255).round().byte().cpu().numpy()
            for file in (latents, pictures):
                file.flush()
        corrupt += unread
        kept |= {"at": numbers.stop, "pairs": kept["pairs"] + len(z), "corrupt": [vars(c) for c in corrupt]}
        write_text(index, json.dumps(kept))
        if not quiet and (start // CHUNK % 40 == 39 or numbers.stop == count):
            print(f"{numbers.stop:>9,}/{count:,} pairs of latent and picture", file=sys.stderr, flush=True)
    report_corrupt(folder / "corrupt.json", count, corrupt)
    judge(corrupt, count, count, max_corrupt, folder / "corrupt.json")
    return Pairs(latents[: kept["pairs"]], pictures[: kept["pairs"]])
