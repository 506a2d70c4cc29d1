"""Single arguments of a call: numbers, callbacks, and those that stock pipelines of diffusers alone take."""

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

# What to use in place of arguments that stock pipelines take and ours does not.
INSTEAD = {
    **dict.fromkeys(("timesteps", "sigmas"), "the times are the adapter's own: use num_inference_steps"),
    **dict.fromkeys(("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
                    "all text encoders read the one prompt: leave it out"),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds", "control_image"),
                    "pictures are for adapters of ours: use image"),
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
    """Return a whole number of any type as an int. Raises TypeError for anything else, and for True and False."""
    if isinstance(value, bool):
        raise TypeError("a truth value")
    return operator.index(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number from `least` up. Raises UserError for anything else."""
    try:
        number = exact_index(value)
    except TypeError as error:
        raise UserError(f"{name} {one_line(repr(value))}: not a whole number: use one from {least} up") from error
    if not least <= number < 2**31:
        raise UserError(f"{name} {number}: out of range: use a whole number from {least} up, below 2**31")
    return number


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Return whether this is a finite real number from `least` up; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) and float(value) >= least


def require_values(name: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor that is empty, of whole numbers, without values (meta, sparse) or not finite."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        kind = f"{'meta' if tensor.is_meta else tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        raise UserError(f"{name}: a {kind}: pass a dense one of floating-point numbers")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{name}: holds NaN or infinite numbers: pass finite ones")


def require_possible(steps: int, most: int, strength: Any, embedded_guidance: Any, output_type: Any) -> None:
    """Raise UserError for what no call can have: steps out of 1 to `most`, a strength or guidance that is no number
    from 0 up, or an unknown kind of output."""
    if steps > most:
        raise UserError(f"steps {steps}: must lie between 1 and {most}: use 1 to 4 with an adapter")
    if not is_number(strength, 0):
        raise UserError(f"strength {one_line(repr(strength))}: not an influence: use 0 (none) to 1 (as trained)")
    if embedded_guidance is not None and not is_number(embedded_guidance, 0):
        raise UserError(f"embedded_guidance {one_line(repr(embedded_guidance))}: not a guidance scale: "
                        "use a number from 0 up")  # fmt: skip
    if not isinstance(output_type, str) or output_type not in OUTPUTS:
        raise UserError(f"output_type {one_line(repr(output_type))}: not known: use {', '.join(OUTPUTS)}")


def require_callback(callback: Any, wanted: Any) -> tuple[str, ...]:
    """Return the names of the tensors that a callback is given, by default the latents.

    Raises UserError for a callback that cannot be called, and for a tensor that there is not.
    """
    if callback is not None and not callable(callback):
        raise UserError(f"callback_on_step_end: {type(callback).__name__} is no function: "
                        "pass one of (pipe, step, timestep, tensors)")  # fmt: skip
    wanted = getattr(callback, "tensor_inputs", wanted)  # of diffusers' own callbacks
    names = CALLBACK_TENSORS[:1] if wanted is None else wanted
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)):
        names = [wanted]
    if unknown := [name for name in names if not isinstance(name, str) or name not in CALLBACK_TENSORS]:
        raise UserError(f"callback_on_step_end_tensor_inputs {one_line(repr(unknown[0]))}: not known: "
                        f"pass a list of {', '.join(CALLBACK_TENSORS)}")  # fmt: skip
    return tuple(names)


def replaced_latents(result: Any, z: Tensor) -> Tensor | None:
    """Return the latents that a callback wants in place of `z`, None to go on. Raises UserError for another result than
    None or a dict, and for latents of another shape."""
    if result is not None and not isinstance(result, Mapping):
        raise UserError(f"callback_on_step_end: returned {type(result).__name__}: return a dict of tensors, or None")
    latents = (result or {}).get("latents")
    if latents is not None and (not isinstance(latents, Tensor) or latents.shape != z.shape):
        raise UserError(f"callback_on_step_end: returned latents that are no tensor of {tuple(z.shape)}: "
                        "return what it was given, changed in value alone")  # fmt: skip
    return latents


def lora_scale_of(**attention: Any) -> float:
    """Return the `scale` in cross_attention_kwargs or joint_attention_kwargs, by which LoRAs of the backbone are
    weakened. Raises UserError for anything else in them: adapters walk through the network, whose blocks are given
    nothing more."""
    scale: Any = 1.0
    for argument, values in attention.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{argument}: {type(values).__name__} is no dict: pass {{'scale': 0.5}}, or leave it out")
        if unknown := [name for name in values if name != "scale"]:
            raise UserError(f"{argument} {unknown[0]!r}: not supported: use scale, of LoRAs that are loaded")
        scale = values.get("scale", scale)
        if not is_number(scale):
            raise UserError(f"{argument}: scale {one_line(repr(scale))}: not a number: use 0 (none) to 1 (as stored)")
    return float(scale)


def require_neutral(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for further arguments of a call, but for those of the backbone's stock pipelines with a value
    that changes nothing: None, or the default there."""
    if not arguments:
        return
    neutral: dict[str, list[Any]] = {}
    for pipeline in pipe.kind.pipelines:
        for name, parameter in inspect.signature(stock(pipeline).__call__).parameters.items():
            neutral.setdefault(name, []).append(parameter.default)
    neutral["true_cfg_scale"] = [1]  # ours is guidance_scale, whatever the default there
    neutral.setdefault("max_sequence_length", []).extend(limit for _, limit in pipe.text.limits)
    for name, value in arguments.items():
        if name not in neutral and name not in INSTEAD:
            own = inspect.signature(type(pipe).__call__).parameters
            raise UserError(f"{name}: no argument of a call{nearest(name, own)}: help(codi.CoDiPipeline) lists them")
        simple = isinstance(value, (bool, int, float, str, tuple, list))  # which can be compared
        if value is not None and not (simple and value in neutral.get(name, [])):
            shown = f"{name} {one_line(repr(value), 60)}" if simple else name
            raise UserError(f"{shown}: not taken here: {INSTEAD.get(name, 'leave it out')}")
