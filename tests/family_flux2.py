"""Tiny models of FLUX.2: klein (base and distilled) and dev."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from codi.models.backbones import Backbone
from tiny import initialized, rand, randn

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level tokenizer with a chat template."""
    vocab = {mark: index for index, mark in enumerate((*MARKS, *sorted(ByteLevel.alphabet())))}
    tokenizer: Any = Qwen2Tokenizer(vocab, merges=[], extra_special_tokens=list(MARKS[1:]))
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    """Return 28 layers: klein reads the output of the 27th."""
    return initialized(lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN, num_hidden_layers=28)), seed)


def tiny_mistral3(seed: int = 0) -> Mistral3ForConditionalGeneration:
    """Return 31 layers: dev reads the output of the 30th."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**QWEN, "num_hidden_layers": 31, "model_type": "mistral"}
    config = Mistral3Config(text_config=text, vision_config={**vision, "model_type": "pixtral"})
    return initialized(lambda: Mistral3ForConditionalGeneration(config), seed)


def tiny_flux2_vae(seed: int = 0) -> AutoencoderKLFlux2:
    """Return a VAE with f = 4 including patches, and batch-norm statistics that differ from the initial ones."""
    config: dict[str, Any] = {
        "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "layers_per_block": 1,
        "norm_num_groups": 4, "sample_size": 16,
    }  # fmt: skip
    vae = initialized(lambda: AutoencoderKLFlux2(**config), seed)
    vae.bn.running_mean.copy_(0.3 * randn(16, seed=seed))
    vae.bn.running_var.copy_(0.5 + rand(16, seed=seed))
    return vae


def tiny_flux2(seed: int = 0, distilled: bool = False, dev: bool = False, **changes: Any) -> Backbone:
    """Return klein with two double and two single blocks, 16 channels wide.

    `dev` replaces the text encoder and adds the guidance input.
    """
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": dev,
    }  # fmt: skip
    with torch.no_grad():
        return Backbone(
            vae=tiny_flux2_vae(seed),
            transformer=initialized(lambda: Flux2Transformer2DModel(**{**config, **changes}), seed),
            text_encoder=tiny_mistral3(seed) if dev else tiny_qwen3(seed), tokenizer=tiny_qwen_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), is_distilled=distilled,
        )  # fmt: skip


def tiny_flux2_dev(seed: int = 0) -> Backbone:
    return tiny_flux2(seed, dev=True)
