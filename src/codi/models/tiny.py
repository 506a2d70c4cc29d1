"""Tiny decoders: diffusers' AutoencoderTiny in place of the decoder of a model's VAE, at a fraction of its cost.

A tiny decoder fits one latent space, given by the number of channels and of pixels per cell. It takes normalized
latents (mean 0, variance 1) as samplers have them, so its own scaling factor is 1. diffusers' pipelines accept one as
their `vae`, and `codec.decode` in place of a VAE. Its files do not say which of two VAEs of one shape, such as those of
Stable Diffusion 1.5 and XL, it was trained for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ..errors import UserError, one_line
from ..files import write_text
from . import codec
from .backbones import Hub, find_model, require_buildable, require_finite, require_safetensors

FOLDER = "tiny_vae"  # in a model's folder: its tiny decoder, a component that diffusers does not know
_MARK = "_decoder"
FULL, TINY = "full", "tiny"  # names of decoders, beside folders and hub ids


def new_tiny(vae: AutoencoderKL, width: int, blocks: Sequence[int]) -> AutoencoderTiny:
    """Return an untrained tiny decoder for the latents of `vae`, with `width` channels in all layers and `blocks`, the
    numbers of residual blocks at each resolution from the latent's to the picture's. Its encoder has one block at each
    resolution where the decoder has any. Raises UserError unless `blocks` has one number per resolution."""
    stages = codec.downscale(vae).bit_length()
    if len(blocks) != stages:
        raise UserError(f"blocks {list(blocks)}: this VAE has {stages} resolutions: give one number for each")
    return AutoencoderTiny(
        latent_channels=codec.channels(vae),
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=tuple(min(1, count) for count in reversed(blocks)),
        num_decoder_blocks=tuple(blocks),
    )


def mark_saved(folder: Path, tiny: bool) -> None:
    """Record in a saved pipeline's index whether it uses its tiny decoder. The decoder is not listed as a component,
    and empty components of XL are removed, because diffusers' own pipelines warn of components that they do not
    know."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    unknown = [FOLDER] + [name for name, part in parts.items() if part == [None, None]]
    if "unet" not in parts or parts.get("text_encoder_2", [None, None]) == [None, None]:  # not XL
        unknown.append("force_zeros_for_empty_prompt")
    if not parts.get("is_distilled"):  # pipelines of other families do not know this setting
        unknown.append("is_distilled")
    parts = {name: part for name, part in parts.items() if name not in unknown} | {_MARK: TINY if tiny else FULL}
    write_text(index, json.dumps(parts, indent=2) + "\n")


def saved_decoder(folder: Path) -> str | None:
    """Return the decoder that `mark_saved` recorded, "full" or "tiny"; None for other models."""
    index = folder / "model_index.json"
    return json.loads(index.read_text()).get(_MARK) if index.is_file() else None


def open_decoder(
    decoder: str | Path | None,
    model: str | Path,
    vae: AutoencoderKL,
    dtype: torch.dtype = torch.float32,
    **hub: Unpack[Hub],
) -> AutoencoderTiny | None:
    """Load a tiny decoder for `vae`, the VAE of `model`.

    `decoder`: None or "full" for the VAE's own, for which None is returned; "tiny" for the one in the model's folder;
    otherwise an AutoencoderTiny folder or hub id. Raises UserError if there is none, or for one of another latent
    space.
    """
    if decoder is None or decoder == FULL:
        return None
    source = Path(find_model(model)) / FOLDER if decoder == TINY else Path(decoder)
    if not (source / "config.json").is_file():
        if decoder == TINY:
            raise UserError(
                f"decoder tiny: there is no {FOLDER} in {model}: train one by `codi distill-decoder`, or name a folder"
            )
        if source.exists() or str(decoder).count("/") != 1 or str(decoder).startswith((".", "/", "~")):
            raise UserError(f"decoder {decoder}: no config.json there: give full, tiny or an AutoencoderTiny folder")
    # The options `revision` and `variant` apply to the model, not to the decoder.
    fetching: Any = {key: value for key, value in hub.items() if key not in ("revision", "variant")}
    try:
        config: Any = AutoencoderTiny.load_config(source.as_posix(), **fetching)
        class_name = config.get("_class_name")
        if class_name != "AutoencoderTiny":
            raise UserError(
                f"decoder {decoder}: is of class {class_name}: give full, tiny or an AutoencoderTiny folder"
            )
        require_safetensors(source)
        require_buildable(source)
        tiny = AutoencoderTiny.from_pretrained(
            source.as_posix(), dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **fetching
        )
    except UserError:
        raise
    except Exception as error:  # diffusers and safetensors raise many types
        raise UserError(
            f"decoder {decoder}: could not be loaded ({one_line(error)}): check the folder or id"
        ) from error
    require_finite(tiny, f"decoder {decoder}")
    shape, expected = ((codec.channels(v), codec.downscale(v)) for v in (tiny, vae))
    if shape != expected:
        raise UserError(
            f"decoder {decoder}: is for latents of {shape[0]} channels, {shape[1]} px a cell, and those of {model} "
            f"have {expected[0]} and {expected[1]}: train one for it by `codi distill-decoder`"
        )
    return tiny
