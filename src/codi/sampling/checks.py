"""Validation of single arguments of a call: numbers, callbacks, and those of diffusers' stock pipelines."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest, one_line
from ..models.backbones.stock import stock

OUTPUTS = ("pil", "np", "pt", "latent", "bands")
CALLBACK_TENSORS = ("latents", "denoised")
Callback = Callable[..., Mapping[str, Any] | None]

# Arguments of stock pipelines that ours does not take, and what to use in their place.
REPLACEMENTS = {
    **dict.fromkeys(("timesteps", "sigmas"), "the adapter sets the times: use num_inference_steps"),
    **dict.fromkeys(("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
                    "all text encoders read the same prompt: leave it out"),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds", "control_image"),
                    "only codi adapters take images: use image"),
    **dict.fromkeys(("callback", "callback_steps"), "use callback_on_step_end"),
    **dict.fromkeys(("padding_mask_crop", "masked_image_latents"), "use image and mask_image alone"),
    "attention_kwargs": "use joint_attention_kwargs",
    "controlnet_conditioning_scale": "use strength",
    "max_sequence_length": "the model reads as many tokens as it was trained with: leave it out",
    "negative_prompt_embeds_mask": "use negative_prompt_attention_mask",
    "prompt_embeds_mask": "use prompt_attention_mask",
    "true_cfg_scale": "use guidance_scale",
}  # fmt: skip


def exact_index(value: Any) -> int:
    """Return an integer of any type as an int. Raises TypeError for anything else, including True and False."""
    if isinstance(value, bool):
        raise TypeError("a truth value")
    return operator.index(value)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int of at least `least`. Raises UserError for anything else."""
    try:
        number = exact_index(value)
    except TypeError as error:
        raise UserError(f"{name} {one_line(repr(value))}: not a whole number: use one from {least} up") from error
    if not least <= number < 2**31:
        raise UserError(f"{name} {number}: out of range: use a whole number from {least} up, below 2**31")
    return number


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Return whether `value` is a finite real number of at least `least`, and not a bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) and float(value) >= least


def require_values(name: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor that is empty, of integers, meta, sparse, or not finite."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        kind = f"{'meta' if tensor.is_meta else tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        raise UserError(f"{name}: a {kind}: pass a dense one of floating-point numbers")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{name}: holds NaN or infinite numbers: pass finite ones")


def require_in_range(steps: int, most: int, strength: Any, embedded_guidance: Any, output_type: Any) -> None:
    """Raise UserError for more than `most` steps, a strength or guidance that is no number from 0 up, or an unknown
    output type."""
    if steps > most:
        raise UserError(f"steps {steps}: must lie between 1 and {most}: use 1 to 4 with an adapter")
    if not is_number(strength, 0):
        raise UserError(f"strength {one_line(repr(strength))}: not a strength: use 0 (none) to 1 (as trained)")
    if embedded_guidance is not None and not is_number(embedded_guidance, 0):
        raise UserError(f"embedded_guidance {one_line(repr(embedded_guidance))}: not a guidance scale: "
                        "use a number from 0 up")  # fmt: skip
    if not isinstance(output_type, str) or output_type not in OUTPUTS:
        raise UserError(f"output_type {one_line(repr(output_type))}: not known: use {', '.join(OUTPUTS)}")


def require_callback(callback: Any, tensor_names: Any) -> tuple[str, ...]:
    """Return the names of the tensors passed to a callback, by default the latents.

    Raises UserError for a callback that is not callable, and for an unknown tensor name.
    """
    if callback is not None and not callable(callback):
        raise UserError(f"callback_on_step_end: {type(callback).__name__} is no function: "
                        "pass one of (pipe, step, timestep, tensors)")  # fmt: skip
    tensor_names = getattr(callback, "tensor_inputs", tensor_names)  # diffusers' callback classes list their own
    names = CALLBACK_TENSORS[:1] if tensor_names is None else tensor_names
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)):
        names = [tensor_names]
    if unknown := [name for name in names if not isinstance(name, str) or name not in CALLBACK_TENSORS]:
        raise UserError(f"callback_on_step_end_tensor_inputs {one_line(repr(unknown[0]))}: not known: "
                        f"pass a list of {', '.join(CALLBACK_TENSORS)}")  # fmt: skip
    return tuple(names)


def replaced_latents(result: Any, z: Tensor) -> Tensor | None:
    """Return the latents that a callback returned to replace `z`; None if there are none.

    Raises UserError for a result other than None or a dict, and for latents of another shape.
    """
    if result is not None and not isinstance(result, Mapping):
        raise UserError(f"callback_on_step_end: returned {type(result).__name__}: return a dict of tensors, or None")
    latents = (result or {}).get("latents")
    if latents is not None and (not isinstance(latents, Tensor) or latents.shape != z.shape):
        raise UserError(f"callback_on_step_end: returned latents that are no tensor of {tuple(z.shape)}: "
                        "return them in the shape that it receives")  # fmt: skip
    return latents


def lora_scale_of(**attention: Any) -> float:
    """Return the `scale` in cross_attention_kwargs or joint_attention_kwargs: the strength of the backbone's LoRAs.

    Raises UserError for anything else in them: adapters call the network's blocks one by one and pass nothing more.
    """
    scale: Any = 1.0
    for argument, values in attention.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{argument}: {type(values).__name__} is no dict: pass {{'scale': 0.5}}, or leave it out")
        if unknown := [name for name in values if name != "scale"]:
            raise UserError(f"{argument} {unknown[0]!r}: not supported: only scale is, for the loaded LoRAs")
        scale = values.get("scale", scale)
        if not is_number(scale):
            raise UserError(f"{argument}: scale {one_line(repr(scale))}: not a number: use 0 (none) to 1 (as stored)")
    return float(scale)


def reject_unsupported(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for extra arguments of a call, except those of the backbone's stock pipelines with a value that
    changes nothing: None, or the default there."""
    if not arguments:
        return
    no_effect: dict[str, list[Any]] = {}
    for pipeline in pipe.kind.pipelines:
        for name, parameter in inspect.signature(stock(pipeline).__call__).parameters.items():
            no_effect.setdefault(name, []).append(parameter.default)
    no_effect["true_cfg_scale"] = [1]  # replaced by guidance_scale, so the stock default is irrelevant
    no_effect.setdefault("max_sequence_length", []).extend(limit for _, limit in pipe.text.limits)
    for name, value in arguments.items():
        if name not in no_effect and name not in REPLACEMENTS:
            own = inspect.signature(type(pipe).__call__).parameters
            raise UserError(f"{name}: no argument of a call{nearest(name, own)}: help(codi.CoDiPipeline) lists them")
        simple = isinstance(value, (bool, int, float, str, tuple, list))  # comparable by ==, unlike tensors
        if value is not None and not (simple and value in no_effect.get(name, [])):
            shown = f"{name} {one_line(repr(value), 60)}" if simple else name
            raise UserError(f"{shown}: not taken here: {REPLACEMENTS.get(name, 'leave it out')}")
