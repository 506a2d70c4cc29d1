"""Prompts -> the text features that the U-Net attends to, by Stable Diffusion's convention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded and cut to the tokenizer's model length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def embed(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Token ids (B, L) -> features (B, L, D): the encoder's last layer after its final norm."""
    return text_encoder(tokens.to(text_encoder.device))[0]


@torch.no_grad()
def embed_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Prompts -> features (B, L, D), without gradient. Equal prompts are computed once."""
    unique = list(dict.fromkeys(prompts))
    features = embed(text_encoder, tokenize(tokenizer, unique))
    return features[[unique.index(p) for p in prompts]]
