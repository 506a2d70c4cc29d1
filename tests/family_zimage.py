"""A tiny model of Z-Image: a byte-level Qwen2 tokenizer with a chat template, Qwen3, a single-stream transformer."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from codi.models.backbones import Backbone
from tiny import initialized

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen2_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer with one token per byte, so that the token count is the prompt's length."""
    vocab = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = len(vocab)
    turns = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=turns, chat_template=TEMPLATE)


def tiny_qwen3(seed: int = 0) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=264, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    return initialized(lambda: Qwen3Model(config), seed)


def tiny_zimage(seed: int = 0, shift: float = 3.0, dynamic: bool = False, **changes: Any) -> Backbone:
    """Return a model of three layers, 16 channels wide. The default static `shift` of 3 is Turbo's."""
    from families import tiny_kl

    config: dict[str, Any] = {
        "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12,
        "axes_dims": [4, 2, 2], "axes_lens": [600, 32, 32],
    }  # fmt: skip
    return Backbone(
        vae=tiny_kl(seed=seed),
        transformer=initialized(lambda: _with_random_padding(ZImageTransformer2DModel(**{**config, **changes})), seed),
        text_encoder=tiny_qwen3(seed), tokenizer=tiny_qwen2_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=shift),
    )  # fmt: skip


def _with_random_padding(network: Any) -> Any:
    """Randomize the pad tokens, as in trained models: with zeros, missing padding would go unnoticed."""
    for token in (network.x_pad_token, network.cap_pad_token):
        token.data.normal_()
    return network
