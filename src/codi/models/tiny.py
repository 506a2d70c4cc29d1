"""Tiny decoders: diffusers' AutoencoderTiny in place of the decoder of a model's VAE, at a fraction of its cost.

One of them fits one latent space: as many channels, as many pixels a cell, and the latents as samplers have them
(mean 0, variance 1, which a VAE's scaling factor and shift make), because its own scaling factor is 1. So diffusers'
pipelines take one as their `vae`, and `codec.decode` takes it wherever it takes a VAE. Which of two VAEs of one shape
it was made for, as those of Stable Diffusion 1.5 and XL, its files do not say.
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

FOLDER = "tiny_vae"  # of a model: a tiny decoder for it, beside the parts that diffusers knows of
_MARK = "_decoder"
FULL, TINY = "full", "tiny"  # what decoders are called, besides folders and hub ids


def new_tiny(vae: AutoencoderKL, width: int, blocks: Sequence[int]) -> AutoencoderTiny:
    """An untrained one for the latents of `vae`: `width` channels everywhere, `blocks` residual blocks at each
    resolution from the latent's to the picture's. Its encoder has one block where the decoder has any. Raises
    UserError where `blocks` are not as many as there are resolutions."""
    stages = codec.downscale(vae).bit_length()
    if len(blocks) != stages:
        raise UserError(f"blocks {list(blocks)}: this VAE has {stages} resolutions: give as many numbers")
    return AutoencoderTiny(
        latent_channels=codec.channels(vae),
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=tuple(min(1, count) for count in reversed(blocks)),
        num_decoder_blocks=tuple(blocks),
    )


def mark_saved(folder: Path, tiny: bool) -> None:
    """Notes in a saved pipeline whether it decodes by its tiny decoder. Not as a part: diffusers' own pipelines would
    warn of one that they do not know, as of XL's parts where there are none, which go too."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    unknown = [FOLDER] + [name for name, part in parts.items() if part == [None, None]]
    if "unet" not in parts or parts.get("text_encoder_2", [None, None]) == [None, None]:  # not XL
        unknown.append("force_zeros_for_empty_prompt")
    if not parts.get("is_distilled"):  # which pipelines of other families do not know
        unknown.append("is_distilled")
    parts = {name: part for name, part in parts.items() if name not in unknown} | {_MARK: TINY if tiny else FULL}
    write_text(index, json.dumps(parts, indent=2) + "\n")


def saved_decoder(folder: Path) -> str | None:
    """What `mark_saved` noted, None for other models."""
    index = folder / "model_index.json"
    return json.loads(index.read_text()).get(_MARK) if index.is_file() else None


def open_decoder(
    decoder: str | Path | None,
    model: str | Path,
    vae: AutoencoderKL,
    dtype: torch.dtype = torch.float32,
    **hub: Unpack[Hub],
) -> AutoencoderTiny | None:
    """The decoder of that name for `vae`, the VAE of `model`; None, which is also called "full", for the VAE's own.

    "tiny" is the one in the model's folder, anything else an AutoencoderTiny folder or hub id. Raises UserError where
    there is none, and for one of another latent space.
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
    # Revision and variant are the model's.
    fetching: Any = {key: value for key, value in hub.items() if key not in ("revision", "variant")}
    try:
        config: Any = AutoencoderTiny.load_config(source.as_posix(), **fetching)
        kind = config.get("_class_name")
        if kind != "AutoencoderTiny":
            raise UserError(f"decoder {decoder}: is of class {kind}: give full, tiny or an AutoencoderTiny folder")
        require_safetensors(source)
        require_buildable(source)
        tiny = AutoencoderTiny.from_pretrained(
            source.as_posix(), dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **fetching
        )
    except UserError:
        raise
    except Exception as error:  # as many kinds as for a model
        raise UserError(
            f"decoder {decoder}: could not be loaded ({one_line(error)}): check the folder or id"
        ) from error
    require_finite(tiny, f"decoder {decoder}")
    has, wants = ((codec.channels(v), codec.downscale(v)) for v in (tiny, vae))
    if has != wants:
        raise UserError(
            f"decoder {decoder}: is for latents of {has[0]} channels, {has[1]} px a cell, and those of {model} have "
            f"{wants[0]} and {wants[1]}: train one for it by `codi distill-decoder`"
        )
    return tiny
