"""Tiny models of SANA 1.0 and 1.5."""

from __future__ import annotations

import string
from typing import Any

from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from codi.models.backbones import Backbone
from tiny import initialized


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a tokenizer of lower-case letters; it adds Gemma's <bos> token to prompts."""
    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase)
    return GemmaTokenizer(vocab={mark: index for index, mark in enumerate(marks)}, merges=[], add_bos_token=True)


def tiny_gemma(seed: int = 0) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=64, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, query_pre_attn_scalar=4, initializer_range=0.3,
    )  # fmt: skip
    return initialized(lambda: Gemma2Model(config), seed)


def tiny_dc(seed: int = 0, channels: int = 8) -> AutoencoderDC:
    """Return an autoencoder with f = 4."""
    config: dict[str, Any] = {"latent_channels": channels, "attention_head_dim": 4, "scaling_factor": 0.4,
                              "upsample_block_type": "interpolate", "downsample_block_type": "Conv"}  # fmt: skip
    for part in ("encoder", "decoder"):
        config |= {
            f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), f"{part}_layers_per_block": (1, 1, 1),
            f"{part}_block_out_channels": (8, 16, 16), f"{part}_qkv_multiscales": ((), (), (5,)),
        }  # fmt: skip
    return initialized(lambda: AutoencoderDC(**config), seed)


def tiny_sana(seed: int = 0, scheduler: Any = None, **changes: Any) -> Backbone:
    """Return SANA 1.0 with three blocks, 16 channels wide."""
    config: dict[str, Any] = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 3,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 12, "sample_size": 8,
    }  # fmt: skip
    return Backbone(
        vae=tiny_dc(seed),
        transformer=initialized(lambda: SanaTransformer2DModel(**{**config, **changes}), seed),
        text_encoder=tiny_gemma(seed), tokenizer=tiny_gemma_tokenizer(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def tiny_sana15(seed: int = 0, **changes: Any) -> Backbone:
    """Return SANA 1.5: normalized queries and keys, and the position scale of 1.0's 2K and 4K models."""
    return tiny_sana(seed, **{"qk_norm": "rms_norm_across_heads", "interpolation_scale": 2.0, **changes})
