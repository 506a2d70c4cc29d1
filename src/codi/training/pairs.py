"""Training data of a tiny decoder: latents and the full decoder's output for them, computed once, in memory maps."""

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

CHUNK = 4  # pairs computed at a time: decoding a large image in float32 takes a gigabyte
SEEDS = 1_000_000  # sample i of seed s starts from noise s * SEEDS + i

# Returns the latents (B, C, h, w) of the samples with these numbers, and those samples that cannot be read.
MakeLatents = Callable[[Sequence[int]], tuple[Tensor, list[CorruptSample]]]


@dataclass(frozen=True)
class Pairs:
    """Latents (N, C, h, w), float16, and decoded pictures (N, 3, H, W), uint8."""

    latents: np.ndarray
    pictures: np.ndarray

    def at(self, index: Sequence[int] | slice) -> tuple[Tensor, Tensor]:
        """Return latents, and images in [0, 1], both float32."""
        return torch.from_numpy(self.latents[index]).float(), torch.from_numpy(self.pictures[index]).float() / 255


def latents_of_images(vae: Any, source: Source, count: int, size: int, noise: float, seed: int) -> MakeLatents:
    """Return a function that encodes the first `count` images and, for higher numbers, textures. It adds Gaussian noise
    of a standard deviation drawn from [0, noise] to each latent, as samplers' latents are not clean either."""

    def noise_of(i: int, shape: Sequence[int]) -> Tensor:
        generator = step_generator(seed, i, 1)
        return noise * torch.rand(1, generator=generator) * torch.randn(*shape, generator=generator)

    def make_latents(numbers: Sequence[int]) -> tuple[Tensor, list[CorruptSample]]:
        images, _, corrupt = read_pictures(source, [i for i in numbers if i < count], size)
        for i in (i for i in numbers if i >= count):
            images.append(dead_leaves(1, size, step_generator(seed, i, 0))[0].float() / 255)
        if not images:
            return torch.empty(0), corrupt
        z = codec.encode(vae, torch.stack(images).to(vae.device)).float()
        readable = [i for i in numbers if i not in {c.index for c in corrupt}]
        return z + torch.stack([noise_of(i, z.shape[1:]) for i in readable]).to(z), corrupt

    return make_latents


def latents_of_samples(
    backbone: Backbone, prompts: Sequence[str], size: int, steps: int, guidance: float, seed: int
) -> MakeLatents:
    """Return a function that samples latents from the backbone by DDIM, cycling through `prompts`; empty prompts are
    sampled without guidance."""
    cells = size // codec.downscale(backbone.vae)
    shape = (codec.channels(backbone.vae), cells, cells)

    def embed(batch: list[str]) -> Conditioning:
        text, added = embed_prompts(backbone.text, batch, (size, size))
        return Conditioning(text, added=added)

    def make_latents(numbers: Sequence[int]) -> tuple[Tensor, list[CorruptSample]]:
        batch = [prompts[i % len(prompts)] for i in numbers]
        text, blank = embed(batch), embed([""] * len(batch))
        noise = initial_noise(shape, [seed * SEEDS + i for i in numbers]).to(text.text)
        scale = guidance if any(batch) else 1.0
        schedule = backbone.schedule_for((cells, cells))
        return sample(Student(backbone.network), schedule, noise, text, steps, scale, blank), []

    return make_latents


def parse_samples(spec: str) -> tuple[int, int] | None:
    """Parse "samples:2000:1" to count and seed (2000, 1); return None for other data. Raises UserError for a wrong
    count or seed."""
    if not spec.startswith("samples:") or Path(spec).exists():
        return None
    match = re.fullmatch(r"samples:(\d{1,6})(?::(\d{1,6}))?", spec)
    if match is None or not int(match[1]):
        raise UserError(f"{spec}: not a count of samples: write samples:COUNT or samples:COUNT:SEED")
    return int(match[1]), int(match[2] or 0)


def read_prompts(file: str | None) -> list[str]:
    """Return the prompts in a file, one per line, or an empty one without a file. Raises UserError if there is none."""
    if file is None:
        return [""]
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): give a text file with one prompt per line") from error
    if not prompts:
        raise UserError(f"{file}: no prompt in it: write one per line")
    return prompts


@torch.no_grad()
def make_pairs(
    vae: Any,
    make_latents: MakeLatents,
    count: int,
    size: int,
    folder: Path,
    mark: dict[str, Any],
    max_corrupt: float = 0.05,
    deadline: float | None = None,
    quiet: bool = True,
) -> Pairs | None:
    """Compute `count` pairs of `size` px with `vae`'s decoder in `folder`; return None if `deadline` (time.monotonic())
    comes first. Pairs that an earlier call left there with the same `mark` are kept, so the next call goes on.

    Raises UserError if more than the share `max_corrupt` cannot be read, or the disk has too little free space.
    """
    cell, index = codec.downscale(vae), folder / "pairs.json"
    state = json.loads(index.read_text()) if index.is_file() else {}
    if state.get("mark") != json.loads(json.dumps(mark)):
        state = {"mark": mark, "at": 0, "pairs": 0, "corrupt": []}
    folder.mkdir(parents=True, exist_ok=True)
    latent = (count, codec.channels(vae), size // cell, size // cell)
    needed = 2 * int(np.prod(latent)) + 3 * count * size * size
    if not state["at"] and shutil.disk_usage(folder).free < needed:  # a memory map on a full disk ends the process
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB of free space needed: lower pairs or size, or change --out")
    mode = "r+" if state["at"] else "w+"
    latents = open_memmap(folder / "latents.npy", mode, np.float16, latent)
    pictures = open_memmap(folder / "pictures.npy", mode, np.uint8, (count, 3, size, size))
    corrupt = [CorruptSample(**row) for row in state["corrupt"]]
    for start in range(state["at"], count, CHUNK):
        if deadline and time.monotonic() > deadline:
            return None
        numbers = range(start, min(start + CHUNK, count))
        z, unread = make_latents(numbers)
        if len(z):
            z, rows = z.half(), slice(state["pairs"], state["pairs"] + len(z))
            latents[rows] = z.cpu().numpy()
            pictures[rows] = (codec.decode(vae, z.to(vae.dtype)) * 255).round().byte().cpu().numpy()
            for file in (latents, pictures):
                file.flush()
        corrupt += unread
        state |= {"at": numbers.stop, "pairs": state["pairs"] + len(z), "corrupt": [vars(c) for c in corrupt]}
        write_text(index, json.dumps(state))
        if not quiet and (start // CHUNK % 40 == 39 or numbers.stop == count):
            print(f"{numbers.stop:>9,}/{count:,} pairs of latent and picture", file=sys.stderr, flush=True)
    report_corrupt(folder / "corrupt.json", count, corrupt)
    judge(corrupt, count, count, max_corrupt, folder / "corrupt.json")
    return Pairs(latents[: state["pairs"]], pictures[: state["pairs"]])
