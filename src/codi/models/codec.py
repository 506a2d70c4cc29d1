"""The latent codec: pictures in [0, 1] <-> scaled latents. The only place that knows of [-1, 1] and scaling factors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ..errors import UserError


def downscale(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """Pixels per latent cell along a side (8 for Stable Diffusion)."""
    factor = vae.config.get("upsampling_scaling_factor", 2)  # a tiny one may have another
    return factor ** (len(vae.config["block_out_channels"]) - 1)


def require_cells(vae: AutoencoderKL | AutoencoderTiny, **sides: int) -> None:
    """Raises UserError, by its name, for a side in pixels that is no whole number of latent cells."""
    cell = downscale(vae)
    for name, side in sides.items():
        if side % cell:
            fitting = max(1, round(side / cell)) * cell
            raise UserError(f"{name} {side}: not a multiple of {cell}, the model's latent cell: use {fitting}")


def encode(vae: AutoencoderKL, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> latent (B, C, H/f, W/f) of about unit variance. H, W multiples of f.

    Without a generator the posterior's mean (conditions, evaluation); with one, a sample of it (training targets).
    """
    return draw(vae, moments(vae, image), generator).to(vae.dtype)


def moments(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> means and log-variances of the posterior, unscaled, (B, 2C, H/f, W/f)."""
    with _in_range(vae):
        return vae.encode(image.to(vae.dtype) * 2 - 1).latent_dist.parameters  # type: ignore[union-attr]


def draw(vae: AutoencoderKL, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The scaled latent of those `moments`, (B, C, H/f, W/f): the posterior's mean, or with a generator a sample."""
    posterior = DiagonalGaussianDistribution(moments)
    latent = posterior.mean
    if generator is not None:
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        latent = latent + posterior.std * noise
    shift = vae.config.get("shift_factor") or 0.0
    return (latent - shift) * vae.config["scaling_factor"]


def decode(vae: AutoencoderKL | AutoencoderTiny, latent: Tensor, clamp: bool = True) -> Tensor:
    """Latent -> (B, 3, H, W) in [0, 1], by a VAE or by a tiny one that is made for its latents, whose own scaling
    factor is 1; without `clamp` the gradient survives out of range."""
    shift = vae.config.get("shift_factor") or 0.0
    with _in_range(vae) as dtype:
        image = vae.decode(latent.to(vae.dtype) / vae.config["scaling_factor"] + shift).sample / 2 + 0.5  # type: ignore[union-attr]
    return (image.clamp(0, 1) if clamp else image).to(dtype)


@contextlib.contextmanager
def _in_range(vae: AutoencoderKL | AutoencoderTiny) -> Iterator[torch.dtype]:
    """Within it a VAE that overflows in float16, as its config says of XL's, computes in float32. Gives its dtype."""
    module: Any = vae
    dtype = module.dtype
    overflows = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        module.to(torch.float32)
    try:
        yield dtype
    finally:
        if overflows:
            module.to(dtype)
