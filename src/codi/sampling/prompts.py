"""Prompts of one call: texts, encoded when needed, or embeddings as diffusers' pipelines take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.text import FEATURES, Bundle, PromptEncoder, require_readable
from .checks import require_values

# Arguments that hold embeddings -> codi's names for them (see models.text).
EMBEDDINGS = {"prompt_embeds": FEATURES, "pooled_prompt_embeds": "pooled", "prompt_attention_mask": "mask"}


@dataclass
class Prompts:
    """Prompt and negative prompt of each image, as texts; `embedded` or `negative_embedded` replace them."""

    texts: list[str]
    negative: list[str]
    embedded: Bundle | None = None
    negative_embedded: Bundle | None = None
    _encoded: dict[Any, Bundle] = field(default_factory=dict)  # tiles need the same ones many times

    def bundle(self, encoder: PromptEncoder, rows: Sequence[int], negative: bool = False) -> Bundle:
        """Return the (negative) embeddings of the images with these indices."""
        embedded = self.negative_embedded if negative else self.embedded
        if embedded is not None:
            return {name: value[list(rows)] for name, value in embedded.items()}
        texts = tuple((self.negative if negative else self.texts)[row] for row in rows)
        if not encoder.encoders:
            name = "negative_prompt_embeds" if negative else "prompt_embeds"
            raise UserError(f"{name}: missing, and this pipeline has no text encoder: pass what encode_prompt returns")
        if (texts, negative) not in self._encoded:
            self._encoded[texts, negative] = encoder.encode(texts, negative=negative)
        return self._encoded[texts, negative]

    def guided_texts(self, rows: Sequence[int]) -> list[str]:
        """Return a text per image, "" where it has no prompt; embeddings count as some text."""
        return [self.texts[row] if self.embedded is None else next(iter(EMBEDDINGS)) for row in rows]


def texts_of(value: Any, name: str = "prompt") -> list[str]:
    """Return one text or several as a list; None becomes "". Raises UserError for other types."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor))
    texts: list[Any] = list(value) if several else ["" if value is None else value]  # type: ignore[arg-type]
    if not texts:
        raise UserError(f"{name}: an empty list: give a text, or one for each picture")
    for text in texts:
        if not isinstance(text, str):
            shown = repr(text) if isinstance(text, (int, float, bytes, type(None))) else type(text).__name__
            raise UserError(f"{name} {shown}: not a text: give a string, or one for each picture")
        require_readable(text, name)
    return texts


def embeddings_of(arguments: dict[str, Any], text: Any, negative: bool = False) -> Bundle | None:
    """Return the embeddings among the arguments of a call (see EMBEDDINGS); None without.

    Raises UserError for embeddings together with a text, for incomplete embeddings, and for values that are not tensors
    of finite numbers.
    """
    prefix = "negative_" if negative else ""
    embeddings = {name: arguments.get(prefix + name) for name in EMBEDDINGS}
    embeddings = {name: value for name, value in embeddings.items() if value is not None}
    if not embeddings:
        return None
    if "prompt_embeds" not in embeddings:
        raise UserError(f"{prefix}{next(iter(embeddings))}: without {prefix}prompt_embeds: pass both")
    if any(texts_of(text, f"{prefix}prompt")):
        raise UserError(f"{prefix}prompt and {prefix}prompt_embeds: both set the prompt: pass one")
    for name, value in embeddings.items():
        if not isinstance(value, Tensor) or value.ndim < 2:
            raise UserError(
                f"{prefix}{name}: not a tensor with a row for each picture: pass what encode_prompt returns"
            )
        if EMBEDDINGS[name] != "mask":
            require_values(prefix + name, value)
    if len({len(value) for value in embeddings.values()}) != 1:
        raise UserError(f"{prefix}prompt_embeds: embeddings for different numbers of pictures: pass as many of each")
    return {EMBEDDINGS[name]: value for name, value in embeddings.items()}


def require_complete(bundle: Bundle | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for embeddings of another width than the network's, or without pooled ones that it needs.

    `shapes` are those of `Family.condition_shapes`.
    """
    if bundle is None:
        return
    width, expected = bundle[FEATURES].shape[-1], shapes[FEATURES][-1]
    if bundle[FEATURES].ndim != 3 or width != expected:
        raise UserError(f"prompt_embeds of shape {tuple(bundle[FEATURES].shape)}: this model reads (B, L, {expected}): "
                        "pass what its encode_prompt returns")  # fmt: skip
    if ("pooled" in shapes or "text_embeds" in shapes) and "pooled" not in bundle:
        raise UserError("pooled_prompt_embeds: missing, and this model reads them: pass what encode_prompt returns")


def repeat_rows(rows: Any, each: int) -> Any:
    """Repeat each row of a list or a tensor `each` times in a row; None stays None."""
    if rows is None or each == 1:
        return rows
    if isinstance(rows, Tensor):
        return rows.repeat_interleave(each, dim=0)
    return [row for row in rows for _ in range(each)]


def move_bundle(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Bundle:
    """Move embeddings to a device and convert floating-point ones to this dtype."""
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in bundle.items()}
