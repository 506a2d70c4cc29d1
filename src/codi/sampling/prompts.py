"""The prompts of one call: texts, which are encoded when needed, or embeddings as diffusers' pipelines take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.text import FEATURES, Bundle, PromptEncoder, require_readable
from .checks import require_values

# The arguments that hold embeddings, and what codi calls each of them (see models.text).
EMBEDDINGS = {"prompt_embeds": FEATURES, "pooled_prompt_embeds": "pooled", "prompt_attention_mask": "mask"}


@dataclass
class Prompts:
    """What a number of pictures are led to, and by guidance away from: a text and a negative text each, or their
    embeddings in place of either."""

    texts: list[str]
    negative: list[str]
    embedded: Bundle | None = None
    negative_embedded: Bundle | None = None
    _read: dict[Any, Bundle] = field(default_factory=dict)  # pictures in tiles ask for the same many times

    def bundle(self, encoder: PromptEncoder, rows: Sequence[int], negative: bool = False) -> Bundle:
        """Return the embeddings of these pictures."""
        given = self.negative_embedded if negative else self.embedded
        if given is not None:
            return {name: value[list(rows)] for name, value in given.items()}
        texts = tuple((self.negative if negative else self.texts)[row] for row in rows)
        if not encoder.encoders:
            name = "negative_prompt_embeds" if negative else "prompt_embeds"
            raise UserError(f"{name}: missing, and this pipeline has no text encoder: pass what encode_prompt returns")
        if (texts, negative) not in self._read:
            self._read[texts, negative] = encoder.encode(texts, negative=negative)
        return self._read[texts, negative]

    def words(self, rows: Sequence[int]) -> list[str]:
        """Return a text for each of these pictures, "" for none: embeddings have some text."""
        return [self.texts[row] if self.embedded is None else next(iter(EMBEDDINGS)) for row in rows]


def texts_of(value: Any, name: str = "prompt") -> list[str]:
    """Return one text or several as a list; None is an empty one. Raises UserError for what is no text."""
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


def embeddings_of(given: dict[str, Any], text: Any, negative: bool = False) -> Bundle | None:
    """Return the embeddings among a call's arguments `given` (see EMBEDDINGS); None without.

    Raises UserError for embeddings beside a text, for a part of them alone, and for what are no tensors of finite
    numbers.
    """
    before = "negative_" if negative else ""
    found = {name: given.get(before + name) for name in EMBEDDINGS}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        return None
    if "prompt_embeds" not in found:
        raise UserError(f"{before}{next(iter(found))}: without {before}prompt_embeds: pass both")
    if any(texts_of(text, f"{before}prompt")):
        raise UserError(f"{before}prompt and {before}prompt_embeds: both say what to make: pass one")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim < 2:
            raise UserError(
                f"{before}{name}: not a tensor with a row for each picture: pass what encode_prompt returns"
            )
        if EMBEDDINGS[name] != "mask":
            require_values(before + name, value)
    if len({len(value) for value in found.values()}) != 1:
        raise UserError(f"{before}prompt_embeds: its parts are for different numbers of pictures: pass as many of each")
    return {EMBEDDINGS[name]: value for name, value in found.items()}


def require_complete(bundle: Bundle | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for embeddings of another width than the network's, or without the pooled ones that it needs;
    `shapes` are those of `Family.condition_shapes`."""
    if bundle is None:
        return
    wide, wants = bundle[FEATURES].shape[-1], shapes[FEATURES][-1]
    if bundle[FEATURES].ndim != 3 or wide != wants:
        raise UserError(f"prompt_embeds of shape {tuple(bundle[FEATURES].shape)}: this model reads (B, L, {wants}): "
                        "pass what its encode_prompt returns")  # fmt: skip
    if ("pooled" in shapes or "text_embeds" in shapes) and "pooled" not in bundle:
        raise UserError("pooled_prompt_embeds: missing, and this model reads them: pass what encode_prompt returns")


def repeated(rows: Any, each: int) -> Any:
    """Return each row of a list or a tensor `each` times, one after the other; None stays None."""
    if rows is None or each == 1:
        return rows
    if isinstance(rows, Tensor):
        return rows.repeat_interleave(each, dim=0)
    return [row for row in rows for _ in range(each)]


def placed(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Bundle:
    """Return embeddings on a device, floating ones in this dtype."""
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in bundle.items()}
