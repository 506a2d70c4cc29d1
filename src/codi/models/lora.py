"""Low-rank updates of a frozen U-Net (LoRA, Hu et al., ICLR 2022), by peft and in diffusers' own file format.

The backbone is never touched: updates live in a light copy that shares all of its weights, so that any number of
adapters stand side by side on one backbone and changing over is a matter of choosing the copy.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: unet.load_lora_adapter reads it without codi
# Attention, feed-forward and residual convolutions; a pattern, because peft stores a list in random order.
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2)"


def shared_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net of its own modules with the very parameters of `unet`."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def add_lora(unet: UNet2DConditionModel, rank: int, name: str, seed: int = 0) -> UNet2DConditionModel:
    """A shared copy of `unet` with fresh updates W + B A of `rank`; B = 0, so that nothing changes before training."""
    adapted = shared_copy(unet)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=name)
    return adapted


def load_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> UNet2DConditionModel:
    """A shared copy of `unet` with the updates in `folder`/FILE under this name.

    Raises ValueError for a file in which an update has only one of its two factors.
    """
    with safe_open(folder / FILE, "pt") as file:
        keys = set(file.keys())
    for key in keys:
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        if other not in keys:
            raise ValueError(f"weight {other!r} is missing")
    adapted = shared_copy(unet)
    here: dict[str, Any] = {"weight_name": FILE, "use_safetensors": True, "local_files_only": True, "prefix": None}
    with _quiet():
        adapted.load_lora_adapter(folder, adapter_name=name, **here)
    return adapted.requires_grad_(False)


def join_lora(unet: UNet2DConditionModel, others: Mapping[str, UNet2DConditionModel]) -> UNet2DConditionModel:
    """A shared copy of `unet` with the updates of `others` under the names given; those without any add none."""
    adapted = shared_copy(unet)
    with _quiet():
        for name, other in others.items():
            for own in lora_names(other):
                state: Any = get_peft_model_state_dict(other, adapter_name=own)
                notes = other.peft_config[own].to_dict()  # type: ignore[union-attr, operator]
                adapted.load_lora_adapter(state, adapter_name=name, prefix=None, metadata=notes)  # type: ignore[arg-type]
    return adapted.requires_grad_(False)


def save_lora(unet: UNet2DConditionModel, folder: Path, name: str, half: bool = False) -> None:
    """Writes the updates called `name` to `folder`/FILE, in float16 with `half`."""
    with _quiet():
        unet.save_lora_adapter(folder, adapter_name=name, weight_name=FILE, safe_serialization=True)
    with safe_open(folder / FILE, "pt") as file:
        notes = file.metadata()
    # One note alone: safetensors writes several in random order, and the same weights shall give the same bytes.
    del notes["format"]
    weights = load_file(folder / FILE)
    weights = {k: v.to(torch.float16 if half else v.dtype, copy=True) for k, v in weights.items()}
    save_file(weights, folder / FILE, notes)


def merge_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A shared copy of `unet` without updates that computes the same: W + weight B A, at the weights that are set, in
    place of W. The layers updated have weights of their own, all others share those of `unet`."""
    merged = shared_copy(unet)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            plain: Any = copy.deepcopy(layer.get_base_layer())
            for update in layer.active_adapters:
                plain.weight.data += layer.get_delta_weight(update)  # type: ignore[operator]
            merged.set_submodule(name, plain)
    if lora_names(merged):
        del merged.peft_config
        merged._hf_peft_config_loaded = False
    return merged


def lora_names(unet: UNet2DConditionModel) -> list[str]:
    """The updates that `unet` carries."""
    return list(getattr(unet, "peft_config", {}))


def scale_lora(unet: UNet2DConditionModel, weights: dict[str, float]) -> None:
    """Sets the weight of each update of `unet`; 0 is exactly the backbone. Names that it does not carry are ignored."""
    mine = {name: weight for name, weight in weights.items() if name in lora_names(unet)}
    if mine and getattr(unet, "_codi_lora_weights", None) != mine:
        trained = [p.requires_grad for p in unet.parameters()]
        # unet.set_adapters does the same, but fails on a U-Net with as many layers as each level wants.
        set_weights_and_activate_adapters(unet, list(mine), [float(w) for w in mine.values()])
        for parameter, trains in zip(unet.parameters(), trained, strict=True):
            parameter.requires_grad_(trains)  # which peft would switch on
        unet._codi_lora_weights = mine  # type: ignore[assignment] # walking all layers at each step would cost time


@contextmanager
def _quiet() -> Iterator[None]:
    """peft and diffusers list all weights of the other updates as missing, warn that there are several, and when saving
    of layers to be kept in float32, of which there are none."""
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("loaders.peft", "models.modeling_utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
