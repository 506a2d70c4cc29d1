"""Settings of the training of a backbone, and how its jobs read and show images."""

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
    """Settings of a text-to-image backbone trained on captioned images. Each field is a key of the YAML file, as are
    SharedSettings'."""

    out: str
    """Folder of the finished checkpoint; its sub-folder `training/` holds the work in progress."""
    data: str = "scenes:train:48000"
    """Training images: a folder, WebDataset tars, or scenes:SPLIT:COUNT."""
    held_out: str = "scenes:held-out:256"
    """Images for evaluation and previews."""
    size: int = 64
    """Side of training images in pixels."""
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops; a smaller share is skipped and listed in corrupt.json."""
    start: str | None = None
    """Checkpoint of the same layout whose weights are the starting point."""
    tune_codec: bool = False
    """Train the codec of `start` too, for `vae_images` as a new one. Otherwise it stays unchanged."""
    vae: str | None = None
    """Folder of a codec (AutoencoderKL) to use unchanged instead of training one."""
    vae_start: str | None = None
    """Folder of a codec whose weights are the starting point of the codec's training."""
    scene_store: str | None = None
    """Folder that stores rendered scenes between runs, so that each is rendered once. None: render into memory."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalized momentum for matrices (see muon.py), AdamW for the rest."""
    compile: bool = False
    """Compile the trained networks (torch.compile): takes about a minute at the start, then trains faster on a GPU."""
    vae_images: int = 120_000
    vae_crop: int = 32
    """Side of the codec's training crops: a convolutional network trains on crops as well as on whole images."""
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    vae_widths: tuple = (24, 48, 96)
    latent_channels: int = 8
    kl_weight: float = 1e-5
    squared_weight: float = 1.0
    """Loss weight of the codec's squared error, of pixels in [-1, 1]."""
    absolute_weight: float = 0.05
    """Loss weight of the codec's absolute error: a higher one gives sharper edges."""
    feature_weight: float = 0.0
    """Loss weight of the ENLite0 distance of reconstructions (see evaluation/metrics.py); needs vae_crop to be a
    multiple of 32."""
    adversarial_weight: float = 0.0
    """Loss weight of the adversarial loss of a patch discriminator."""
    adversarial_from: float = 0.7
    """Share of the codec's training after which the adversarial loss is used; the discriminator trains from half of it
    on."""
    textures: float = 0.25
    """Share of procedural textures among the codec's training images, so that it also handles photographs."""
    decoder_images: int = 0
    """Images for a further training of the codec's decoder on noisy latents; the encoder stays unchanged."""
    decoder_noise: float = 0.2
    """Largest standard deviation of the noise added to latents (their own is 1) in that training."""
    decoder_learning_rate: float = 1e-3
    edits: str | None = None
    """Edit pairs whose edited images are added with their instructions as captions, e.g. scenes:train:6000:1, so that
    the text encoder learns the words of instructions."""
    network: str = "unet"
    """unet (Stable Diffusion layout, v-prediction) or flux (FLUX.1 layout, flow matching)."""
    ldm_images: int = 160_000
    """Training images of text-to-image diffusion; 0 trains the codec only, into `out`/vae."""
    ldm_batch: int = 16
    ldm_learning_rate: float = 5e-4
    unet_widths: tuple = (64, 128, 192)
    unet_layers: int = 1
    flux_width: int = 384
    flux_layers: tuple = (2, 2)
    """Number of blocks with separate streams for image and text, then of blocks with one stream for both."""
    times: str = "uniform"
    """Distribution of flow matching's times: uniform, or logit-normal, which favors the middle."""
    text_width: int = 128
    text_layers: int = 2
    prompt_dropout: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    warmup: int = 8_000
    decay_to: float = 0.05
    log_every: int = 1_600
    preview_every: int = 20_000
    checkpoint_every: int = 8_000

    def validate(self) -> None:
        """Raise UserError for invalid values."""
        super().validate()
        self._at_least_1("vae_images", "vae_batch", "latent_channels", "ldm_batch", "text_layers")
        self._within(0, 1, "max_corrupt", "textures", "prompt_dropout", "adversarial_from")
        self._within(0, 1_000, "vae_learning_rate", "ldm_learning_rate", "decoder_learning_rate")
        weights = ("kl_weight", "squared_weight", "absolute_weight", "feature_weight", "adversarial_weight")
        self._within(0, 1e6, *weights, "decoder_noise")
        if self.ldm_images < 0:
            raise UserError(f"ldm_images {self.ldm_images}: must be at least 0, which trains the codec only: raise it")
        if len(self.flux_layers) != 2 or any(not isinstance(n, int) or n < 1 for n in self.flux_layers):
            raise UserError(f"flux_layers {list(self.flux_layers)}: give two counts of blocks, such as [2, 2]")
        cell = 2 ** (len(self.vae_widths) - 1)
        for name in ("size", "vae_crop"):
            if getattr(self, name) % cell or getattr(self, name) < cell:
                raise UserError(f"{name} {getattr(self, name)}: not a multiple of {cell}, a latent cell: change it")
        if self.tune_codec and self.start is None:
            raise UserError("tune_codec: needs `start`, whose codec it trains: name a checkpoint, or leave it out")
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
    """Return the images (3, S, S) and captions of the readable samples among `indices`, and the corrupt samples."""
    results = source.read(indices, size)
    samples = [s for s in results if isinstance(s, Sample)]
    return [s.image for s in samples], [s.text for s in samples], [s for s in results if isinstance(s, CorruptSample)]


def first_pictures(source: Source, count: int, size: int) -> tuple[Tensor, list[str]]:
    """Return the first `count` readable images (B, 3, S, S), or all if there are fewer, and their captions. Raises
    UserError if there is none."""
    images: list[Tensor] = []
    captions: list[str] = []
    for start in range(0, len(source), count):
        pictures, texts, _ = read_pictures(source, range(start, min(start + count, len(source))), size)
        images, captions = [*images, *pictures][:count], [*captions, *texts][:count]
        if len(images) == count:
            break
    if not images:
        raise UserError(f"{source.describe()}: no picture could be read: check the data set")
    return torch.stack(images), captions


def write_sheet(out: Path, name: str, images: Tensor, columns: int) -> None:
    """Write the images (B, 3, H, W) as a contact sheet below `out`/previews."""
    folder = out / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(images), columns).save(folder / name)
