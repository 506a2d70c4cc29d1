"""Low-rank updates of a frozen network (LoRA, Hu et al., ICLR 2022), by peft and in diffusers' own file format.

The backbone is never changed: updates are added to a copy of it that shares all of its weights. So any number of
adapters can be loaded on one backbone, and switching between them means using another copy.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..errors import UserError
from .backbones import family_of

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: a stock pipeline's load_lora_weights reads it
NOTE = "lora_adapter_metadata"  # where diffusers keeps the ranks and scales


def shared_copy(network: Any) -> Any:
    """Return a copy of `network` with new modules that share its parameters, without accelerate's hooks."""
    hooks = [part._hf_hook for part in network.modules() if hasattr(part, "_hf_hook")]
    # Hooks refer to other models, which must not be copied.
    copied = copy.deepcopy(network, {id(shared): shared for shared in (*network.parameters(), *hooks)})
    return remove_hook_from_module(copied, recurse=True) if hooks else copied


def add_lora(network: Any, rank: int, name: str, seed: int = 0) -> Any:
    """Return a shared copy of `network` with new updates W + B A of `rank`; B = 0, so the output is unchanged before
    training."""
    adapted = shared_copy(network)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        targets = family_of(network).lora_targets
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=name)
    return _activate_updates(adapted, network, [name])


def load_lora(network: Any, folder: Path, name: str) -> Any:
    """Return a shared copy of `network` with the updates in `folder`/FILE under this name.

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
    options: dict[str, Any] = {"weight_name": FILE, "use_safetensors": True, "local_files_only": True, "prefix": prefix}
    with _quiet():
        adapted.load_lora_adapter(folder, adapter_name=name, **options)
    return _activate_updates(adapted, network, [name]).requires_grad_(False)


def join_lora(network: Any, others: Mapping[str, Any]) -> Any:
    """Return a shared copy of `network` with the updates of each network of `others` under its key; networks without
    updates add none."""
    adapted = shared_copy(network)
    with _quiet():
        for name, other in others.items():
            for own in update_names(other):
                state: Any = get_peft_model_state_dict(other, adapter_name=own)
                metadata = other.peft_config[own].to_dict()  # type: ignore[union-attr, operator]
                adapted.load_lora_adapter(state, adapter_name=name, prefix=None, metadata=metadata)  # type: ignore[arg-type]
    return _activate_updates(adapted, network, list(others)).requires_grad_(False)


def save_lora(network: Any, folder: Path, name: str, half: bool = False) -> None:
    """Write the updates called `name` to `folder`/FILE, in float16 with `half`."""
    with _quiet():
        network.save_lora_adapter(folder, adapter_name=name, weight_name=FILE, safe_serialization=True)
    add_prefix(folder / FILE, family_of(network).component, half)


def add_prefix(path: Path, part: str, half: bool = False) -> None:
    """Prefix each key of a file of updates with `part`, a stock pipeline's name of the network; store float16 with
    `half`. Without the prefix a stock pipeline silently loads nothing. A file that has it is left unchanged."""
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), (file.metadata() or {}).get(NOTE)
    if all(key.startswith(f"{part}.") for key in keys):
        return
    # Only one metadata entry: safetensors writes several in random order, and equal weights must give equal bytes.
    settings = {f"{part}.{k}": v for k, v in json.loads(metadata).items()} if metadata else {}
    new_metadata = {NOTE: json.dumps(settings, sort_keys=True)} if metadata else None
    weights, mode = load_file(path), path.stat().st_mode
    weights = {f"{part}.{k}": v.to(torch.float16 if half else v.dtype, copy=True) for k, v in weights.items()}
    save_file(weights, path, new_metadata)
    path.chmod(mode)  # safetensors makes files readable by their owner only


def merge_lora(network: Any) -> Any:
    """Return a shared copy of `network` that has its updates merged into the weights: W + weight B A, at the current
    weights of the updates, in place of W. Merged layers have weights of their own; all others share those of
    `network`."""

    def merge(layer: Any) -> Any:
        layer = copy.deepcopy(layer)
        layer.merge()  # merges the active updates of this layer
        return layer.get_base_layer()

    return _replace_updated_layers(network, merge)


def without_lora(network: Any) -> Any:
    """Return a shared copy of `network`, which may be a text encoder, without any updates."""
    return _replace_updated_layers(network, lambda layer: layer.get_base_layer())


def _replace_updated_layers(network: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a shared copy of `network` in which each layer that has updates is replaced by `convert(layer)`."""
    copied = shared_copy(network)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            copied.set_submodule(name, convert(layer))
    if lora_names(copied):
        del copied.peft_config
        copied._hf_peft_config_loaded = False
    return copied


def _activate_updates(adapted: Any, network: Any, names: Sequence[str]) -> Any:
    """Activate the updates `names` of `adapted`, a copy of `network`, beside the backbone's LoRAs; return `adapted`."""
    adapted._codi_updates = tuple(names)
    copy_lora_scales(adapted, network)
    return adapted


def lora_names(network: Any) -> list[str]:
    """Return the names of all low-rank updates of `network`: those of adapters and users' LoRAs."""
    return list(getattr(network, "peft_config", {}))


def update_names(network: Any) -> list[str]:
    """Return the names of the updates that belong to adapters. All others are LoRAs loaded by users; a backbone and
    text encoders have only those."""
    return [name for name in lora_names(network) if name in getattr(network, "_codi_updates", ())]


def scale_lora(network: Any, weights: dict[str, float]) -> None:
    """Set the weight of each update of `network`; 0 is exactly the backbone. Unknown names are ignored."""
    known = {name: float(weight) for name, weight in weights.items() if name in update_names(network)}
    if known and getattr(network, "_codi_lora_weights", None) != known:
        for _, layer in _lora_layers(network):
            for name, weight in known.items():
                layer.set_scale(name, weight)
        network._codi_lora_weights = known  # type: ignore[assignment] # avoids visiting all layers at each step


# ---- LoRAs that users load onto a backbone and its text encoders. Their state is read from peft's layers each time,
# because stock pipelines that share the modules also change it.


def lora_state(network: Any) -> dict[tuple[str, str, int], float]:
    """Return {(layer, LoRA, id of its weights): scale} of a backbone's LoRAs; the scale of an inactive LoRA is 0.

    Raises UserError if a LoRA is fused into the weights, because then no adapter's updates would have an effect.
    """
    scales: dict[tuple[str, str, int], float] = {}
    for path, layer in _lora_layers(network):
        if layer.merged:
            raise UserError(f"LoRA {', '.join(layer.merged_adapters)}: is fused into the weights of a "
                            f"{type(network).__name__}: call unload_lora_weights() of the pipeline that fused it, "
                            "which leaves it in the weights, or unfuse_lora()")  # fmt: skip
        active = [] if layer.disable_adapters else layer.active_adapters
        for name, scale in layer.scaling.items():
            weights = next((part[name] for part in (layer.lora_A, layer.lora_embedding_A) if name in part), None)
            scales[path, name, id(weights)] = scale if name in active else 0.0
    return scales


def active_loras(network: Any) -> list[str]:
    """Return the names of the active LoRAs of a backbone or text encoder: those with a scale other than 0."""
    active = {name for (_, name, _), scale in lora_state(network).items() if scale}
    return [name for name in lora_names(network) if name in active]


def set_active_loras(network: Any, names: Sequence[str]) -> None:
    """Activate exactly these LoRAs, with their current weights."""
    for _, layer in _lora_layers(network):
        layer.enable_adapters(True)
        layer.set_adapter(list(names), inference_mode=True)


def set_lora_weights(network: Any, weights: Mapping[str, float]) -> None:
    """Activate exactly these LoRAs, with these weights."""
    set_active_loras(network, list(weights))
    for _, layer in _lora_layers(network):
        for name, weight in weights.items():
            layer.set_scale(name, weight)


def enable_loras(network: Any, enabled: bool) -> None:
    """Disable the active LoRAs, or enable them again; each keeps its weight."""
    for _, layer in _lora_layers(network):
        layer.enable_adapters(enabled)
        layer.requires_grad_(False)  # peft switches gradients on


def copy_lora_scales(adapted: Any, network: Any) -> None:
    """Copy the scales of the LoRAs of the backbone `network` to `adapted`, layer by layer, and activate all updates."""
    scales = {(path, name): scale for (path, name, _), scale in lora_state(network).items()}
    trained = [parameter.requires_grad for parameter in adapted.parameters()]
    set_active_loras(adapted, lora_names(adapted))
    for parameter, trains in zip(adapted.parameters(), trained, strict=True):
        parameter.requires_grad_(trains)
    for path, layer in _lora_layers(adapted):
        layer.scaling.update({name: scales[path, name] for name in layer.scaling if (path, name) in scales})


@contextmanager
def scaled_loras(network: Any, scale: float) -> Iterator[None]:
    """Within the context, multiply the scales of users' LoRAs on `network`, not those of adapters' updates."""
    names = [] if scale == 1 else [name for name in lora_names(network) if name not in update_names(network)]
    before = [(layer.scaling, {name: layer.scaling[name] for name in names if name in layer.scaling})
              for _, layer in _lora_layers(network) if names]  # fmt: skip
    for scaling, own in before:
        scaling.update({name: scale * value for name, value in own.items()})
    try:
        yield
    finally:
        for scaling, own in before:
            scaling.update(own)


def _lora_layers(network: Any) -> list[tuple[str, Any]]:
    """Return (path, layer) of the layers that have updates."""
    modules = network.named_modules() if lora_names(network) else ()
    return [(path, layer) for path, layer in modules if isinstance(layer, LoraLayer)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence unhelpful warnings of peft and diffusers: that the weights of all other updates are missing, that there
    are several updates and, when saving, of layers to be kept in float32, of which there are none."""
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
