"""Guidance scales: those a caller requests, limited to what the active adapters support."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_line
from .checks import is_number
from .sampler import SAMPLERS


@dataclass(frozen=True)
class Guidance:
    """Scales by name, 1 = no guidance. `distilled`: scales are inputs of the network, one column each, at no cost;
    otherwise only "text" exists, as classifier-free guidance in a second forward pass."""

    scales: dict[str, float]
    distilled: bool

    def columns(self, prompts: Sequence[str]) -> Tensor | None:
        """Return Conditioning.guidance for these prompts, (B, k); None without distilled guidance.

        The text scale of an empty prompt is 1: guidance from the empty prompt to itself has no direction.
        """
        if not self.distilled:
            return None
        rows = torch.tensor([list(self.scales.values())]).repeat(len(prompts), 1)
        rows[[not prompt for prompt in prompts], 0] = 1.0
        return rows

    @property
    def second_pass(self) -> float:
        """Scale of classifier-free guidance; 1 if a single pass suffices."""
        return 1.0 if self.distilled else self.scales["text"]


def require_info(info: Any, source: str) -> dict[str, Any]:
    """Return an adapter's info unchanged. Raises UserError if a key that sampling reads has a wrong type."""

    def ranges(value: Any) -> bool:
        pairs: Any = value.values() if isinstance(value, dict) and set(value) <= {"text", "image"} else [None]
        lists = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
        return lists and all(is_number(low) and is_number(high) and low <= high for low, high in pairs)

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "guidance": (ranges, "ranges such as {'text': [1, 5]}"),
        "task_options": (lambda value: isinstance(value, dict), "options by name"),
        **dict.fromkeys(("guidance_scale", "image_guidance_scale"), (is_number, "a number")),
        **dict.fromkeys(("embedded_guidance", "shift"), (is_number, "a number")),
        **dict.fromkeys(("task", "family", "colour"), (lambda value: isinstance(value, str), "a word")),
        "sampler": (lambda value: value in SAMPLERS, f"one of {', '.join(SAMPLERS)} (or codi is too old)"),
    }
    if not isinstance(info, dict):
        raise UserError(f"{source}: info is not a JSON object: train or fetch the adapter again")
    for key, (is_valid, expected) in checks.items():
        if info.get(key) is not None and not is_valid(info[key]):
            raise UserError(f"{source}: info.{key} {info[key]!r}: not {expected}: train or fetch the adapter again")
    return info


def resolve(text: float | None, image: float | None, infos: Sequence[dict[str, Any]]) -> Guidance:
    """Return the guidance for the requested scales; None means the first default among `infos` of the adapters.

    Distilled scales other than 1 are clamped to the learned range, with a warning. Raises UserError for a scale that is
    no number from 0 up, and for an image scale that no adapter has learned.
    """
    requested = {"guidance_scale": text, "image_guidance_scale": image}
    for name, scale in requested.items():
        if scale is not None and not is_number(scale, 0):
            raise UserError(f"{name} {one_line(repr(scale))}: not a guidance scale: use a number from 0 up, 1 is none")
    ranges: dict[str, Sequence[float]] = {}
    for info in infos:
        ranges = {**(info.get("guidance") or {}), **ranges}
    if image not in (None, 1) and "image" not in ranges:
        raise UserError(f"image_guidance_scale {image:g}: no active adapter has learned it: leave it out, "
                        "or distil an adapter of task edit with it")  # fmt: skip
    chosen = {}
    for key, (name, scale) in zip(("text", "image"), requested.items(), strict=True):
        # Adapters without distilled guidance store the default 1, which must not override another adapter's default.
        guided = [info for info in infos if key in (info.get("guidance") or {})] or infos
        default = next((info[name] for info in guided if info.get(name)), 1.0)
        chosen[key] = float(default if scale is None else scale)
    if not ranges:
        return Guidance({"text": chosen["text"]}, distilled=False)
    scales = {}
    for key in ("text", "image")[: 2 if "image" in ranges else 1]:
        low, high = ranges.get(key, (1, 1))
        # 1 means no guidance in any range: the network's input for it is 0, outside or inside the learned range.
        scales[key] = 1.0 if chosen[key] == 1 else min(max(chosen[key], float(low)), float(high))
        if scales[key] != chosen[key]:
            warnings.warn(f"guidance of the {key} {chosen[key]:g}: {low:g} to {high:g} is distilled into this adapter: "
                          f"using {scales[key]:g}", stacklevel=3)  # fmt: skip
    return Guidance(scales, distilled=True)
