"""Training of text-to-image diffusion on the codec's latents for any network, the second stage of `codi pretrain`."""

from __future__ import annotations

import copy
import io
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.batches import judge, report_corrupt
from ..data.samples import CorruptSample, Sample
from ..data.sources import Source
from ..data.writing import write_whole
from ..files import write_folder
from ..models import codec
from . import ema
from .checkpoint import Progress, edit_json
from .muon import muon_groups
from .pretrain_recipe import PretrainRecipe, read_pictures, write_sheet
from .tokenizer import write_classic_files
from .trainer import Job


class LatentsJob(Job):
    """Training of text-to-image diffusion on precomputed latents, of network and text encoders together.

    A subclass defines the tokens, the loss, sampling and the diffusers pipeline of the parts.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        vae: AutoencoderKL,
        recipe: PretrainRecipe,
        latents: np.ndarray,
        captions: list[str],
        held_latents: Tensor,
        held_captions: list[str],
        images_before: int = 0,
    ) -> None:
        """`parts`: the trained networks by their names in the pipeline. `images_before`: training images of the
        starting weights."""
        super().__init__()
        self.online = nn.ModuleDict(parts)
        self.average = ema.average_copy(self.online)
        self.vae, self.recipe, self.latents = vae.requires_grad_(False), recipe, latents
        self.images_before = images_before
        self.held_latents, self.held_captions = held_latents, held_captions
        self.tokens, self.empty = self.tokenize(captions), self.tokenize([""])
        if recipe.compile:
            for part in self.online.values():
                part.compile()

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids (B, L)."""

    @abstractmethod
    def loss(self, model: Any, x: Tensor, tokens: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
        """Return the squared error (scalar) on latents `x` (B, C, h, w) with `tokens` (B, L). `share` (B,) in [0, 1) is
        the time of each latent as a quantile of the distribution of training times."""

    @abstractmethod
    def draw(self, prompts: Sequence[str]) -> Tensor:
        """Return images (B, 3, S, S) that the average samples of `prompts`: 20 steps, guidance 3, seeds 0, 1, ..."""

    @abstractmethod
    def pipeline(self, parts: Any, vae: AutoencoderKL) -> Any:
        """Return diffusers' pipeline of `parts`, a ModuleDict like the average, and `vae`."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        if self.recipe.optimizer == "muon":
            return muon_groups(self.online, learning_rate)
        return super().groups(learning_rate)

    def batches(self, start: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.recipe.ldm_batch, len(self.latents)
        while True:
            index = [shuffled(self.recipe.seed, i // count, count)[i % count] for i in range(start, start + size)]
            yield torch.from_numpy(self.latents[index]).float(), self.tokens[index]
            start += stride

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        x, tokens = batch
        drop = torch.rand(len(x), generator=generator) < self.recipe.prompt_dropout
        tokens = torch.where(drop[:, None], self.empty, tokens.cpu())  # DDP may have moved them to a GPU
        share = (torch.arange(len(x)) + torch.rand(len(x), generator=generator)) / len(x)  # stratified over the batch
        return {"velocity": self.loss(self.online, x, tokens, share, generator)}

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)  # same noise and times at every call, for comparable losses
        count = len(self.held_captions)
        share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        share = share[torch.randperm(count, generator=generator)]
        parts = zip(
            self.held_latents.split(64), self.tokenize(self.held_captions).split(64), share.split(64), strict=True
        )
        losses = [self.loss(self.average, x, tokens, t, generator) * len(x) for x, tokens, t in parts]
        prompts = self.held_captions[:24]
        write_sheet(out, f"samples-{progress.images:07d}.png", self.draw(prompts).float().cpu(), 8)
        (out / "previews" / "prompts.txt").write_text("\n".join(prompts) + "\n")
        self.export(Path(self.recipe.out), progress)
        return {"held_out_velocity": float(sum(losses)) / count}

    def export(self, out: Path, progress: Progress) -> None:
        """Write the whole checkpoint in diffusers' layout, float16 safetensors."""
        average: Any = copy.deepcopy(self.average).to(torch.float16)
        vae: Any = copy.deepcopy(self.vae)
        nn.Module.to(vae, torch.float16)  # diffusers' own `to` warns of the cast
        pipe = self.pipeline(average, vae)

        def fill(folder: Path) -> None:
            pipe.save_pretrained(folder, safe_serialization=True)
            for encoder in folder.glob("text_encoder*"):
                # float16 on disk, but a stock pipeline without a dtype should load all parts in float32.
                edit_json(encoder / "config.json", dtype="float32")
            for part in ("vae", *dict(average.named_children())):
                edit_json(folder / part / "config.json", _name_or_path=None)  # a local path
            write_classic_files(folder / "tokenizer")
            (folder / "training.json").write_text(
                json.dumps({"images": self.images_before + progress.images}, indent=1) + "\n"
            )

        staged, index = out / "training" / "finished", "model_index.json"
        shutil.rmtree(staged, ignore_errors=True)  # left by a killed run
        write_folder(staged, fill)
        # The index is removed first and written last, so that a killed run never leaves one over parts of two models.
        (out / index).unlink(missing_ok=True)
        for item in sorted(staged.iterdir(), key=lambda item: item.name == index):
            target = out / item.name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            item.rename(target)
        staged.rmdir()


def draw(pipe: Any, prompts: Sequence[str], **options: Any) -> Tensor:
    """Return images (B, 3, S, S) in [0, 1] that a diffusers pipeline samples in 20 steps; image i has seed i."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(list(prompts), num_inference_steps=20, generator=generators, output_type="pt", **options).images


def normal(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor:
    """Return standard normal noise on `device`, in float32. A GPU draws its own from a seed of `generator`, instead of
    waiting for the CPU's."""
    if device.type == "cpu":
        return torch.randn(shape, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def shuffled(seed: int, epoch: int, count: int, _cache: dict = {}) -> np.ndarray:  # noqa: B006 - a one-entry cache
    """Return the shuffled indices of `count` samples in an epoch."""
    key = (seed, epoch, count)
    if key not in _cache:
        _cache.clear()
        _cache[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _cache[key]


class EditedPictures:
    """A source's edited images with their instructions as captions."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        return f"{self.source.describe()}, edited"

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        results = self.source.read(indices, size, crops)
        return [
            replace(s, image=s.extras["edited_image"], text=s.instruction, extras={}) if isinstance(s, Sample) else s
            for s in results
        ]


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, source: Source, size: int, folder: Path, max_corrupt: float = 0.05
) -> tuple[np.ndarray, list[str]]:
    """Return latents (float16 memory map) and captions of all images of `source`, computed once per codec. Unreadable
    files are listed in `folder`/corrupt.json. Raises UserError if they exceed the share `max_corrupt`."""
    weights = sum(p.double().sum().item() for p in vae.parameters())
    mark = {"codec": round(weights, 6), "source": source.describe(), "size": size, "count": len(source)}
    index, data = folder / "latents.json", folder / "latents.npy"
    if index.is_file() and (stored := json.loads(index.read_text()))["mark"] == mark:
        return np.load(data, mmap_mode="r"), stored["captions"]
    folder.mkdir(parents=True, exist_ok=True)
    # Channels last and small batches: 2.5 times as fast on a CPU, whose cache then holds the feature maps.
    nn.Module.to(vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = 16 if vae.device.type == "cpu" else 64
    captions: list[str] = []
    corrupt: list[CorruptSample] = []
    chunks, report = [], folder / "corrupt.json"
    for start in range(0, len(source), 64):
        indices = range(start, min(start + 64, len(source)))
        images, texts, unread = read_pictures(source, indices, size)
        if images:
            for pictures in torch.stack(images).split(batch):
                pictures = pictures.to(vae.device, memory_format=torch.channels_last)
                chunks.append(codec.encode(vae, pictures).half().cpu().numpy())
        captions, corrupt = captions + texts, corrupt + unread
        report_corrupt(report, indices.stop, corrupt)
    judge(corrupt, len(source), len(source), max_corrupt, report)
    index.unlink(missing_ok=True)  # of old latents: it must never describe the new ones
    write_whole(data, npy_bytes(np.concatenate(chunks)))
    write_whole(index, [json.dumps({"mark": mark, "captions": captions}).encode()])
    return np.load(data, mmap_mode="r"), captions


def npy_bytes(array: np.ndarray) -> list[bytes | memoryview]:
    """Return the bytes that numpy.save writes for `array`, without a copy of its values."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), np.ascontiguousarray(array).data.cast("B")]
