"""How strongly a picture follows its prompt: from what a caller asks for to what the adapters that are set can do."""

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
    """Scales by name, 1 = none. `distilled`: they are an input of the network, one column each, and cost nothing;
    otherwise there is "text" alone, by classifier-free guidance in a second forward pass."""

    scales: dict[str, float]
    distilled: bool

    def columns(self, prompts: Sequence[str]) -> Tensor | None:
        """What Conditioning.guidance takes for these prompts, (B, k); None where nothing is distilled. Away from no
        prompt, towards no prompt, there is nowhere to go: the scale of the text is 1 where the prompt is empty."""
        if not self.distilled:
            return None
        rows = torch.tensor([list(self.scales.values())]).repeat(len(prompts), 1)
        rows[[not prompt for prompt in prompts], 0] = 1.0
        return rows

    @property
    def second_pass(self) -> float:
        """The scale of classifier-free guidance; 1 where one pass will do."""
        return 1.0 if self.distilled else self.scales["text"]


def require_info(info: Any, source: str) -> dict[str, Any]:
    """Return what an adapter says of itself. Raises UserError where what sampling reads of it is of a wrong type."""

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
        raise UserError(f"{source}: info is no table: train or fetch the adapter again")
    for key, (right, what) in checks.items():
        if info.get(key) is not None and not right(info[key]):
            raise UserError(f"{source}: info.{key} {info[key]!r}: not {what}: train or fetch the adapter again")
    return info


def resolve(text: float | None, image: float | None, infos: Sequence[dict[str, Any]]) -> Guidance:
    """Guidance for the scales asked for, None = the default of the first of `infos` (adapters') that has one.

    Distilled scales other than 1 are kept within the range that was learnt, with a warning. Raises UserError for a
    scale that is no number from 0 up, and for an image scale that no adapter has learnt.
    """
    asked = {"guidance_scale": text, "image_guidance_scale": image}
    for name, scale in asked.items():
        if scale is not None and not is_number(scale, 0):
            raise UserError(f"{name} {one_line(repr(scale))}: not a guidance scale: use a number from 0 up, 1 is none")
    ranges: dict[str, Sequence[float]] = {}
    for info in infos:
        ranges = {**(info.get("guidance") or {}), **ranges}
    if image not in (None, 1) and "image" not in ranges:
        raise UserError(f"image_guidance_scale {image:g}: no adapter set has learnt it: leave it out, "
                        "or distil an adapter of task edit with it")  # fmt: skip
    wanted = {}
    for key, (name, scale) in zip(("text", "image"), asked.items(), strict=True):
        # Adapters without guidance say 1, which is no opinion where another has one.
        able = [info for info in infos if key in (info.get("guidance") or {})] or infos
        default = next((info[name] for info in able if info.get(name)), 1.0)
        wanted[key] = float(default if scale is None else scale)
    if not ranges:
        return Guidance({"text": wanted["text"]}, distilled=False)
    scales = {}
    for key in ("text", "image")[: 2 if "image" in ranges else 1]:
        low, high = ranges.get(key, (1, 1))
        # 1 is none in any range: the input that stands for it is 0, whatever was learnt.
        scales[key] = 1.0 if wanted[key] == 1 else min(max(wanted[key], float(low)), float(high))
        if scales[key] != wanted[key]:
            warnings.warn(f"guidance of the {key} {wanted[key]:g}: {low:g} to {high:g} is distilled into this adapter: "
                          f"using {scales[key]:g}", stacklevel=3)  # fmt: skip
    return Guidance(scales, distilled=True)
