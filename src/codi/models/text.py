"""Prompt encoding: the part that all families share, and the CLIP encoders of Stable Diffusion 1, 2 and XL.

A bundle is the dict of a prompt's tensors: "features" (B, L, D), which the network attends to, and any other inputs of
the family's network that depend on the prompt ("pooled", "mask"). Bundles of equal prompts are equal, so they can be
cached, and concatenated along the batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError, one_line
from .hooks import device_of

Bundle = dict[str, Tensor]
FEATURES = "features"
LONGEST = 100_000  # characters of a prompt: no encoder reads a tenth of them, and tokenizers take seconds for more


def limit_tokenizers(parts: Mapping[str, Any]) -> None:
    """Limit each tokenizer among a checkpoint's components to the number of positions of its text encoder.

    A tokenizer without `model_max_length` or tokenizer_config.json would keep any number of tokens and pad to 10^30.
    """
    for suffix in ("", "_2", "_3"):
        tokenizer, encoder = parts.get(f"tokenizer{suffix}"), parts.get(f"text_encoder{suffix}")
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)  # T5 has none
        if tokenizer is not None and positions and getattr(tokenizer, "model_max_length", 0) > positions:
            tokenizer.model_max_length = positions


class PromptEncoder:
    """A checkpoint's text encoders. `run` computes the bundle of a list of prompts; `limits` are pairs (tokenizer, most
    tokens it keeps); `run_negative` computes the bundle of negative prompts if the family encodes these differently."""

    def __init__(
        self,
        encoders: Sequence[Any],
        run: Callable[[list[str]], Bundle],
        limits: Sequence[tuple[Any, int]] = (),
        run_negative: Callable[[list[str]], Bundle] | None = None,
    ) -> None:
        self.encoders = tuple(e for e in encoders if e is not None)  # encoders that were not loaded are None
        self.run, self.limits, self.run_negative = run, tuple(limits), run_negative or run

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], warn: bool = True, negative: bool = False) -> Bundle:
        """Return the bundle of the prompts, without gradient. Equal prompts are computed once; with `warn`, a warning
        shows the end that was cut off a prompt that is too long. `negative`: encode as negative prompts."""
        unique = list(dict.fromkeys(prompts))
        for prompt in unique:
            require_readable(prompt)
        rows = [unique.index(p) for p in prompts]
        for tokenizer, limit in self.limits if warn else ():
            warn_of_cuts(tokenizer, unique, limit)
        logger = logging.getLogger("diffusers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # stock pipelines would also warn of cut prompts
        try:
            bundle = (self.run_negative if negative else self.run)(unique)
        finally:
            logger.setLevel(level)
        return {name: value[rows] for name, value in bundle.items()}

    @staticmethod
    def conditions(bundle: Bundle, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the network's inputs from a bundle, for a picture of `size` (height, width) in pixels: the features,
        and the other tensors by name (None if there are none)."""
        rest = {name: value for name, value in bundle.items() if name != FEATURES}
        return bundle[FEATURES], rest or None


def require_readable(prompt: str, name: str = "prompt") -> None:
    """Raise UserError for a prompt that tokenizers cannot handle: far too long, or with half a surrogate pair."""
    if len(prompt) > LONGEST:
        raise UserError(f"{name} of {len(prompt)} letters: no text encoder reads so many: give at most {LONGEST}")
    if surrogate := next((letter for letter in prompt if "\ud800" <= letter <= "\udfff"), None):
        raise UserError(f"{name} {prompt[:50]!a}: {surrogate!a} is half a character: save the text as UTF-8")


def warn_of_cuts(tokenizer: Any, prompts: Sequence[str], limit: int) -> None:
    """Warn of each prompt that has more than `limit` tokens, and show the words that are cut off."""
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False).input_ids
        special = tokenizer.num_special_tokens_to_add()  # start and end, where the encoder has them
        count = len(ids) + special
        if count > limit:
            cut = one_line(tokenizer.decode(ids[limit - special :], skip_special_tokens=True))
            warnings.warn(f"prompt of {count} tokens: the text encoder reads {limit}, so this is cut: {cut!r}",
                          stacklevel=2)  # fmt: skip


class TextEncoders(PromptEncoder):
    """One CLIP encoder (Stable Diffusion 1 and 2) or two (XL), each with its tokenizer.

    `zero_empty`: an empty prompt is encoded as zeros, as in the unconditional passes of XL's training.
    """

    def __init__(
        self, tokenizers: tuple[CLIPTokenizer, ...], encoders: tuple[Any, ...], zero_empty: bool = False
    ) -> None:
        limits = [(t, t.model_max_length) for t in tokenizers[:1] if t is not None]
        super().__init__(encoders, self._run, limits)
        self.tokenizers, self.zero_empty = tokenizers, zero_empty

    def _run(self, prompts: list[str]) -> Bundle:
        """Return the bundle of the prompts. With one encoder, the features are its last layer after the final norm;
        with two, the last layer but one of both, concatenated, and "pooled" (B, P) features of the second."""
        if len(self.encoders) == 1:
            return {FEATURES: embed(self.encoders[0], tokenize(self.tokenizers[0], prompts))}
        outputs = [
            encoder(tokenize(tokenizer, prompts).to(device_of(encoder)), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
        ]
        features, pooled = torch.cat([t.hidden_states[-2] for t in outputs], dim=-1), outputs[-1].text_embeds
        if self.zero_empty:
            nonempty = torch.tensor([bool(prompt) for prompt in prompts], device=pooled.device)[:, None]
            features, pooled = features * nonempty[..., None], pooled * nonempty
        return {FEATURES: features, "pooled": pooled}

    @staticmethod
    def conditions(bundle: Bundle, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the network's inputs from a bundle. For XL's U-Net these include "text_embeds", the pooled features,
        and "time_ids" (B, 6): the picture's original `size` (height, width), the top left corner of its crop, here (0,
        0), and the target size, all in pixels."""
        pooled = bundle.get("pooled")
        if pooled is None:
            return bundle[FEATURES], None
        ids = pooled.new_tensor([*size, 0, 0, *size]).expand(len(pooled), 6)
        return bundle[FEATURES], {"text_embeds": pooled, "time_ids": ids}


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return token ids (B, L), padded and cut to the tokenizer's model length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def embed(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Return the features (B, L, D) of token ids (B, L): the encoder's last layer after its final norm."""
    return text_encoder(tokens.to(device_of(text_encoder)))[0]


def embed_prompts(
    text: PromptEncoder, prompts: Sequence[str], size: tuple[int, int] = (0, 0), negative: bool = False
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Encode prompts to the network's inputs, for a picture of `size` (height, width) in pixels."""
    return text.conditions(text.encode(prompts, negative=negative), size)


def join(bundles: Sequence[Mapping[str, Tensor]]) -> Bundle:
    """Concatenate bundles along the batch."""
    return {name: torch.cat([b[name] for b in bundles]) for name in bundles[0]}
