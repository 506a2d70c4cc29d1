"""The latent codec: pictures in [0, 1] <-> scaled latents. Only this module uses [-1, 1] and scaling factors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ..errors import UserError


class LatentSpace:
    """The conventions of one class of VAE: how it encodes and decodes, and the affine map that gives latents about unit
    variance. This class is for AutoencoderKL and its replacements, with a scalar factor and shift; families with
    another VAE define a subclass."""

    def downscale(self, vae: Any) -> int:
        """Return the pixels per latent cell along a side."""
        factor = vae.config.get("upsampling_scaling_factor", 2)  # AutoencoderTiny may have another
        names = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")
        return factor ** (len(next(vae.config[name] for name in names if name in vae.config)) - 1)

    def channels(self, vae: Any) -> int:
        """Return the number of channels of a latent."""
        return vae.config["latent_channels"]

    def drop_encoder(self, vae: Any) -> None:
        """Free the memory of the encoder."""
        vae.encoder = vae.quant_conv = None

    def moments(self, vae: Any, image: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to means and log-variances (B, 2C, h, w) before the affine map."""
        encoded = vae.encode(image)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters
        return torch.cat([encoded.latents, torch.full_like(encoded.latents, -30.0)], dim=1)  # AutoencoderTiny

    def normalize(self, vae: Any, latent: Tensor) -> Tensor:
        """Apply the affine map."""
        return (latent - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]

    def denormalize(self, vae: Any, latent: Tensor) -> Tensor:
        """Apply the inverse of the affine map."""
        return latent / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)

    def decode(self, vae: Any, latent: Tensor) -> Tensor:
        """Decode a latent before the affine map to pictures (B, 3, H, W) in [-1, 1]."""
        return vae.decode(latent).sample


LIKE_KL = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE")
SPACES: dict[str, LatentSpace] = {name: LatentSpace() for name in LIKE_KL}


def space(vae: Any) -> LatentSpace:
    """Return the latent space of a VAE, by its class. Raises UserError for an unsupported class."""
    for class_ in type(vae).__mro__:
        if class_.__name__ in SPACES:
            return SPACES[class_.__name__]
    raise UserError(f"vae: a {type(vae).__name__} is not supported: use one of {', '.join(SPACES)}")


def vae_class(source: str, **options: Any) -> Any:
    """Return diffusers' class of a model's VAE, by its configuration. Raises UserError for an unsupported class."""
    import diffusers

    config: Any = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **options)
    name = config.get("_class_name", "AutoencoderKL")
    if name not in SPACES:
        raise UserError(f"{source}/vae: a {name} is not supported: use one of {', '.join(SPACES)}")
    return getattr(diffusers, name)


def downscale(vae: Any) -> int:
    """Return the pixels per latent cell along a side (8 for Stable Diffusion)."""
    return space(vae).downscale(vae)


def drop_encoder(vae: Any) -> None:
    """Free the memory of the encoder of a VAE that will only decode."""
    space(vae).drop_encoder(vae)


def channels(vae: Any) -> int:
    """Return the number of channels of a latent (4 for Stable Diffusion)."""
    return space(vae).channels(vae)


def require_cells(vae: Any, patch: int = 1, **sides: int) -> None:
    """Raise UserError for a side, given as name=pixels, that is not a multiple of a latent cell or, for `patch` > 1, of
    a token of `patch` cells."""
    cell = downscale(vae) * patch
    for name, side in sides.items():
        if side % cell:
            nearest = max(1, round(side / cell)) * cell
            unit = "latent cell" if patch == 1 else "token"
            raise UserError(f"{name} {side}: not a multiple of {cell}, the model's {unit}: use {nearest}")


def encode(vae: Any, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Encode pictures (B, 3, H, W) in [0, 1], with H and W multiples of f, to latents (B, C, H/f, W/f) of about unit
    variance.

    Without a generator the posterior's mean (conditions, evaluation); with one, a sample of it (training targets).
    """
    return draw(vae, moments(vae, image), generator).to(vae.dtype)


def moments(vae: Any, image: Tensor) -> Tensor:
    """Encode pictures (B, 3, H, W) in [0, 1] to unscaled means and log-variances of the posterior, (B, 2C, H/f,
    W/f)."""
    with _without_overflow(vae):
        return space(vae).moments(vae, image.to(vae.dtype) * 2 - 1)


def draw(vae: Any, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the scaled latent (B, C, H/f, W/f) for `moments`: the posterior's mean or, with a generator, a sample."""
    posterior = DiagonalGaussianDistribution(moments)
    latent = posterior.mean
    if generator is not None:
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        latent = latent + posterior.std * noise
    return space(vae).normalize(vae, latent)


def decode(vae: Any, latent: Tensor, clamp: bool = True) -> Tensor:
    """Decode latents to pictures (B, 3, H, W) in [0, 1], by a VAE or by a tiny decoder for its latents, whose own
    scaling factor is 1. Without `clamp`, values out of range keep their gradient."""
    with _without_overflow(vae) as dtype:
        latent_space = space(vae)
        image = latent_space.decode(vae, latent_space.denormalize(vae, latent.to(vae.dtype))) / 2 + 0.5
    return (image.clamp(0, 1) if clamp else image).to(dtype)


@contextlib.contextmanager
def _without_overflow(vae: Any) -> Iterator[torch.dtype]:
    """Within the context, run a float16 VAE that would overflow, as XL's (see its config), in float32. Yield the VAE's
    original dtype."""
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
