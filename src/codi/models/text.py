"""Prompts -> what the U-Net attends to and is told of them, by the conventions of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class TextEncoders:
    """A checkpoint's text encoders, each with its tokenizer: one (Stable Diffusion 1 and 2) or two (XL).

    `zero_empty`: an empty prompt is nothing but zeros, as XL's unconditional passes were trained.
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    encoders: tuple[Any, ...]
    zero_empty: bool = False


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded and cut to the tokenizer's model length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def embed(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Token ids (B, L) -> features (B, L, D): the encoder's last layer after its final norm."""
    return text_encoder(tokens.to(text_encoder.device))[0]


@torch.no_grad()
def encode_prompts(text: TextEncoders, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Prompts -> features (B, L, D) and, with two encoders, the second's pooled ones (B, P), without gradient. Equal
    prompts are computed once.

    With one encoder the features are its last layer after the final norm; with two, the last layer but one of both,
    side by side.
    """
    unique = list(dict.fromkeys(prompts))
    rows = [unique.index(p) for p in prompts]
    if len(text.encoders) == 1:
        return embed(text.encoders[0], tokenize(text.tokenizers[0], unique))[rows], None
    told = [
        encoder(tokenize(tokenizer, unique).to(encoder.device), output_hidden_states=True)
        for tokenizer, encoder in zip(text.tokenizers, text.encoders, strict=True)
    ]
    features, pooled = torch.cat([t.hidden_states[-2] for t in told], dim=-1), told[-1].text_embeds
    if text.zero_empty:
        spoken = torch.tensor([bool(prompt) for prompt in unique], device=pooled.device)[:, None]
        features, pooled = features * spoken[..., None], pooled * spoken
    return features[rows], pooled[rows]


def added_conditions(pooled: Tensor | None, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """What XL's U-Net is told beside the features: "text_embeds", the `pooled` ones (B, P), and "time_ids" (B, 6), the
    picture's own `size` (height, width), the corner it was cut out at, here (0, 0), and the size wanted, all in pixels.
    None for None, of checkpoints with one text encoder."""
    if pooled is None:
        return None
    return {"text_embeds": pooled, "time_ids": pooled.new_tensor([*size, 0, 0, *size]).expand(len(pooled), 6)}


def embed_prompts(
    text: TextEncoders, prompts: Sequence[str], size: tuple[int, int] = (0, 0)
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Prompts -> what the U-Net attends to and is told of them: `encode_prompts` and `added_conditions`."""
    features, pooled = encode_prompts(text, prompts)
    return features, added_conditions(pooled, size)
