"""The pretrained latent diffusion model: loading it, and its U-Net split into encoder and decoder halves."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import UserError, nearest
from ..schedule import DiscreteSchedule
from . import codec
from .text import TextEncoders

EMBEDDED = Path(__file__).resolve().parents[1] / "weights"  # what ships inside the package


class Hub(TypedDict, total=False):
    """Which files of a model are meant, and how they are fetched: options that diffusers gets as they are. `config`: of
    a single file, a folder or hub id in diffusers' layout whose configs and tokenizers belong to it; without one
    diffusers fetches them."""

    revision: str | None
    variant: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    config: str | Path | None


@dataclass
class Backbone:
    """The parts of a Stable Diffusion checkpoint, as diffusers and transformers classes; the last three of XL alone."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    force_zeros_for_empty_prompt: bool = True

    @property
    def text(self) -> TextEncoders:
        """What prompts go through."""
        return text_encoders(self, self.force_zeros_for_empty_prompt)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The networks among the parts."""
        return (self.vae, self.unet, *self.text.encoders)

    @property
    def schedule(self) -> DiscreteSchedule:
        return DiscreteSchedule.from_config(self.scheduler.config)

    @property
    def family(self) -> str:
        return family(self.unet, self.vae, self.scheduler)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Backbone:
        for part in self.modules:
            part.to(device=device, dtype=dtype)
        return self

    def freeze(self) -> Backbone:
        for part in self.modules:
            part.requires_grad_(False).eval()
        return self

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """diffusers' own text-to-image pipeline of the same parts."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.text_encoder_2 is not None:
            return StableDiffusionXLPipeline(**parts)
        for name in ("text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"):
            del parts[name]
        blank: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **blank)


def text_encoders(parts: Any, zero_empty: bool) -> TextEncoders:
    """Of a Backbone, or of a pipeline with components of the same names; `zero_empty` counts for XL."""
    if parts.text_encoder_2 is None:
        return TextEncoders((parts.tokenizer,), (parts.text_encoder,))
    return TextEncoders(
        (parts.tokenizer, parts.tokenizer_2), (parts.text_encoder, parts.text_encoder_2), zero_empty=zero_empty
    )


def family(unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler) -> str:
    """Which checkpoints an adapter fits: all fine-tunes of one architecture that predict the same quantity.

    A readable fingerprint such as "4ch-f8-320/640/1280/1280x2-text768-epsilon", with "-depth1/2/10" where a level has
    several transformer layers (XL) and "-nomid" where there is no middle block, so that pruned ones are told apart.
    """
    c = unet.config
    depth = c["transformer_layers_per_block"]
    deep = "" if depth == 1 else "-depth" + "/".join(str(d) for d in ([depth] if isinstance(depth, int) else depth))
    deep += "" if c["mid_block_type"] else "-nomid"
    widths = "/".join(str(w) for w in c["block_out_channels"])
    return (
        f"{c['in_channels']}ch-f{codec.downscale(vae)}-{widths}x{c['layers_per_block']}-"
        f"text{c['cross_attention_dim']}-{scheduler.config['prediction_type']}{deep}"
    )


def digest(network: torch.nn.Module) -> str:
    """Which weights: 12 hex digits of SHA-256 over names and float16 values, so that a copy stored in halves is the
    same. `family` says what an adapter fits; this, what it was trained on."""
    told = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        told.update(name.encode())
        told.update(value.to("cpu", torch.float16).numpy().tobytes())
    return told.hexdigest()[:12]


def find_model(name: str | Path) -> str:
    """'mini' -> the embedded checkpoint's folder; anything else is a path or a hub id, returned as it is."""
    embedded = EMBEDDED / str(name)
    return str(embedded) if (embedded / "model_index.json").is_file() else str(name)


def load_backbone(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    loras: Mapping[str, float] | None = None,
    **hub: Unpack[Hub],
) -> Backbone:
    """Loads 'mini', a diffusers folder of Stable Diffusion 1, 2 or XL, a single .safetensors file, or a hub id, which
    may name a revision: "id@revision".

    `loras`: files, folders or hub ids of low-rank updates in any format that diffusers reads, and how much of each is
    made part of the weights. Of a folder that has its weights as the variant "fp16" alone, these are taken. Only
    safetensors are read. Raises UserError where there is no such model, it is of another kind or its weights are
    broken, and for an option that is none of `Hub`.
    """
    for option in hub:
        if option not in Hub.__annotations__:
            known = tuple(Hub.__annotations__)
            raise UserError(f"{option}: no such option{nearest(option, known)}: use {', '.join(known)}")
    source = find_model(name)
    try:
        pipe = _open(source, dtype, dict(hub))
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds; the user needs one line
        mend = "check the path or id"
        if Path(source).is_file() and not hub.get("config"):
            mend = (
                "its configs are fetched from the hub: connect, or pass config (--config), a folder or id of its kind"
            )
        raise UserError(f"{name}: the model could not be loaded ({_short(error)}): {mend}") from error
    for lora, weight in (loras or {}).items():
        try:
            pipe.load_lora_weights(str(lora), use_safetensors=True)
            if not pipe.get_list_adapters():  # diffusers takes a file of other keys for none at all
                raise ValueError("none of its weights are for this model")
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()
        except Exception as error:
            raise UserError(f"{lora}: not a LoRA for {name} ({_short(error)}): check the file and the model") from error
    second = {key: getattr(pipe, key, None) for key in ("text_encoder_2", "tokenizer_2")}
    if second["text_encoder_2"] is None:
        # diffusers' default says so of 1 and 2 as well, but heeds it for XL alone: their VAEs stay in range.
        pipe.vae.register_to_config(force_upcast=False)
    if not {"beta_schedule", "trained_betas"} & set(pipe.scheduler.config):
        kind = type(pipe.scheduler).__name__
        raise UserError(f"{name}: its {kind} has no betas, so that its noise levels are not Stable Diffusion's: "
                        "use a checkpoint with an epsilon or v_prediction schedule")  # fmt: skip
    zeros = bool(pipe.config.get("force_zeros_for_empty_prompt", True))
    scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    backbone = Backbone(
        pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler, **second, force_zeros_for_empty_prompt=zeros
    )
    _require_usable(backbone, str(name))
    return backbone


def load_vae(model: str | Path) -> AutoencoderKL:
    """The VAE of a model in float32; of a folder or a hub id nothing else is read, so that any family's will do.
    Raises UserError as load_backbone does."""
    source = find_model(model)
    if not (Path(source) / "vae").is_dir() and (Path(source).exists() or source.count("/") != 1):
        return load_backbone(model).vae
    try:
        source, options = resolved(source, "vae")
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True, **options)
    except Exception as error:
        raise UserError(f"{model}: its VAE could not be loaded ({_short(error)}): check the path or id") from error
    require_finite(vae, f"{model}/vae")
    return vae.float()


def _open(source: str, dtype: torch.dtype, hub: dict[str, Any]) -> Any:
    """diffusers' own pipeline of it."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{source}: not a .safetensors file, and others may run code: convert it first")
        # Only its configs are fetched: they have neither the model's revision nor its variants.
        fetching = {key: value for key, value in hub.items() if key not in ("revision", "variant")}
        if fetching.get("config"):
            fetching["config"] = str(fetching["config"])
        with safe_open(source, "pt") as file:
            two = any(key.startswith("conditioner.") for key in file.keys())  # noqa: SIM118 # no mapping
        kind: Any = StableDiffusionXLPipeline if two else StableDiffusionPipeline
        return kind.from_single_file(source, dtype=dtype, **fetching)
    options = {key: value for key, value in hub.items() if key != "config"}
    local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if local and not (path / "model_index.json").is_file():
        raise UserError(
            f"{source}: no model there (a diffusers folder has a model_index.json): "
            "give 'mini', such a folder, a .safetensors file or a hub id"
        )
    source, found = resolved(source, "unet")
    options = {**found, **options} if "variant" in found else {**options, **found}  # "@" says more than an option
    fetching = {key: value for key, value in options.items() if key != "variant"}
    parts: Any = DiffusionPipeline.load_config(source, **fetching)
    if "unet" not in parts:
        raise UserError(f"{source}: a {parts.get('_class_name')}, not Stable Diffusion 1, 2 or XL: use one of these")
    two = (parts.get("text_encoder_2") or [None])[0]
    kind = StableDiffusionXLPipeline if two else StableDiffusionPipeline
    extra = {} if two else {"safety_checker": None, "requires_safety_checker": False}
    return kind.from_pretrained(source, dtype=dtype, use_safetensors=True, **extra, **options)


def resolved(source: str, part: str) -> tuple[str, dict[str, Any]]:
    """A folder or hub id as diffusers takes it, and with which options: the variant "fp16" where a folder has no other
    weights of `part`, the revision of "id@revision"."""
    folder = Path(source)
    if folder.is_dir():
        weights = [file.name for file in (folder / part).glob("*.safetensors")]
        return source, {"variant": "fp16"} if weights and all(".fp16." in name for name in weights) else {}
    name, at, revision = source.rpartition("@")
    return (name, {"revision": revision}) if at else (source, {})


def _require_usable(backbone: Backbone, name: str) -> None:
    """Raises UserError for broken weights and for a U-Net that expects more than noise and a prompt."""
    if backbone.text_encoder is None:
        raise UserError(f"{name}: has no first text encoder, as XL's refiner: use the base model")
    channels, latent = backbone.unet.config["in_channels"], backbone.vae.config["latent_channels"]
    if channels != latent:
        raise UserError(
            f"{name}: its U-Net takes {channels} channels where latents have {latent}, as inpainting and instruction "
            "checkpoints do: use the text-to-image model, and train the task as an adapter"
        )
    for part in ("vae", "unet", "text_encoder", "text_encoder_2"):
        if getattr(backbone, part) is not None:
            require_finite(getattr(backbone, part), f"{name}/{part}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


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
        b.unet = UNet2DConditionModel.from_pretrained(unet, dtype=b.unet.dtype)  # type: ignore[assignment]
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        b.pipeline().save_pretrained(temporary)
        temporary.rename(out)
    return out
