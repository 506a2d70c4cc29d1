"""A tiny decoder for a model's VAE: an AutoencoderTiny that answers as the VAE's decoder does, several times faster."""

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
from .pairs import Pairs, make_pairs, of_pictures, of_samples, parse_samples, read_prompts
from .pretrain_recipe import write_sheet
from .saving import place, shareable
from .trainer import Job, RunSettings, make_accelerator, train

# Keys that may differ between a run and its continuation.
_FREE = {"out", "images", "device", "log_every", "preview_every", "checkpoint_every", "keep", "half", "max_corrupt"}
HELD_OUT = 256  # pictures held out, at most
RECORD = "training.json"  # beside the weights: how they came about, and the figures of the held-out pictures


@dataclass(kw_only=True)
class DecoderRecipe(RunSettings):
    """Everything that decides a tiny decoder, one key of the YAML file each; RunSettings' keys too."""

    out: str
    """Folder of the finished AutoencoderTiny; checkpoints, previews and logs lie in its sub-folders."""
    model: str = "mini"
    """Whose VAE: mini, a diffusers folder, a .safetensors file or a hub id. Of a folder or an id only `vae/` is read,
    unless samples are drawn, so that those of other families (XL) do as well."""
    data: str = "samples:2000"
    """Training pictures: a folder, WebDataset tars, datasets:NAME, scenes:SPLIT:COUNT, or samples:COUNT[:SEED], which
    the model draws itself."""
    held_out: str = "samples:64:1"
    """Pictures for figures and previews."""
    prompts: str | None = None
    """A text file of prompts for `samples:`, one a line; without it they are drawn of the empty prompt, unguided."""
    sample_steps: int = 25
    """DDIM steps of `samples:`."""
    sample_guidance: float = 3.0
    """Classifier-free guidance of `samples:` with prompts."""
    size: int = 64
    """Side of training pictures in pixels."""
    crop: int | None = None
    """Side of the crops that are trained on; by default whole pictures."""
    pairs: int = 5_000
    """Pictures used at most: of each, what the full decoder makes of it is kept on disk, 3 size^2 bytes."""
    textures: int = 0
    """Procedural textures besides, so that a decoder that is trained on one world can also hold photographs."""
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops."""
    width: int = 64
    """Channels of the tiny decoder, at all resolutions alike."""
    blocks: tuple | None = None
    """Residual blocks at each resolution, from the latent's to the picture's, where they are dearest; by default three
    at each and one at the last, as TAESD has them."""
    noise: float = 0.2
    """Largest standard deviation of the noise put into latents, where these have 1: those of samplers are not clean."""
    encoder_weight: float = 0.1
    """Of the error of the tiny encoder's latents; 0 leaves it untrained."""
    half: bool = True
    """Store float16 weights."""

    def validate(self) -> None:
        """Raises UserError for a value that no run can have."""
        super().validate()
        self._at_least_1("size", "width", "sample_steps", "pairs")
        for key in ("gradient_checkpointing", "shard"):
            if getattr(self, key):
                raise UserError(f"{key}: so small a network needs none: leave it out")
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
            raise UserError(f"textures {self.textures}: go with pictures, not with samples: leave them out")
        parse_samples(self.held_out)


def cut(images: Tensor, corners: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Squares (B, C, side, side) of (B, C, H, W), one each, at these corners."""
    return torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(images, corners, strict=True)])


class TinyJob(Job):
    """Squared and absolute error, in pixels, of the tiny decoder to the full one on the same latent; of the tiny
    encoder the squared error of the way back.

    The target is what the full decoder makes of that very latent, noise and all, and not the true picture: a function
    of the input, so that no mean over possible pictures, which would be blurred, is the best answer.
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
        crop, places = (r.crop or r.size) // cell, (r.size - (r.crop or r.size)) // cell + 1
        while True:
            numbers = range(start, start + r.batch_size)
            index = [shuffled(r.seed, i // count, count)[i % count] for i in numbers]
            z, picture = self.pairs.at(index)
            corners = [np.random.default_rng([r.seed, i, 1]).integers(places, size=2).tolist() for i in numbers]
            yield cut(z, corners, crop), cut(picture, [(cell * i, cell * j) for i, j in corners], crop * cell)
            start += stride

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        z, picture = (x.to(self.online.device, memory_format=torch.channels_last) for x in batch)
        error = 2 * (codec.decode(self.online, z, clamp=False) - picture).float()  # of [-1, 1], as the codec's losses
        losses = {"squared": error.square().mean(), "absolute": 0.05 * error.abs().mean()}
        if self.recipe.encoder_weight:
            back = self.online.encode(picture * 2 - 1).latents.float()
            losses["encoder"] = self.recipe.encoder_weight * (back - z).square().mean()
        return losses

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        parts = [self.held_out.at(slice(k, k + 8)) for k in range(0, len(self.held_out.latents), 8)]
        full = torch.cat([picture for _, picture in parts])
        tiny = torch.cat([codec.decode(self.average, z.to(self.average.device)).float().cpu() for z, _ in parts])
        rows = torch.stack([full[:12], tiny[:12]], dim=1).flatten(0, 1)
        write_sheet(out, f"decoder-{progress.images:07d}.png", rows, 6)  # full beside tiny, three times a row
        return {"psnr_to_full": psnr(tiny, full)}

    def finish(self, out: Path, progress: Progress) -> None:
        figures, recipe = self.preview(out, progress), shareable(self.recipe)
        record = {"images": progress.images, "seconds": round(progress.seconds), "metrics": figures, "recipe": recipe}
        dtype = torch.float16 if self.recipe.half else torch.float32
        tiny = copy.deepcopy(self.average).to(memory_format=torch.contiguous_format)
        nn.Module.to(tiny, dtype)  # past diffusers' own, which warns of every cast

        def fill(folder: Path) -> None:
            tiny.save_pretrained(folder)
            # Where it lay on this machine; and what diffusers derives from the rest, and then warns of.
            edit_json(folder / "config.json", _name_or_path=None, block_out_channels=None)
            for weights in folder.glob("*.safetensors"):
                weights.chmod(0o644)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            (folder / "README.md").write_text(_card(recipe, figures))

        place(out, fill, ("config.json",))


def _card(recipe: dict[str, Any], figures: dict[str, float]) -> str:
    """What the folder says of itself."""
    trained = "trained too, to undo the full decoder" if recipe["encoder_weight"] else "not trained: do not use"
    return f"""# A tiny decoder for the VAE of {recipe["model"]}

An `AutoencoderTiny` of diffusers, distilled from that VAE's decoder by `codi distill-decoder` on {recipe["data"]}.
It takes latents as samplers have them: its scaling factor is 1. On held-out pictures of {recipe["size"]} px its PSNR to
what the full decoder makes is {figures["psnr_to_full"]:.1f} dB. Its encoder is {trained}.

```python
from diffusers import AutoencoderTiny, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("MODEL", vae=AutoencoderTiny.from_pretrained("THIS FOLDER"))
```
"""


def distill_decoder(recipe: DecoderRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Run or resume `recipe`; return its folder. `minutes` stops early, with what there is in place to go on. Raises
    UserError for a recipe, data or a model that will not do, and where another process trains in that folder."""
    recipe.validate()
    device = make_accelerator(recipe).device
    if processes.count() > 1:
        raise UserError(f"{processes.count()} processes: a tiny decoder is trained in one: start it without a launcher")
    with only_run(Path(recipe.out)):
        return _distill_decoder(recipe, device, quiet, time.monotonic() + 60 * minutes if minutes else None)


def _distill_decoder(recipe: DecoderRecipe, device: torch.device, quiet: bool, deadline: float | None) -> Path:
    out, r = Path(recipe.out), recipe
    require_same_run(out / CHECKPOINTS, recipe, _FREE)
    vae: Any = load_vae(recipe.model).requires_grad_(False).eval().to(device)
    codec.require_cells(vae, size=r.size, crop=r.crop or r.size)
    told = {key: getattr(r, key) for key in ("size", "prompts", "sample_steps", "sample_guidance", "seed")}
    weights = round(sum(p.double().sum().item() for p in vae.parameters()), 6)
    backbone, made = None, []
    for name, spec, noise, textures in (("held-out", r.held_out, 0.0, 0), ("train", r.data, r.noise, r.textures)):
        mark = {"codec": weights, "data": spec, "noise": noise, "textures": textures, "pairs": r.pairs, **told}
        if (wanted := parse_samples(spec)) is not None:
            count, seed = wanted
            backbone = backbone or load_backbone(r.model).freeze().to(device)
            origin = of_samples(backbone, read_prompts(r.prompts), r.size, r.sample_steps, r.sample_guidance, seed)
        else:
            source = open_source(spec)
            if isinstance(source, SceneSource):
                source.device = str(device)
            first = min(r.pairs if name == "train" else HELD_OUT, len(source))
            origin, count = of_pictures(vae, source, first, r.size, noise, r.seed), first + textures
        folder = out / "pairs" / name
        pairs = make_pairs(vae, origin, count, r.size, folder, mark, r.max_corrupt, deadline, quiet)
        if pairs is None:
            return out
        made.append(pairs)
    job = TinyJob(recipe, vae, made[1], made[0])
    progress = train(job, recipe, out, asdict(recipe), quiet=quiet, deadline=deadline)
    if 0 < progress.images < recipe.images:  # stopped early: what there is by now can be used and looked at
        job.finish(out, progress)
    return out
