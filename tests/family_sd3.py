"""Tiny models of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from codi.models.backbones import Backbone
from tiny import initialized, tiny_tokenizer


def tiny_clip(width: int, seed: int = 0) -> CLIPTextModelWithProjection:
    """Return a text encoder of two layers for `tiny_tokenizer`; Stable Diffusion 3 reads the first layer."""
    tokenizer: Any = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return initialized(lambda: CLIPTextModelWithProjection(config), seed)


def tiny_sd3(seed: int = 0, t5: bool = True, **changes: Any) -> Backbone:
    """Return Stable Diffusion 3 with three blocks, 16 channels wide. Without `t5` it is as loaded to save memory."""
    from families import tiny_kl, tiny_t5, tiny_t5_tokenizer

    config: dict[str, Any] = {
        "sample_size": 8, "pos_embed_max_size": 12, "in_channels": 16, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 20, "caption_projection_dim": 16, "pooled_projection_dim": 14,
    }  # fmt: skip
    return Backbone(
        vae=tiny_kl(seed=seed),
        transformer=initialized(lambda: SD3Transformer2DModel(**{**config, **changes}), seed),
        text_encoder=tiny_clip(8, seed), tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_clip(6, seed + 1), tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(seed, width=20) if t5 else None, tokenizer_3=tiny_t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def tiny_sd35(seed: int = 0, **changes: Any) -> Backbone:
    """Return 3.5 medium without T5: dual attention in the first blocks, normalized queries and keys."""
    return tiny_sd3(seed, t5=False, **{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **changes})
