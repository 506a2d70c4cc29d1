"""What decides a backbone, and how its jobs look at pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.check import contact_sheet
from ..data.samples import CorruptSample
from ..data.sources import Sample, Source
from ..errors import UserError
from .trainer import SharedSettings

_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "network": ("unet", "flux"),
    "times": ("uniform", "logit-normal"),
}


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
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops; those below it are skipped and listed in corrupt.json."""
    start: str | None = None
    """A checkpoint in the same layout whose weights are the starting point."""
    tune_codec: bool = False
    """Train the codec of `start` too, as long as a new one: `vae_images`. Otherwise it stays as it is."""
    vae: str | None = None
    """A codec's folder (AutoencoderKL) to use as it is, in place of training one."""
    vae_start: str | None = None
    """A codec's folder whose weights are the starting point of the codec's training."""
    scene_store: str | None = None
    """A folder that keeps rendered scenes between runs, so that each is rendered once. None: in memory."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalized momentum for matrices (see muon.py), AdamW for the rest."""
    compile: bool = False
    """Compile the networks that train (torch.compile): about a minute at the start, faster from then on on a GPU."""
    vae_images: int = 120_000
    vae_crop: int = 32
    """Side of the codec's training crops: it is convolutional, so crops train it as well as whole pictures."""
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    vae_widths: tuple = (24, 48, 96)
    latent_channels: int = 8
    kl_weight: float = 1e-5
    squared_weight: float = 1.0
    """Weight of the codec's squared error, of pixels in [-1, 1]."""
    absolute_weight: float = 0.05
    """Weight of its absolute error: more of it gives sharper edges."""
    feature_weight: float = 0.0
    """Weight of the ENLite0 distance of reconstructions (see evaluation/metrics.py); vae_crop a multiple of 32 then."""
    adversarial_weight: float = 0.0
    """Weight of a patch discriminator's verdict on reconstructions."""
    adversarial_from: float = 0.7
    """The share of the codec's training after which that weight counts; the discriminator learns from half of it on."""
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
    network: str = "unet"
    """unet (Stable Diffusion layout, v-prediction) or flux (FLUX.1 layout, flow matching)."""
    ldm_images: int = 160_000
    """Training images of text-to-image diffusion; 0 trains the codec alone, into `out`/vae."""
    ldm_batch: int = 16
    ldm_learning_rate: float = 5e-4
    unet_widths: tuple = (64, 128, 192)
    unet_layers: int = 1
    flux_width: int = 384
    flux_layers: tuple = (2, 2)
    """Blocks with a stream each for picture and text, then blocks with one stream for both."""
    times: str = "uniform"
    """How flow matching draws times: uniform, or logit-normal, which has most of them in the middle."""
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
        self._at_least_1("vae_images", "vae_batch", "latent_channels", "ldm_batch", "text_layers")
        self._within(0, 1, "max_corrupt", "textures", "prompt_dropout", "adversarial_from")
        self._within(0, 1_000, "vae_learning_rate", "ldm_learning_rate", "decoder_learning_rate")
        weights = ("kl_weight", "squared_weight", "absolute_weight", "feature_weight", "adversarial_weight")
        self._within(0, 1e6, *weights, "decoder_noise")
        if self.ldm_images < 0:
            raise UserError(f"ldm_images {self.ldm_images}: must be at least 0, for the codec alone: raise it")
        if len(self.flux_layers) != 2 or any(not isinstance(n, int) or n < 1 for n in self.flux_layers):
            raise UserError(f"flux_layers {list(self.flux_layers)}: give two counts of blocks, such as [2, 2]")
        cell = 2 ** (len(self.vae_widths) - 1)
        for name in ("size", "vae_crop"):
            if getattr(self, name) % cell or getattr(self, name) < cell:
                raise UserError(f"{name} {getattr(self, name)}: not a multiple of {cell}, a latent cell: change it")
        if self.tune_codec and self.start is None:
            raise UserError("tune_codec: without `start` there is none yet: name a checkpoint, or leave it out")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r}: not known: use one of {', '.join(allowed)}")
        if self.feature_weight and self.vae_crop % 32:
            raise UserError(f"vae_crop {self.vae_crop}: feature_weight needs a multiple of 32: change it")
        if self.vae_crop > self.size:
            raise UserError(f"vae_crop {self.vae_crop}: larger than size {self.size}: lower it")
        for name, unit in (("vae_widths", 8), ("unet_widths", 16), ("text_width", 32), ("flux_width", 64)):
            widths = getattr(self, name) if isinstance(getattr(self, name), tuple) else (getattr(self, name),)
            if any(not isinstance(w, int) or w < 1 or w % unit for w in widths):
                raise UserError(f"{name} {list(widths)}: must be multiples of {unit}: change it")


def read_pictures(
    source: Source, indices: Sequence[int], size: int
) -> tuple[list[Tensor], list[str], list[CorruptSample]]:
    """Pictures (3, S, S) and captions of the readable samples among `indices`, and the others."""
    found = source.read(indices, size)
    samples = [s for s in found if isinstance(s, Sample)]
    return [s.image for s in samples], [s.text for s in samples], [s for s in found if isinstance(s, CorruptSample)]


def first_pictures(source: Source, count: int, size: int) -> tuple[Tensor, list[str]]:
    """The first `count` readable pictures (all, if there are fewer), (B, 3, S, S), and their captions. Raises UserError
    where there is none."""
    images: list[Tensor] = []
    captions: list[str] = []
    for start in range(0, len(source), count):
        more, texts, _ = read_pictures(source, range(start, min(start + count, len(source))), size)
        images, captions = [*images, *more][:count], [*captions, *texts][:count]
        if len(images) == count:
            break
    if not images:
        raise UserError(f"{source.describe()}: no picture could be read: check the data set")
    return torch.stack(images), captions


def write_sheet(out: Path, name: str, images: Tensor, columns: int) -> None:
    """Writes the pictures (B, 3, H, W) as one contact sheet below `out`/previews."""
    folder = out / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(images), columns).save(folder / name)
