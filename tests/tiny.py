"""Test models of the real classes, a few kilobytes in size, with seeded random weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from codi.models.adapter import ControlNetAdapter, FusedAdapter, HintAdapter
from codi.models.backbones import Backbone
from codi.models.lora import add_lora
from codi.models.student import Student
from codi.training.tokenizer import train_tokenizer

TEXT_WIDTH = 8
LATENT_CHANNELS = 4
DOWNSCALE = 4  # pixels per latent cell
CAPTIONS = ("a red ball on a plain floor", "a blue box and a green cone at dusk")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return N(0, I) noise of this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uniform values in [0, 1) of this seed: an image or a condition."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a new generator of this seed."""
    return torch.Generator().manual_seed(seed)


def initialized(build, seed: int) -> Any:
    """Call `build` under this global seed, which is the only one that the models' initialization uses."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Return a U-Net of 8 and 16 channels with cross attention at the lower resolution; `changes` go to its config."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return initialized(lambda: UNet2DConditionModel(**{**config, **changes}), seed)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """Return a VAE of downscale 4 with four latent channels."""
    config: dict[str, Any] = {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return initialized(lambda: AutoencoderKL(**config), seed)


@functools.cache
def tiny_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer trained on CAPTIONS; most of its vocabulary is the alphabet."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(CAPTIONS, Path(folder), vocabulary=900)
    tokenizer.model_max_length = 128  # captions of scenes have many tokens in so small a vocabulary
    return tokenizer


def tiny_text_encoder(seed: int = 0) -> CLIPTextModel:
    """Return a text encoder of one layer for `tiny_tokenizer`."""
    tokenizer: Any = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return initialized(lambda: CLIPTextModel(config), seed)


def tiny_scheduler(prediction: str = "v_prediction", **changes: Any) -> DDIMScheduler:
    """Return a scheduler with Stable Diffusion's noise levels."""
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    return DDIMScheduler(**{**config, **changes})


def tiny_backbone(prediction: str = "v_prediction", seed: int = 0, **unet: Any) -> Backbone:
    """Return a backbone of these parts; `unet` changes the U-Net's config."""
    return Backbone(
        tiny_vae(seed), tiny_unet(seed, **unet), tiny_text_encoder(seed), tiny_tokenizer(), tiny_scheduler(prediction)
    )


def tiny_xl(seed: int = 0) -> Backbone:
    """Return a backbone of XL's kind: a second text encoder with pooled features, and image sizes as U-Net input."""
    tokenizer: Any = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,  # the width by which diffusers distinguishes it from the first
        intermediate_size=16,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = tiny_unet(
        seed,
        cross_attention_dim=TEXT_WIDTH + 12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 6 * 4,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    second = initialized(lambda: CLIPTextModelWithProjection(config), seed + 1)
    first = tiny_text_encoder(seed)
    return Backbone(tiny_vae(seed), unet, first, tokenizer, tiny_scheduler("epsilon"), second, tokenizer)


def tiny_checkpoint(folder: Path, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Write `tiny_backbone` with diffusers as a Stable Diffusion folder. Return the folder."""
    tiny_backbone(prediction, seed).pipeline().save_pretrained(folder)
    return folder


def tiny_lora(unet: UNet2DConditionModel, name: str = "generate", seed: int = 0, rank: int = 2) -> UNet2DConditionModel:
    """Return a shared copy of `unet` with non-zero low-rank updates, as after training."""
    adapted = add_lora(unet, rank, name, seed)
    with torch.no_grad():
        for i, (key, p) in enumerate(adapted.named_parameters()):
            if "lora_B" in key:
                p.copy_(0.2 * randn(*p.shape, seed=1000 * seed + i))
    return adapted


def influence(student: Student, seed: int = 5) -> Student:
    """Give the adapter non-zero weights, as training does; the form without a condition gets low-rank updates."""
    adapter = student.adapter
    with torch.no_grad():
        if isinstance(adapter, FusedAdapter):
            for i, mu in enumerate(adapter.mu):
                mu.copy_(rand(*mu.shape, seed=seed + i))
        elif isinstance(adapter, ControlNetAdapter):
            for i, p in enumerate(q for name, q in adapter.named_parameters() if "controlnet_" in name):
                p.copy_(0.2 * randn(*p.shape, seed=seed + i))
        elif isinstance(adapter, HintAdapter):
            for i, p in enumerate(adapter.entry[2].parameters()):
                p.copy_(randn(*p.shape, seed=seed + i))
        else:
            student.network = tiny_lora(student.network, seed=seed)
    return student
