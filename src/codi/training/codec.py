"""Stage one of a backbone: the latent codec (AutoencoderKL)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..data.batches import Batch, batches
from ..data.sources import Source
from ..data.textures import dead_leaves
from ..models import codec
from . import ema
from .checkpoint import Progress, write_atomically
from .pretrain_recipe import PretrainRecipe, first_pictures, write_sheet
from .trainer import Job

# The posterior starts with little noise: at a log-variance of 0 it would drown the means, and colour with them.
_LOG_VARIANCE = -6.0


class CodecJob(Job):
    """AutoencoderKL: squared and absolute error of the reconstruction, and a light KL term."""

    def __init__(self, vae: AutoencoderKL, recipe: PretrainRecipe, source: Source, held_out: Source) -> None:
        super().__init__()
        self.online, self.average = vae, ema.average_copy(vae)
        self.recipe, self.source = recipe, source
        generator = torch.Generator().manual_seed(recipe.seed)
        self.textures = dead_leaves(512, recipe.size, generator)
        self.held_out, _ = first_pictures(held_out, 64, recipe.size)

    def batches(self, start: int, stride: int) -> Iterator[Batch]:
        r = self.recipe
        return batches(self.source, r.vae_batch, r.size, r.seed, start, max_corrupt=r.max_corrupt, stride=stride)

    def crops(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Random crops of pictures and textures, (B, 3, crop, crop) in [-1, 1]."""
        recipe, crop = self.recipe, self.recipe.vae_crop
        count = int(len(batch.image) * recipe.textures)
        pick = torch.randint(len(self.textures), (count,), generator=generator)
        image = torch.cat([batch.image[count:], self.textures[pick].float() / 255])
        corners = torch.randint(recipe.size - crop + 1, (len(image), 2), generator=generator).tolist()
        image = torch.stack([x[:, i : i + crop, j : j + crop] for x, (i, j) in zip(image, corners, strict=True)])
        device = next(self.online.parameters()).device
        return image.to(device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        recipe, x = self.recipe, self.crops(batch, generator)
        vae: Any = self.online
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return {
            "squared": (rebuilt - x).square().mean(),
            "absolute": 0.05 * (rebuilt - x).abs().mean(),
            "kl": recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        vae: Any = self.average
        image = self.held_out.to(vae.device)
        rebuilt = codec.decode(vae, codec.encode(vae, image))
        pairs = torch.stack([image[:8], rebuilt[:8]]).flatten(0, 1).cpu()
        write_sheet(out, f"codec-{progress.images:07d}.png", pairs, 8)
        return {"psnr": psnr(rebuilt, image)}

    def finish(self, out: Path, progress: Progress) -> None:
        vae: Any = self.average
        images, _ = first_pictures(self.source, 512, self.recipe.size)
        with torch.no_grad():
            latents = torch.cat([vae.encode(x.to(vae.device) * 2 - 1).latent_dist.mean for x in images.split(32)])
            standardise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        write_atomically(
            out / "vae", lambda folder: vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        )


class DecoderJob(CodecJob):
    """The decoder alone, on latents with noise in them: it learns to take out the grain that a sampler's latents have.
    The encoder stays, and with it every backbone and adapter that was trained on its latents."""

    def __init__(self, vae: AutoencoderKL, recipe: PretrainRecipe, source: Source, held_out: Source) -> None:
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)  # type: ignore[union-attr]
        super().__init__(vae, recipe, source, held_out)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.crops(batch, generator)
        vae: Any = self.online
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=generator) * torch.rand(len(z), 1, 1, 1, generator=generator)
        level = self.recipe.decoder_noise / vae.config["scaling_factor"]  # of latents as samplers know them
        rebuilt = vae.decode(z + level * noise.to(z)).sample.float()
        return {"squared": (rebuilt - x).square().mean(), "absolute": 0.05 * (rebuilt - x).abs().mean()}

    def finish(self, out: Path, progress: Progress) -> None:
        vae: Any = self.average
        vae.to(memory_format=torch.contiguous_format)
        write_atomically(out / "vae", lambda folder: vae.save_pretrained(folder))


def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Folds (latent - mean) / std into the codec's two quant convolutions, in place, so that latents have mean 0 and
    variance 1 per channel and the stock scaling factor is 1. Decoding is unchanged. `mean`, `std`: (C,)."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    with torch.no_grad():
        # decode(z) = rest(W (z std + mean) + b): first, from the old weights.
        assert post is not None and quant is not None and post.bias is not None and quant.bias is not None
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()  # the log-variance shrinks with the latent
    vae.register_to_config(scaling_factor=1.0)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures in [0, 1], in dB."""
    return float((-10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-8).log10()).mean())


def new_vae(recipe: PretrainRecipe) -> AutoencoderKL:
    """An untrained codec of the recipe's size; its quant convolutions start as the identity."""
    levels = len(recipe.vae_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=tuple(recipe.vae_widths),
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,  # so that tiles of any size decode alike
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
