"""Low-rank updates of a frozen network (LoRA, Hu et al., ICLR 2022), by peft and in diffusers' own file format.

The backbone is never touched: updates live in a light copy that shares all of its weights, so that any number of
adapters stand side by side on one backbone and changing over is a matter of choosing the copy.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .backbones import family_of

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: a stock pipeline's load_lora_weights reads it
NOTE = "lora_adapter_metadata"  # where diffusers keeps the ranks and scales
_NO_LORAS: dict[str, float] = {}  # one object: a change of LoRAs is noticed by identity


def shared_copy(network: Any) -> Any:
    """Return a network of its own modules with the very parameters of `network`, without accelerate's hooks."""
    hooks = [part._hf_hook for part in network.modules() if hasattr(part, "_hf_hook")]
    # Hooks know other models, which are not to be copied along.
    copied = copy.deepcopy(network, {id(kept): kept for kept in (*network.parameters(), *hooks)})
    return remove_hook_from_module(copied, recurse=True) if hooks else copied


def add_lora(network: Any, rank: int, name: str, seed: int = 0) -> Any:
    """A shared copy of `network` with fresh updates W + B A of `rank`; B = 0: nothing changes before training."""
    adapted = shared_copy(network)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        targets = family_of(network).lora_targets
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=name)
    return adapted


def load_lora(network: Any, folder: Path, name: str) -> Any:
    """A shared copy of `network` with the updates in `folder`/FILE under this name.

    Raises ValueError for a file in which an update has only one of its two factors.
    """
    with safe_open(folder / FILE, "pt") as file:
        keys = set(file.keys())
    for key in keys:
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        if other not in keys:
            raise ValueError(f"weight {other!r} is missing")
    adapted = shared_copy(network)
    # Keys begin with the pipeline's name of the network, without which stock pipelines load nothing. Old files lack it.
    prefix = family_of(network).component
    prefix = prefix if all(key.startswith(f"{prefix}.") for key in keys) else None
    here: dict[str, Any] = {"weight_name": FILE, "use_safetensors": True, "local_files_only": True, "prefix": prefix}
    with _quiet():
        adapted.load_lora_adapter(folder, adapter_name=name, **here)
    return adapted.requires_grad_(False)


def join_lora(network: Any, others: Mapping[str, Any]) -> Any:
    """A shared copy of `network` with the updates of `others` under the names given; those without any add none."""
    adapted = shared_copy(network)
    with _quiet():
        for name, other in others.items():
            for own in set(lora_names(other)) - set(stock_loras(other)):
                state: Any = get_peft_model_state_dict(other, adapter_name=own)
                notes = other.peft_config[own].to_dict()  # type: ignore[union-attr, operator]
                adapted.load_lora_adapter(state, adapter_name=name, prefix=None, metadata=notes)  # type: ignore[arg-type]
    return adapted.requires_grad_(False)


def save_lora(network: Any, folder: Path, name: str, half: bool = False) -> None:
    """Writes the updates called `name` to `folder`/FILE, in float16 with `half`."""
    with _quiet():
        network.save_lora_adapter(folder, adapter_name=name, weight_name=FILE, safe_serialization=True)
    add_prefix(folder / FILE, family_of(network).component, half)


def add_prefix(path: Path, part: str, half: bool = False) -> None:
    """Rewrite a file of updates with `part`, a stock pipeline's name of the network, before each key, in float16 with
    `half`. Without it a stock pipeline loads nothing, and says nothing. A file that has it stays as it is."""
    with safe_open(path, "pt") as file:
        keys, note = list(file.keys()), (file.metadata() or {}).get(NOTE)
    if all(key.startswith(f"{part}.") for key in keys):
        return
    # One note alone: safetensors writes several in random order, and the same weights shall give the same bytes.
    settings = {f"{part}.{k}": v for k, v in json.loads(note).items()} if note else {}
    notes = {NOTE: json.dumps(settings, sort_keys=True)} if note else None
    weights = load_file(path)
    weights = {f"{part}.{k}": v.to(torch.float16 if half else v.dtype, copy=True) for k, v in weights.items()}
    save_file(weights, path, notes)


def merge_lora(network: Any) -> Any:
    """Return a shared copy of `network` without updates that computes the same: W + weight B A, at the weights that are
    set, in place of W. The layers updated have weights of their own, all others share those of `network`."""

    def merged(layer: Any) -> Any:
        layer = copy.deepcopy(layer)
        layer.merge()  # of the updates that are active those that this layer has
        return layer.get_base_layer()

    return _replaced(network, merged)


def without_lora(network: Any) -> Any:
    """Return a shared copy of `network`, also of a text encoder, without any updates."""
    return _replaced(network, lambda layer: layer.get_base_layer())


def _replaced(network: Any, plain: Callable[[Any], Any]) -> Any:
    """Return a shared copy of `network` with `plain` of each layer that has updates in its place."""
    copied = shared_copy(network)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            copied.set_submodule(name, plain(layer))
    if lora_names(copied):
        del copied.peft_config
        copied._hf_peft_config_loaded = False
    return copied


def lora_names(network: Any) -> list[str]:
    """The updates that `network` carries."""
    return list(getattr(network, "peft_config", {}))


def stock_loras(network: Any) -> dict[str, float]:
    """Return the LoRAs of other programs that a user has loaded onto the backbone, with their weights."""
    return getattr(network, "_codi_stock_loras", _NO_LORAS)


def set_stock_loras(network: Any, weights: dict[str, float]) -> None:
    """Note the LoRAs of other programs that `network` carries, and give them these weights."""
    network._codi_stock_loras = weights
    network._codi_lora_weights = None  # scale_lora then sets the updates of adapters again
    if carried := [name for name in weights if name in lora_names(network)]:
        set_weights_and_activate_adapters(network, carried, [weights[name] for name in carried])


def scale_lora(network: Any, weights: dict[str, float]) -> None:
    """Sets the weight of each update of `network`; 0 is exactly the backbone. Names it does not carry are ignored."""
    stock = stock_loras(network)  # which stay as a user has set them
    mine = {name: weight for name, weight in weights.items() if name in lora_names(network) and name not in stock}
    mine = {**stock, **mine} if mine else {}
    if mine and getattr(network, "_codi_lora_weights", None) != mine:
        trained = [p.requires_grad for p in network.parameters()]
        # network.set_adapters does the same, but fails on a U-Net with as many layers as each level wants.
        set_weights_and_activate_adapters(network, list(mine), [float(w) for w in mine.values()])
        for parameter, trains in zip(network.parameters(), trained, strict=True):
            parameter.requires_grad_(trains)  # which peft would switch on
        network._codi_lora_weights = mine  # type: ignore[assignment] # walking all layers at each step would cost time


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
