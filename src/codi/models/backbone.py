"""The pretrained latent diffusion model: loading it, and its U-Net split into encoder and decoder halves."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError, nearest
from ..schedule import DiscreteSchedule
from . import codec

EMBEDDED = Path(__file__).resolve().parents[1] / "weights"  # what ships inside the package


class Hub(TypedDict, total=False):
    """Which files of a model are meant, and how they are fetched: options that diffusers gets as they are."""

    revision: str | None
    variant: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass
class Backbone:
    """The parts of a Stable Diffusion checkpoint, as diffusers and transformers classes."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    @property
    def schedule(self) -> DiscreteSchedule:
        return DiscreteSchedule.from_config(self.scheduler.config)

    @property
    def family(self) -> str:
        return family(self.unet, self.vae, self.scheduler)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Backbone:
        for part in (self.vae, self.unet, self.text_encoder):
            part.to(device=device, dtype=dtype)  # type: ignore[call-overload]
        return self

    def freeze(self) -> Backbone:
        for part in (self.vae, self.unet, self.text_encoder):
            part.requires_grad_(False).eval()
        return self


def family(unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler) -> str:
    """Which checkpoints an adapter fits: all fine-tunes of one architecture that predict the same quantity.

    A readable fingerprint such as "4ch-f8-320/640/1280/1280x2-text768-epsilon".
    """
    c = unet.config
    widths = "/".join(str(w) for w in c["block_out_channels"])
    return (
        f"{c['in_channels']}ch-f{codec.downscale(vae)}-{widths}x{c['layers_per_block']}-"
        f"text{c['cross_attention_dim']}-{scheduler.config['prediction_type']}"
    )


def digest(unet: UNet2DConditionModel) -> str:
    """Which weights: 12 hex digits of SHA-256 over names and float16 values, so that a copy stored in halves is the
    same. `family` says what an adapter fits; this, what it was trained on."""
    told = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        told.update(name.encode())
        told.update(value.to("cpu", torch.float16).numpy().tobytes())
    return told.hexdigest()[:12]


def find_model(name: str | Path) -> str:
    """'mini' -> the embedded checkpoint's folder; anything else is a path or a hub id, returned as it is."""
    embedded = EMBEDDED / str(name)
    return str(embedded) if (embedded / "model_index.json").is_file() else str(name)


def load_backbone(name: str | Path, dtype: torch.dtype = torch.float32, **hub: Unpack[Hub]) -> Backbone:
    """Loads 'mini', a diffusers Stable Diffusion folder, a single .safetensors file, or a hub id.

    Only safetensors are read. Raises UserError where there is no such model or its weights are broken, and for an
    option that is none of `Hub`.
    """
    for option in hub:
        if option not in Hub.__annotations__:
            known = tuple(Hub.__annotations__)
            raise UserError(f"{option}: no such option{nearest(option, known)}: use {', '.join(known)}")
    source = find_model(name)
    path = Path(source)
    looks_local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    try:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise UserError(f"{name}: not a .safetensors file, and others may run code: convert it first")
            # Only its configs are fetched: they have neither the model's revision nor its variants.
            fetching: Any = {key: value for key, value in hub.items() if key not in ("revision", "variant")}
            pipe = StableDiffusionPipeline.from_single_file(source, torch_dtype=dtype, **fetching)
        elif looks_local and not (path / "model_index.json").is_file():
            raise UserError(
                f"{name}: no model there (a diffusers folder has a model_index.json): "
                "give 'mini', such a folder, a .safetensors file or a hub id"
            )
        else:
            pipe = StableDiffusionPipeline.from_pretrained(
                source,
                torch_dtype=dtype,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
                **hub,
            )
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds; the user needs one line
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: the model could not be loaded ({reason}): check the path or id") from error
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    backbone = Backbone(pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler)  # type: ignore[arg-type]
    for part in ("vae", "unet", "text_encoder"):
        require_finite(getattr(backbone, part), f"{name}/{part}")
    return backbone


def require_finite(module: torch.nn.Module, name: str) -> None:
    """Raises UserError if a weight of `module` is missing, NaN or infinite."""
    for key, value in module.state_dict().items():
        if value.is_meta:
            raise UserError(f"{name}: weight {key!r} is missing: fetch or train the file again")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: weight {key!r} is NaN or infinite: fetch or train the file again")


def unet_down(
    unet: UNet2DConditionModel,
    z: Tensor,
    timestep: Tensor,
    text: Tensor,
    added: dict[str, Tensor] | None = None,
    timestep_cond: Tensor | None = None,
    hint: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The U-Net's encoder and middle block: (skip features..., middle feature) and the time embedding.

    `z` (B, C, h, w), `timestep` (B,) or (1,), `text` (B, L, D), `added` SDXL's extra conditions,
    `timestep_cond` (B, W) added to the sinusoidal time features (W = the U-Net's first width), as in diffusers,
    `hint` (B, W, h, w) added to what the first convolution makes of `z`.
    `unet_up(unet, *unet_down(...))` is exactly `unet(...)`: the seam where adapters put their features.
    """
    timestep = timestep.to(z.device).expand(z.shape[0])
    time: Any = unet.get_time_embed(sample=z, timestep=timestep)
    embedding = unet.time_embedding(time if timestep_cond is None else time + timestep_cond.to(time))
    extra = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added or {})
    embedding = embedding if extra is None else embedding + extra
    h = unet.conv_in(z) if hint is None else unet.conv_in(z) + hint
    features = [h]
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        h, skips = block(hidden_states=h, temb=embedding, **attends)
        features.extend(skips)
    attends = {"encoder_hidden_states": text} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    # Pruned checkpoints (BK-SDM) have no middle block.
    features.append(h if unet.mid_block is None else unet.mid_block(h, embedding, **attends))  # type: ignore[misc]
    return features, embedding


def unet_up(unet: UNet2DConditionModel, features: list[Tensor], embedding: Tensor, text: Tensor) -> Tensor:
    """The U-Net's decoder: features of `unet_down` -> the network's prediction (B, C, h, w)."""
    *skips, h = features
    for block in unet.up_blocks:
        count = len(block.resnets)  # type: ignore[arg-type]
        mine, skips = skips[-count:], skips[:-count]
        attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        # The next skip's size, not twice ours: odd latents are rounded up on the way down.
        size = skips[-1].shape[2:] if skips else None
        h = block(hidden_states=h, temb=embedding, res_hidden_states_tuple=tuple(mine), upsample_size=size, **attends)
    if unet.conv_norm_out is not None:
        h = unet.conv_act(unet.conv_norm_out(h))  # type: ignore[misc]
    return unet.conv_out(h)


def with_unet(model: str | Path, unet: Path, out: Path) -> Path:
    """Writes to `out` the checkpoint `model` with the U-Net in the folder `unet` (of a full adapter), as a Stable
    Diffusion folder. Returns `out`; what is there already stays."""
    if not (out / "model_index.json").is_file():
        b = load_backbone(model)
        b.unet = UNet2DConditionModel.from_pretrained(unet, torch_dtype=b.unet.dtype)  # type: ignore[assignment]
        parts: Any = {**vars(b), "safety_checker": None, "feature_extractor": None}
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(temporary)
        temporary.rename(out)
    return out
