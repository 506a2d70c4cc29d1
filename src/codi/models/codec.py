"""The latent codec: pictures in [0, 1] <-> scaled latents. The only place that knows of [-1, 1] and scaling factors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ..errors import UserError


class LatentSpace:
    """How one class of VAE makes latents, and the affine map that gives these about unit variance. This one is
    AutoencoderKL's, and of what takes its place: a scalar factor and shift. Families with another VAE define a
    subclass."""

    def downscale(self, vae: Any) -> int:
        """Pixels a latent cell along a side."""
        factor = vae.config.get("upsampling_scaling_factor", 2)  # a tiny one may have another
        names = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")
        return factor ** (len(next(vae.config[name] for name in names if name in vae.config)) - 1)

    def channels(self, vae: Any) -> int:
        """Channels of a latent."""
        return vae.config["latent_channels"]

    def drop_encoder(self, vae: Any) -> None:
        """Free the memory of the half that makes latents."""
        vae.encoder = vae.quant_conv = None

    def moments(self, vae: Any, image: Tensor) -> Tensor:
        """Picture (B, 3, H, W) in [-1, 1] -> means and log-variances (B, 2C, h, w) before the affine map."""
        encoded = vae.encode(image)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters
        return torch.cat([encoded.latents, torch.full_like(encoded.latents, -30.0)], dim=1)  # of AutoencoderTiny

    def normalize(self, vae: Any, latent: Tensor) -> Tensor:
        """The affine map."""
        return (latent - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]

    def denormalize(self, vae: Any, latent: Tensor) -> Tensor:
        """Its inverse."""
        return latent / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)

    def decode(self, vae: Any, latent: Tensor) -> Tensor:
        """A latent before the affine map -> picture (B, 3, H, W) in [-1, 1]."""
        return vae.decode(latent).sample


LIKE_KL = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE")
SPACES: dict[str, LatentSpace] = {name: LatentSpace() for name in LIKE_KL}


def space(vae: Any) -> LatentSpace:
    """The latent space of a VAE, by its class. Raises UserError for one that no family has."""
    for kind in type(vae).__mro__:
        if kind.__name__ in SPACES:
            return SPACES[kind.__name__]
    raise UserError(f"vae: a {type(vae).__name__} is not supported: use one of {', '.join(SPACES)}")


def vae_class(source: str, **options: Any) -> Any:
    """The class of a model's VAE in diffusers, by its configuration. Raises UserError for one that no family has."""
    import diffusers

    config: Any = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **options)
    name = config.get("_class_name", "AutoencoderKL")
    if name not in SPACES:
        raise UserError(f"{source}/vae: a {name} is not supported: use one of {', '.join(SPACES)}")
    return getattr(diffusers, name)


def downscale(vae: Any) -> int:
    """Pixels per latent cell along a side (8 for Stable Diffusion)."""
    return space(vae).downscale(vae)


def drop_encoder(vae: Any) -> None:
    """Free the memory of the encoder, of a VAE that only decodes from now on."""
    space(vae).drop_encoder(vae)


def channels(vae: Any) -> int:
    """Channels of a latent (4 for Stable Diffusion)."""
    return space(vae).channels(vae)


def require_cells(vae: Any, patch: int = 1, **sides: int) -> None:
    """Raises UserError, by its name, for a side in pixels that is no whole number of latent cells, or of tokens of
    `patch` cells."""
    cell = downscale(vae) * patch
    for name, side in sides.items():
        if side % cell:
            fitting = max(1, round(side / cell)) * cell
            what = "latent cell" if patch == 1 else "token"
            raise UserError(f"{name} {side}: not a multiple of {cell}, the model's {what}: use {fitting}")


def encode(vae: Any, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> latent (B, C, H/f, W/f) of about unit variance. H, W multiples of f.

    Without a generator the posterior's mean (conditions, evaluation); with one, a sample of it (training targets).
    """
    return draw(vae, moments(vae, image), generator).to(vae.dtype)


def moments(vae: Any, image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> means and log-variances of the posterior, unscaled, (B, 2C, H/f, W/f)."""
    with _in_range(vae):
        return space(vae).moments(vae, image.to(vae.dtype) * 2 - 1)


def draw(vae: Any, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The scaled latent of those `moments`, (B, C, H/f, W/f): the posterior's mean, or with a generator a sample."""
    posterior = DiagonalGaussianDistribution(moments)
    latent = posterior.mean
    if generator is not None:
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        latent = latent + posterior.std * noise
    return space(vae).normalize(vae, latent)


def decode(vae: Any, latent: Tensor, clamp: bool = True) -> Tensor:
    """Latent -> (B, 3, H, W) in [0, 1], by a VAE or by a tiny one that is made for its latents, whose own scaling
    factor is 1; without `clamp` the gradient survives out of range."""
    with _in_range(vae) as dtype:
        kind = space(vae)
        image = kind.decode(vae, kind.denormalize(vae, latent.to(vae.dtype))) / 2 + 0.5
    return (image.clamp(0, 1) if clamp else image).to(dtype)


@contextlib.contextmanager
def _in_range(vae: Any) -> Iterator[torch.dtype]:
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
