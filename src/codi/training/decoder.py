"""Distillation of a VAE's decoder into a tiny one (AutoencoderTiny), which is several times faster."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.sources import SceneSource, open_source
from ..errors import UserError
from ..models import codec
from ..models.backbones import load_backbone, load_vae
from ..models.tiny import new_tiny
from . import ema, processes
from .checkpoint import CHECKPOINTS, Progress, edit_json, require_same_run
from .codec import psnr
from .latents import shuffled
from .lock import only_run
from .pairs import Pairs, latents_of_images, latents_of_samples, make_pairs, parse_samples, read_prompts
from .pretrain_recipe import write_sheet
from .saving import place, shareable
from .trainer import Job, RunSettings, make_accelerator, train

# Keys that may differ between a run and its continuation.
_FREE = {"out", "images", "device", "log_every", "preview_every", "checkpoint_every", "keep", "half", "max_corrupt"}
HELD_OUT = 256  # held-out images at most
RECORD = "training.json"  # beside the weights: the recipe, the training time and the scores on held-out images


@dataclass(kw_only=True)
class DecoderRecipe(RunSettings):
    """Settings of the distillation of a tiny decoder. Each field is a key of the YAML file, as are RunSettings'."""

    out: str
    """Folder of the finished AutoencoderTiny; its sub-folders hold checkpoints, previews and logs."""
    model: str = "mini"
    """Model whose VAE is distilled: mini, a diffusers folder, a .safetensors file or a hub id. Unless it draws samples,
    only `vae/` of a folder or hub id is read, so VAEs of unsupported families work too."""
    data: str = "samples:2000"
    """Training images: a folder, WebDataset tars, datasets:NAME, scenes:SPLIT:COUNT, or samples:COUNT[:SEED], drawn by
    the model itself."""
    held_out: str = "samples:64:1"
    """Images for evaluation and previews."""
    prompts: str | None = None
    """Text file of prompts for `samples:`, one per line; without it they use the empty prompt, without guidance."""
    sample_steps: int = 25
    """DDIM steps of `samples:`."""
    sample_guidance: float = 3.0
    """Classifier-free guidance scale of `samples:` with prompts."""
    size: int = 64
    """Side of training images in pixels."""
    crop: int | None = None
    """Side of training crops in pixels; by default whole images are used."""
    pairs: int = 5_000
    """Most training images used; the full decoder's output for each is stored on disk, 3 size^2 bytes."""
    textures: int = 0
    """Procedural textures added to the data, so that a decoder trained on rendered scenes also handles photographs."""
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops."""
    width: int = 64
    """Channels of the tiny decoder, the same at all resolutions."""
    blocks: tuple | None = None
    """Residual blocks at each resolution, from the latent's to the image's, where a block costs most; by default three
    at each and one at the last, as in TAESD."""
    noise: float = 0.2
    """Largest standard deviation of the noise added to latents (their own is 1), as samplers' latents are not clean."""
    encoder_weight: float = 0.1
    """Loss weight of the error of the tiny encoder's latents; 0 leaves the encoder untrained."""
    half: bool = True
    """Store float16 weights."""

    def validate(self) -> None:
        """Raise UserError for an invalid value."""
        super().validate()
        self._at_least_1("size", "width", "sample_steps", "pairs")
        for key in ("gradient_checkpointing", "shard"):
            if getattr(self, key):
                raise UserError(f"{key}: not supported for so small a network: leave it out")
        self._within(0, 1, "max_corrupt")
        self._within(0, 1e6, "sample_guidance")
        if self.crop is not None and not 1 <= self.crop <= self.size:
            raise UserError(f"crop {self.crop}: must lie between 1 and size {self.size}: change it")
        for name in ("noise", "encoder_weight", "textures"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: must be 0 or more: raise it")
        if any(not isinstance(count, int) or count < 0 for count in self.blocks or ()):
            raise UserError(f"blocks {list(self.blocks or ())}: must be whole numbers from 0 up: change them")
        if parse_samples(self.data) and self.textures:
            raise UserError(f"textures {self.textures}: cannot be added to samples, only to pictures: leave them out")
        parse_samples(self.held_out)


def cut(images: Tensor, corners: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Crop each image of (B, C, H, W) to a square at its corner (top, left): (B, C, side, side)."""
    return torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(images, corners, strict=True)])


class TinyJob(Job):
    """Training of a tiny VAE: squared and absolute error, in pixels, of the tiny decoder's output to the full one's for
    the same latent, and the squared error of the latent that the tiny encoder makes of the full decoder's output.

    The target is the full decoder's output for the noisy latent, not the true image: a function of the input, so the
    optimum is no blurred mean over possible images.
    """

    online: Any
    average: Any

    def __init__(self, recipe: DecoderRecipe, vae: AutoencoderKL, pairs: Pairs, held_out: Pairs) -> None:
        super().__init__()
        self.recipe, self.pairs, self.held_out, self.cell = recipe, pairs, held_out, codec.downscale(vae)
        torch.manual_seed(recipe.seed)
        tiny: Any = new_tiny(vae, recipe.width, recipe.blocks or (3,) * (self.cell.bit_length() - 1) + (1,))
        tiny.encoder.requires_grad_(recipe.encoder_weight > 0)
        self.online = tiny.to(memory_format=torch.channels_last)
        self.average = ema.average_copy(self.online)

    def batches(self, start: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        r, count, cell = self.recipe, len(self.pairs.latents), self.cell
        crop, positions = (r.crop or r.size) // cell, (r.size - (r.crop or r.size)) // cell + 1
        while True:
            numbers = range(start, start + r.batch_size)
            index = [shuffled(r.seed, i // count, count)[i % count] for i in numbers]
            z, image = self.pairs.at(index)
            corners = [np.random.default_rng([r.seed, i, 1]).integers(positions, size=2).tolist() for i in numbers]
            yield cut(z, corners, crop), cut(image, [(cell * i, cell * j) for i, j in corners], crop * cell)
            start += stride

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        z, image = (x.to(self.online.device, memory_format=torch.channels_last) for x in batch)
        error = 2 * (codec.decode(self.online, z, clamp=False) - image).float()  # in [-1, 1], as in the codec's losses
        losses = {"squared": error.square().mean(), "absolute": 0.05 * error.abs().mean()}
        if self.recipe.encoder_weight:
            encoded = self.online.encode(image * 2 - 1).latents.float()
            losses["encoder"] = self.recipe.encoder_weight * (encoded - z).square().mean()
        return losses

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        parts = [self.held_out.at(slice(k, k + 8)) for k in range(0, len(self.held_out.latents), 8)]
        full = torch.cat([image for _, image in parts])
        tiny = torch.cat([codec.decode(self.average, z.to(self.average.device)).float().cpu() for z, _ in parts])
        rows = torch.stack([full[:12], tiny[:12]], dim=1).flatten(0, 1)
        write_sheet(out, f"decoder-{progress.images:07d}.png", rows, 6)  # three pairs (full, tiny) in a row
        return {"psnr_to_full": psnr(tiny, full)}

    def finish(self, out: Path, progress: Progress) -> None:
        figures, recipe = self.preview(out, progress), shareable(self.recipe)
        record = {"images": progress.images, "seconds": round(progress.seconds), "metrics": figures, "recipe": recipe}
        dtype = torch.float16 if self.recipe.half else torch.float32
        tiny = copy.deepcopy(self.average).to(memory_format=torch.contiguous_format)
        nn.Module.to(tiny, dtype)  # diffusers' own `to` warns of every cast

        def fill(folder: Path) -> None:
            tiny.save_pretrained(folder)
            # A local path; and a value that diffusers derives from the others and then warns about.
            edit_json(folder / "config.json", _name_or_path=None, block_out_channels=None)
            for weights in folder.glob("*.safetensors"):
                weights.chmod(0o644)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            (folder / "README.md").write_text(_card(recipe, figures))

        place(out, fill, ("config.json",))


def _card(recipe: dict[str, Any], figures: dict[str, float]) -> str:
    """Return the text of the folder's README.md."""
    trained = "trained too, to undo the full decoder" if recipe["encoder_weight"] else "not trained: do not use"
    return f"""# A tiny decoder for the VAE of {recipe["model"]}

An `AutoencoderTiny` of diffusers, distilled from that VAE's decoder by `codi distill-decoder` on {recipe["data"]}.
It takes latents as samplers return them: its scaling factor is 1. On held-out images of {recipe["size"]} px its PSNR to
the full decoder's output is {figures["psnr_to_full"]:.1f} dB. Its encoder is {trained}.

```python
from diffusers import AutoencoderTiny, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("MODEL", vae=AutoencoderTiny.from_pretrained("THIS FOLDER"))
```
"""


def distill_decoder(recipe: DecoderRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Run or resume `recipe`; return its folder. After `minutes` the run stops with a checkpoint, to go on later.
    Raises UserError for an unusable recipe, data or model, and if another process trains in that folder."""
    recipe.validate()
    device = make_accelerator(recipe).device
    if processes.count() > 1:
        raise UserError(f"{processes.count()} processes: a tiny decoder trains in one: start it without a launcher")
    with only_run(Path(recipe.out)):
        return _distill_decoder(recipe, device, quiet, time.monotonic() + 60 * minutes if minutes else None)


def _distill_decoder(recipe: DecoderRecipe, device: torch.device, quiet: bool, deadline: float | None) -> Path:
    out, r = Path(recipe.out), recipe
    require_same_run(out / CHECKPOINTS, recipe, _FREE)
    vae: Any = load_vae(recipe.model).requires_grad_(False).eval().to(device)
    codec.require_cells(vae, size=r.size, crop=r.crop or r.size)
    options = {key: getattr(r, key) for key in ("size", "prompts", "sample_steps", "sample_guidance", "seed")}
    weights = round(sum(p.double().sum().item() for p in vae.parameters()), 6)
    backbone, data = None, []
    for name, spec, noise, textures in (("held-out", r.held_out, 0.0, 0), ("train", r.data, r.noise, r.textures)):
        mark = {"codec": weights, "data": spec, "noise": noise, "textures": textures, "pairs": r.pairs, **options}
        if (samples := parse_samples(spec)) is not None:
            count, seed = samples
            backbone = backbone or load_backbone(r.model).freeze().to(device)
            make_latents = latents_of_samples(
                backbone, read_prompts(r.prompts), r.size, r.sample_steps, r.sample_guidance, seed
            )
        else:
            source = open_source(spec)
            if isinstance(source, SceneSource):
                source.device = str(device)
            images = min(r.pairs if name == "train" else HELD_OUT, len(source))
            make_latents, count = latents_of_images(vae, source, images, r.size, noise, r.seed), images + textures
        folder = out / "pairs" / name
        pairs = make_pairs(vae, make_latents, count, r.size, folder, mark, r.max_corrupt, deadline, quiet)
        if pairs is None:
            return out
        data.append(pairs)
    job = TinyJob(recipe, vae, data[1], data[0])
    progress = train(job, recipe, out, asdict(recipe), quiet=quiet, deadline=deadline)
    if 0 < progress.images < recipe.images:  # stopped early: write the model as it is by now
        job.finish(out, progress)
    return out
