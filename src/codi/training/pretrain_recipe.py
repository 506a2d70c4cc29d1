"""What decides a backbone, and how its jobs look at pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import report_corrupt
from ..data.check import contact_sheet
from ..data.samples import CorruptSample
from ..data.sources import Sample, Source
from ..errors import UserError
from .trainer import SharedSettings


@dataclass(kw_only=True)
class PretrainRecipe(SharedSettings):
    """A text-to-image backbone from captioned pictures. One key of the YAML file each; SharedSettings' keys too."""

    out: str
    """Folder of the finished checkpoint; work in progress lies in its `training/` sub-folder."""
    data: str = "scenes:train:48000"
    """Training pictures: a folder, WebDataset tars, or scenes:SPLIT:COUNT."""
    held_out: str = "scenes:held-out:256"
    """Pictures for figures and previews."""
    size: int = 64
    """Side of training pictures in pixels."""
    start: str | None = None
    """A checkpoint in the same layout whose weights are the starting point."""
    vae_images: int = 120_000
    vae_crop: int = 32
    """Side of the codec's training crops: it is convolutional, so crops train it as well as whole pictures."""
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    vae_widths: tuple = (24, 48, 96)
    latent_channels: int = 8
    kl_weight: float = 1e-5
    textures: float = 0.25
    """Share of procedural textures among the codec's training pictures, so that it can also hold photographs."""
    decoder_images: int = 0
    """Images with which the codec's decoder alone trains once more, on noisy latents; its encoder stays as it is."""
    decoder_noise: float = 0.2
    """Largest standard deviation of that noise, where latents have 1."""
    decoder_learning_rate: float = 1e-3
    edits: str | None = None
    """Edit pairs whose edited pictures are learnt under their instructions, e.g. scenes:train:6000:1, so that the text
    encoder knows the words of instructions."""
    ldm_images: int = 160_000
    ldm_batch: int = 16
    ldm_learning_rate: float = 5e-4
    unet_widths: tuple = (64, 128, 192)
    unet_layers: int = 1
    text_width: int = 128
    text_layers: int = 2
    prompt_dropout: float = 0.1
    """Share of captions replaced by the empty prompt: guidance needs an unconditional answer to move away from."""
    warmup: int = 8_000
    decay_to: float = 0.05
    log_every: int = 1_600
    preview_every: int = 20_000
    checkpoint_every: int = 8_000

    def validate(self) -> None:
        """Raises UserError for values that no run can have."""
        super().validate()
        self._at_least_1("vae_images", "vae_batch", "latent_channels", "ldm_images", "ldm_batch", "text_layers")
        cell = 2 ** (len(self.vae_widths) - 1)
        for name in ("size", "vae_crop"):
            if getattr(self, name) % cell or getattr(self, name) < cell:
                raise UserError(f"{name} {getattr(self, name)}: not a multiple of {cell}, a latent cell: change it")
        if self.vae_crop > self.size:
            raise UserError(f"vae_crop {self.vae_crop}: larger than size {self.size}: lower it")
        for name, unit in (("vae_widths", 8), ("unet_widths", 16), ("text_width", 32)):
            widths = getattr(self, name) if isinstance(getattr(self, name), tuple) else (getattr(self, name),)
            if any(not isinstance(w, int) or w < 1 or w % unit for w in widths):
                raise UserError(f"{name} {list(widths)}: must be multiples of {unit}: change it")


def read_pictures(source: Source, indices: range, size: int, report: Path | None = None) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, S, S) and captions of the readable samples among `indices`.

    `report`: the JSON file (as of `data.batches`) that lists the others; indices that do not start at 0 go on with it.
    Raises UserError where none is readable."""
    found = source.read(indices, size)
    if report is not None:
        before = json.loads(report.read_text())["files"] if indices.start and report.is_file() else []
        corrupt = [CorruptSample(0, **file) for file in before] + [s for s in found if isinstance(s, CorruptSample)]
        report_corrupt(report, indices.stop, corrupt)
    samples = [s for s in found if isinstance(s, Sample)]
    if not samples:
        raise UserError(f"{source.describe()}: no picture could be read: check the data set")
    return torch.stack([s.image for s in samples]), [s.text for s in samples]


def first_pictures(source: Source, count: int, size: int) -> tuple[Tensor, list[str]]:
    """The first `count` of them (all, if there are fewer)."""
    return read_pictures(source, range(min(count, len(source))), size)


def write_sheet(out: Path, name: str, images: Tensor, columns: int) -> None:
    """Writes the pictures (B, 3, H, W) as one contact sheet below `out`/previews."""
    folder = out / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(images), columns).save(folder / name)
