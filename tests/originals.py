"""Single-file checkpoints with the weight names of the original LDM, CLIP and OpenCLIP code."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from codi.export.ldm import rename
from codi.models.backbones import Backbone

_VAE = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"to_out\.0", "proj_out"),
    (r"down_blocks\.", "down."),
)
_OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    ("self_attn", "attn"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def save_original(backbone: Backbone, file: Path, open_clip: bool = False) -> Path:
    """Write a checkpoint: XL if it has a second text encoder, else Stable Diffusion 1, or 2 if `open_clip`.

    The text encoder of Stable Diffusion 2 has OpenCLIP's names.
    """
    weights = rename(backbone.unet.state_dict(), backbone.unet.config, "model.diffusion_model.")
    weights |= {f"first_stage_model.{key}": value for key, value in _vae(backbone).items()}
    first, second = backbone.text_encoder.state_dict(), backbone.text_encoder_2
    if open_clip:
        weights |= {f"cond_stage_model.model.{key}": value for key, value in _open_clip(first).items()}
    else:
        prefix = "conditioner.embedders.0.transformer." if second else "cond_stage_model.transformer."
        weights |= {f"{prefix}{_clip(key)}": value for key, value in first.items()}
    if second is not None:
        weights |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(second.state_dict()).items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    return file


def _substitute(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def _vae(backbone: Backbone) -> dict[str, Tensor]:
    renamed, levels = {}, len(backbone.vae.config["block_out_channels"])
    for key, value in backbone.vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", _substitute(key, _VAE))
        linear = ".attn_1." in new and value.ndim == 2  # originally 1 x 1 convolutions
        renamed[new] = value[..., None, None] if linear else value
    return renamed


def _clip(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {_clip(key) if "text_projection" not in key else key: value for key, value in weights.items()}
    projection = weights.pop("text_projection.weight", None)
    renamed = {} if projection is None else {"text_projection": projection.T}
    for key in [key for key in weights if ".q_proj." in key]:
        parts = [weights.pop(key.replace(".q_proj.", f".{name}_proj.")) for name in "qkv"]
        renamed[_substitute(key.replace("q_proj.", "in_proj_"), _OPEN_CLIP)] = torch.cat(parts)
    return {**renamed, **{_substitute(key, _OPEN_CLIP): value for key, value in weights.items()}}
