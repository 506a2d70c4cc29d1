"""A tiny model of Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from codi.models.backbones import Backbone
from family_flux2 import tiny_qwen_tokenizer
from tiny import initialized


def tiny_qwen_vl(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Return a model of two layers; prompts use its text part alone."""
    text = {
        "vocab_size": 259, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
        "num_key_value_heads": 1, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return initialized(lambda: Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_qwen_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    """Return a VAE with f = 2 and four channels of different means and standard deviations."""
    config: dict[str, Any] = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 0.8, 1.2],
    }  # fmt: skip
    return initialized(lambda: AutoencoderKLQwenImage(**config), seed)


def tiny_qwen_image(seed: int = 0, **changes: Any) -> Backbone:
    """Return a model of three blocks, 16 channels wide, with the scheduler settings of the published checkpoint."""
    config: dict[str, Any] = {
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 8, "axes_dims_rope": (4, 2, 2),
    }  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return Backbone(
        vae=tiny_qwen_vae(seed),
        transformer=initialized(lambda: QwenImageTransformer2DModel(**{**config, **changes}), seed),
        text_encoder=tiny_qwen_vl(seed), tokenizer=tiny_qwen_tokenizer(), scheduler=scheduler,
    )  # fmt: skip
