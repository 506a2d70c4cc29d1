"""Tiny random models of the transformer families, built from the diffusers and transformers classes.

`FAMILIES` maps each family to the function that builds its tiny model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from codi.models.backbones import Backbone
from family_flux2 import tiny_flux2, tiny_flux2_dev
from family_qwen_image import tiny_qwen_image
from family_sana import tiny_sana, tiny_sana15
from family_sd3 import tiny_sd3, tiny_sd35
from family_zimage import tiny_zimage
from tiny import initialized, tiny_text_encoder, tiny_tokenizer

WORDS = ("a", "red", "ball", "on", "plain", "floor", "blue", "box", "and", "green", "cone", "at", "dusk")


def tiny_kl(channels: int = 16, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """Return a VAE with f = 2 and a shift factor, as in families with 16 latent channels."""
    config: dict[str, Any] = {
        "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": channels, "layers_per_block": 1,
        "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.4, "shift_factor": 0.1,
        "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False,
    }  # fmt: skip
    return initialized(lambda: AutoencoderKL(**{**config, **changes}), seed)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer of WORDS; other words are unknown tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_t5(seed: int = 0, width: int = 12) -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return initialized(lambda: T5EncoderModel(config), seed)


def tiny_flux(seed: int = 0, guidance: bool = True, **changes: Any) -> Backbone:
    """Return FLUX.1 with two double and two single blocks, 16 channels wide. `guidance`: the input of dev alone."""
    config: dict[str, Any] = {
        "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (4, 2, 2), "guidance_embeds": guidance,
    }  # fmt: skip
    return Backbone(
        vae=tiny_kl(seed=seed),
        transformer=initialized(lambda: FluxTransformer2DModel(**{**config, **changes}), seed),
        text_encoder=tiny_text_encoder(seed), tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(seed), tokenizer_2=tiny_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., Backbone]] = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,
    "sd35": tiny_sd35,
    "sana": tiny_sana,
    "sana15": tiny_sana15,
    "zimage": tiny_zimage,
    "flux2": tiny_flux2,
    "flux2dev": tiny_flux2_dev,
    "qwenimage": tiny_qwen_image,
}


def stock_sigmas(steps: int) -> list[float]:
    """Return unshifted sigmas to pass, as `set_timesteps(n)` applies a static shift twice (diffusers #13243)."""
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
