"""Export for ComfyUI, AUTOMATIC1111 and stable-diffusion.cpp: weights by the names of the original LDM code.

PATH.safetensors         a ControlNet (`control_model.`); without one, the first of the following
PATH-unet.safetensors    the U-Net of a full adapter (`model.diffusion_model.`)
PATH-lora.safetensors    updates of the backbone, by the names of kohya's sd-scripts (`lora_unet_`)
PATH-comfyui.json        a ComfyUI workflow that samples with them
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import write_file, write_text
from ..models.lora import FILE
from .comfyui import workflow
from .source import WEIGHTS, Source

_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",  # of eight convolutions with SiLU between
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
HINT_CELL = 8  # pixels per latent cell: the original hint block halves the size three times


def export_ldm(source: Source, out: Path, steps: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the files, each atomically, in `dtype` (None: as the adapter is stored); return how to sample with them.
    Raises UserError for an adapter that these programs cannot load."""
    where = "the LDM format"
    source.require_format("ldm")
    source.refuse_form(where)
    source.require_stock_sampler(where)
    control, unet, updates = source.control, source.full_network(steps), source.updates(steps)
    if control is not None and (cell := control.config["downscale"]) != HINT_CELL:
        raise UserError(f"{source.name}: its ControlNet reads {cell} px per latent cell, the original one {HINT_CELL}: "
                        "export --to diffusers")  # fmt: skip
    schedule: Any = source.schedule(steps)
    settings = {  # metadata of the files
        "task": source.task.name,
        "family": source.backbone.family,
        "sampler": "lcm" if source.renoises else "ddim",
        "timesteps": source.timesteps(steps),
        "cfg": source.guidance.second_pass,
        "prediction": schedule.prediction,
        "zero_terminal_snr": bool(schedule.alphas[-1] == 0),
    }
    folder = source.loaded.folder

    def cast(weights: dict[str, Tensor], stored: Path) -> dict[str, Tensor]:
        return {key: value.to(dtype or source.stored_dtype(stored)) for key, value in weights.items()}

    files: dict[str, dict[str, Tensor]] = {}
    if control is not None:
        weights = cast(control.net.state_dict(), folder / WEIGHTS)
        files["control"] = rename(weights, control.net.config, "control_model.")
    if unet is not None:
        weights = cast(unet.state_dict(), folder / source.kind.component)
        files["unet"] = rename(weights, unet.config, "model.diffusion_model.")
    if updates:
        files["lora"] = kohya(cast(updates, folder / FILE))
    paths = {kind: out if not i else out.with_name(f"{out.stem}-{kind}.safetensors") for i, kind in enumerate(files)}
    nodes = workflow(source, steps, {kind: path.name for kind, path in paths.items()})
    # A single key: safetensors writes several in random order, but the same weights should give the same bytes.
    metadata = {"codi": json.dumps(settings)}
    for kind, weights in files.items():
        contiguous = {key: value.detach().contiguous() for key, value in weights.items()}
        write_file(paths[kind], functools.partial(save_file, contiguous, metadata=metadata))
    write_text(beside(out)[-1], json.dumps(nodes, indent=2) + "\n")
    return settings


def beside(out: Path) -> list[Path]:
    """Return all files that `export_ldm` may write for this path."""
    return [out.with_name(f"{out.stem}{ending}") for ending in
            (".safetensors", "-unet.safetensors", "-lora.safetensors", "-comfyui.json")]  # fmt: skip


def rename(weights: dict[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return weights of a diffusers U-Net or ControlNet by their names in the original code, each after `prefix`.

    `config`: the model's, which gives the number of layers. Raises UserError for a layer without an original name.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    counts = [layers] * levels if isinstance(layers, int) else list(layers)
    # The first of input_blocks is conv_in; each level but the last ends with a downsampler.
    down = [1 + sum(counts[:i]) + i for i in range(levels)]
    up = [sum(n + 1 for n in counts[::-1][:i]) for i in range(levels)]
    layers_up = counts[::-1]
    attends = {key.rsplit(".attentions", 1)[0] for key in weights if ".attentions." in key}
    renamed = {}
    for key, value in weights.items():
        layer, kind = key.rsplit(".", 1)
        renamed[f"{prefix}{_original_name(layer, down, up, layers_up, attends)}.{kind}"] = value
    return renamed


def _original_name(layer: str, down: list[int], up: list[int], layers_up: list[int], attends: set[str]) -> str:
    """Return the original name of a layer. `down`, `up`: first block of each level; `layers_up`: layers of each level
    of the decoder; `attends`: the diffusers blocks that have attention."""
    if layer in _FIXED:
        return _FIXED[layer]
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", layer):
        return f"input_hint_block.{2 + 2 * int(match[1])}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", layer):
        return f"zero_convs.{match[1]}.0"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
        inner = 2 * int(match[2]) + (match[1] == "attentions")
        return f"middle_block.{inner}.{_RESNET.get(match[3], match[3])}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer):
        level, part, index, rest = int(match[2]), match[3], int(match[4]), match[5]
        block = f"input_blocks.{down[level] + index}" if match[1] == "down" else f"output_blocks.{up[level] + index}"
        if part in ("resnets", "attentions"):
            return f"{block}.{'01'[part == 'attentions']}.{_RESNET.get(rest, rest)}"
        if part == "downsamplers":
            return f"input_blocks.{down[level + 1] - 1}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{up[level] + layers_up[level]}.{1 + (f'up_blocks.{level}' in attends)}.conv"
    raise UserError(f"{layer}: this layer of the U-Net has no name in the LDM format: export --to diffusers")


def kohya(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename low-rank updates `LAYER.lora_A.weight`, `LAYER.lora_B.weight` to `lora_unet_LAYER.lora_down.weight`,
    `.lora_up.weight`, and add `.alpha`, which is the rank, so that updates are not scaled."""
    renamed = {}
    for key, value in updates.items():
        layer, which, _ = key.rsplit(".", 2)
        flat = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{flat}.lora_{'down' if which == 'lora_A' else 'up'}.weight"] = value
        if which == "lora_A":
            renamed[f"{flat}.alpha"] = torch.tensor(float(len(value)))
    return renamed
