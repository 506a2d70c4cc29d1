"""Training of a backbone's latent codec (AutoencoderKL), the first stage of `codi pretrain`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.batches import Batch, batches
from ..data.sources import Source
from ..data.textures import dead_leaves
from ..errors import UserError, one_line
from ..files import write_folder
from ..models import codec
from ..models.backbones import require_finite, require_safetensors
from . import ema
from .adversarial import adversarial_losses, new_discriminator
from .checkpoint import Progress
from .latents import normal, shuffled
from .muon import muon_groups
from .pretrain_recipe import PretrainRecipe, first_pictures, write_sheet
from .scene_store import StoredScenes
from .trainer import Job

# The posterior starts with little noise: at a log-variance of 0 it would hide the means, and with them colors.
_LOG_VARIANCE = -6.0


class CodecJob(Job):
    """Training of an AutoencoderKL: squared and absolute error of the reconstruction, a small KL term and, if their
    weights are not 0, the distance of ENLite0's features and the adversarial loss of a patch discriminator."""

    def __init__(self, vae: AutoencoderKL, recipe: PretrainRecipe, source: Source, held_out: Source) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {"vae": vae}
        if recipe.adversarial_weight:
            parts["discriminator"] = new_discriminator()
        self.online = nn.ModuleDict(parts)
        self.average = ema.average_copy(self.online)
        self.recipe, self.source = recipe, source
        generator = torch.Generator().manual_seed(recipe.seed)
        self.textures = dead_leaves(512, recipe.size, generator)
        self.held_out, _ = first_pictures(held_out, 64, recipe.size)
        self._features: Any = None
        if recipe.compile:
            for part in (vae.encoder, vae.decoder):  # encode and decode do not call the VAE's forward
                part.compile()

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        if self.recipe.optimizer == "muon":
            return muon_groups(self.online, learning_rate)
        return super().groups(learning_rate)

    def batches(self, start: int, stride: int) -> Iterator[Batch | Tensor]:
        r, source = self.recipe, self.source
        if not isinstance(source, StoredScenes):
            yield from batches(source, r.vae_batch, r.size, r.seed, start, max_corrupt=r.max_corrupt, stride=stride)
            return
        count = len(source)
        while True:  # reads only crops from the store: several times as fast as whole images
            numbers = range(start, start + r.vae_batch)
            index = [int(shuffled(r.seed, i // count, count)[i % count]) for i in numbers]
            positions = r.size - r.vae_crop + 1
            corners = [np.random.default_rng([r.seed, i, 1]).integers(positions, size=2).tolist() for i in numbers]
            yield source.crops(index, r.size, corners, r.vae_crop)
            start += stride

    def crops(self, batch: Batch | Tensor, generator: torch.Generator) -> Tensor:
        """Return random crops of images and textures, (B, 3, crop, crop) in [-1, 1]. A tensor batch is already
        cropped."""
        images = batch if isinstance(batch, Tensor) else batch.image
        count = int(len(images) * self.recipe.textures)
        pick = torch.randint(len(self.textures), (count,), generator=generator)
        textures = self.textures[pick].float() / 255
        if isinstance(batch, Tensor):
            image = torch.cat([batch[count:].cpu().float() / 255, self._random_crops(textures, generator)])
        else:
            image = self._random_crops(torch.cat([images[count:], textures]), generator)
        device = next(self.online.parameters()).device
        return image.to(device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)

    def _random_crops(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random crop of each image."""
        crop = self.recipe.vae_crop
        corners = torch.randint(self.recipe.size - crop + 1, (len(images), 2), generator=generator).tolist()
        squares = [x[:, i : i + crop, j : j + crop] for x, (i, j) in zip(images, corners, strict=True)]
        return torch.stack(squares) if squares else images.new_zeros(0, 3, crop, crop)

    def forward(self, batch: Batch | Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        recipe, x = self.recipe, self.crops(batch, generator)
        vae: Any = self.online["vae"]  # type: ignore[index]
        posterior = vae.encode(x).latent_dist
        noise = normal(posterior.mean.shape, posterior.mean.device, generator).to(posterior.mean.dtype)
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {**self.reconstruction(rebuilt, x), "kl": kl}

    def reconstruction(self, rebuilt: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Return the named losses of reconstructions `rebuilt` of `x`, both (B, 3, H, W) in [-1, 1]."""
        recipe = self.recipe
        losses = {
            "squared": recipe.squared_weight * (rebuilt - x).square().mean(),
            "absolute": recipe.absolute_weight * (rebuilt - x).abs().mean(),
        }
        if recipe.feature_weight:
            from ..evaluation.metrics import Features, maps_distance

            if self._features is None:
                self._features = Features(recipe.vae_crop, x.device)
            with torch.no_grad():
                truth = self._features(x / 2 + 0.5)
            distance = maps_distance(self._features(rebuilt / 2 + 0.5), truth)
            losses["features"] = recipe.feature_weight * distance.mean()
        if recipe.adversarial_weight and self.progress >= recipe.adversarial_from / 2:
            weight = recipe.adversarial_weight if self.progress >= recipe.adversarial_from else 0.0
            losses |= adversarial_losses(self.online["discriminator"], rebuilt, x, weight)  # type: ignore[index]
        return losses

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        vae: Any = self.average["vae"]  # type: ignore[index]
        image = self.held_out.to(vae.device)
        rebuilt = codec.decode(vae, codec.encode(vae, image))
        pairs = torch.stack([image[:8], rebuilt[:8]]).flatten(0, 1).cpu()
        write_sheet(out, f"codec-{progress.images:07d}.png", pairs, 8)
        return {"psnr": psnr(rebuilt, image)}

    def finish(self, out: Path, progress: Progress) -> None:
        vae: Any = self.average["vae"]  # type: ignore[index]
        images, _ = first_pictures(self.source, 512, self.recipe.size)
        with torch.no_grad():
            latents = torch.cat([vae.encode(x.to(vae.device) * 2 - 1).latent_dist.mean for x in images.split(32)])
            standardise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        write_folder(out / "vae", lambda folder: vae.to(memory_format=torch.contiguous_format).save_pretrained(folder))


class DecoderJob(CodecJob):
    """Training of the decoder only, on noisy latents: it learns to remove the noise that samplers leave in latents. The
    encoder is frozen, so backbones and adapters trained on its latents stay valid."""

    def __init__(self, vae: AutoencoderKL, recipe: PretrainRecipe, source: Source, held_out: Source) -> None:
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)  # type: ignore[union-attr]
        super().__init__(vae, recipe, source, held_out)

    def forward(self, batch: Batch | Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.crops(batch, generator)
        vae: Any = self.online["vae"]  # type: ignore[index]
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=generator) * torch.rand(len(z), 1, 1, 1, generator=generator)
        level = self.recipe.decoder_noise / vae.config["scaling_factor"]  # relative to scaled latents
        rebuilt = vae.decode(z + level * noise.to(z)).sample.float()
        return self.reconstruction(rebuilt, x)

    def finish(self, out: Path, progress: Progress) -> None:
        vae: Any = self.average["vae"]  # type: ignore[index]
        vae.to(memory_format=torch.contiguous_format)
        write_folder(out / "vae", lambda folder: vae.save_pretrained(folder))


def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (latent - mean) / std into the codec's two quant convolutions, in place, so that latents have mean 0 and
    variance 1 per channel and the stock scaling factor is 1. Decoding is unchanged. `mean`, `std`: (C,)."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    with torch.no_grad():
        # decode(z) = decoder(W (z std + mean) + b): the bias first, from the old weights.
        assert post is not None and quant is not None and post.bias is not None and quant.bias is not None
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()  # the log-variance shrinks with the latent
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)  # FLUX.1's pipeline needs a shift


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of images in [0, 1] in dB, averaged over the images."""
    return float((-10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-8).log10()).mean())


def new_vae(recipe: PretrainRecipe) -> AutoencoderKL:
    """Return an untrained codec of the recipe's size, whose quant convolutions start as the identity."""
    levels = len(recipe.vae_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=tuple(recipe.vae_widths),
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,  # so that a tile decodes as it does within a larger image
        sample_size=recipe.size,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        channels = recipe.latent_channels
        assert vae.encoder.conv_out.bias is not None
        vae.encoder.conv_out.bias[channels:] = _LOG_VARIANCE
        for conv in (vae.quant_conv, vae.post_quant_conv):
            assert conv is not None
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return vae


def open_vae(folder: str | Path) -> AutoencoderKL:
    """Load the AutoencoderKL of a folder, in float32. Raises UserError if there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"vae {folder}: no config.json there: give the folder of an AutoencoderKL")
    require_safetensors(Path(folder))
    try:
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    except Exception as error:  # diffusers raises many kinds
        raise UserError(f"vae {folder}: could not be loaded ({one_line(error)}): give another folder") from error
    require_finite(vae, f"vae {folder}")
    return vae
