"""Stable Diffusion 1, 2 and XL: U-Nets, whose features adapters change between the encoder and the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from ...errors import UserError
from ...schedule import DiscreteSchedule, Schedule
from .. import codec
from ..text import FEATURES, PromptEncoder, TextEncoders
from .base import Family, Fuse, opener, stock


class StableDiffusion(Family):
    """All U-Nets with one CLIP text encoder, or two (XL), and noise levels on a variance-preserving path."""

    name = "Stable Diffusion"
    component = "unet"
    network = "UNet2DConditionModel"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    control_reads = "pixels"
    # Attention, feed-forward and residual convolutions; a pattern, because peft stores a list in random order.
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2)"
    block_classes = ("ResnetBlock2D", "BasicTransformerBlock")
    samplers = ("DDIMScheduler",)
    channel_dim = 1
    time_layer = "time_embedding.linear_1"
    stock_controlnet, control_argument, draws_condition = True, "image=condition", False
    network_kind, formats, takes_pictures = "U-Net", ("diffusers", "ldm", "onnx"), True

    # ---- loading

    def require_pipeline(self, pipeline: str, source: str) -> None:
        """Accept every pipeline: with this U-Net, all contain a text-to-image model; `require_usable` checks
        channels."""

    def open_folder(self, source: str, index: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        is_xl = (index.get("text_encoder_2") or [None])[0]
        extra = {} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
        pipeline_class: Any = opener(self.pipelines[bool(is_xl)])
        return pipeline_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **{**extra, **options})

    def open_file(self, path: Path, keys: set[str], dtype: torch.dtype, fetching: dict[str, Any]) -> Any:
        pipeline_class: Any = stock(self.pipelines[any(key.startswith("conditioner.") for key in keys)])
        return pipeline_class.from_single_file(path.as_posix(), dtype=dtype, **fetching)

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        return fingerprint(network, vae, scheduler)

    def loading_arguments(self, parts: Any) -> list[str]:
        return ["safety_checker=None" if parts.text_encoder_2 is None else "use_safetensors=True"]

    def pipeline_for(self, parts: Any) -> Any:
        return stock(self.pipelines[parts.text_encoder_2 is not None])

    def build_pipeline(self, parts: Any) -> Any:
        pipeline_class, names = self.pipeline_for(parts), ["vae", "unet", "text_encoder", "tokenizer", "scheduler"]
        if parts.text_encoder_2 is not None:
            names += ["text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"]
            return pipeline_class(**{name: getattr(parts, name) for name in names})
        no_checker: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return pipeline_class(**{name: getattr(parts, name) for name in names}, **no_checker)

    def prepare_parts(self, parts: dict[str, Any]) -> dict[str, Any]:
        if parts.get("text_encoder_2") is None and parts.get("tokenizer_2") is None:
            # diffusers' default is true for 1 and 2 too but is used only for XL: other VAEs do not overflow in float16.
            parts["vae"].register_to_config(force_upcast=False)
        return {**parts, "scheduler": DDIMScheduler.from_config(parts["scheduler"].config)}

    def require_scheduler(self, scheduler: Any, name: str) -> None:
        if not {"beta_schedule", "trained_betas"} & set(scheduler.config):
            scheduler_class = type(scheduler).__name__
            raise UserError(f"{name}: its {scheduler_class} has no betas, so its noise levels are not Stable "
                            "Diffusion's: use a checkpoint with an epsilon or v_prediction schedule")  # fmt: skip

    def require_text(self, parts: Any, name: str) -> None:
        if parts.text_encoder is None:
            raise UserError(f"{name}: has no first text encoder, like XL's refiner: use the base model")

    def require_usable(self, parts: Any, name: str) -> None:
        channels, latent = parts.unet.config["in_channels"], parts.vae.config["latent_channels"]
        if channels != latent:
            raise UserError(
                f"{name}: its U-Net takes {channels} channels where latents have {latent}, as inpainting and "
                "instruction checkpoints do: use the text-to-image model, and train the task as an adapter"
            )

    # ---- prompts and schedule

    def prompts(self, parts: Any) -> PromptEncoder:
        return text_encoders(parts, empty_prompt_is_zeros(parts))

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {FEATURES: (77, config["cross_attention_dim"])}
        if config["addition_embed_type"] == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
        return shapes

    def schedule(self, scheduler: Any, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        return DiscreteSchedule.from_config(scheduler.config)

    def own_grid(self, scheduler: Any, schedule: Schedule, steps: int) -> Tensor:
        """Return the times of the scheduler's configuration. The last is 0 or, if `set_alpha_to_one` is false, as in
        Stable Diffusion 1.5, the checkpoint's lowest noise level."""
        scheduler.set_timesteps(steps)
        end = torch.tensor([0 if scheduler.config.get("set_alpha_to_one", True) else 1])
        return torch.cat([scheduler.timesteps.cpu() + 1, end])

    # ---- the network

    def predict(
        self, network: Any, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None, hint: Tensor | None = None, fuse: Fuse | None = None,
    ) -> Tensor:  # fmt: skip
        features, embedding = unet_down(network, z, timestep, text, added, extra, hint)
        if fuse is not None:
            features = [fuse(index, h) for index, h in enumerate(features)]
        return unet_up(network, features, embedding, text)

    def features(
        self, encoder: Any, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        zero = torch.zeros(1, dtype=torch.long, device=condition.device)
        return unet_down(encoder, condition, zero, text, added, extra)[0]

    # ---- adapters

    def encoder(self, config: Any, channels: int, reads: str, downscale: int, depth: int | None) -> nn.Module:
        if depth is not None:
            raise UserError("adapter depth: is for transformers: a U-Net's encoder is its whole first half")
        encoder: Any = UNet2DConditionModel.from_config(config)
        latent, width = config["in_channels"] + channels - 3, config["block_out_channels"][0]
        if reads == "pixels":
            encoder.conv_in = ControlNetConditioningEmbedding(width, channels, entry_widths(downscale))
            encoder.conv_in.conv_out.reset_parameters()  # not zero as in a ControlNet: mu is zero already
        elif latent != config["in_channels"]:
            encoder.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(encoder, unused)
        return encoder

    def encoder_weights(self, network: Any, encoder: Any, reads: str) -> dict[str, Tensor]:
        own = encoder.state_dict()
        weights = {k: v for k, v in network.state_dict().items() if k in own}
        if reads == "latent":
            widened = torch.zeros_like(own["conv_in.weight"])
            widened[:, : network.config["in_channels"]] = network.conv_in.weight.detach()
            weights["conv_in.weight"] = widened
        return weights

    def feature_widths(self, config: Any, depth: int | None) -> list[int]:
        widths = list(config["block_out_channels"])
        layers = config["layers_per_block"]
        layers = [layers] * len(widths) if isinstance(layers, int) else list(layers)
        out = [widths[0]]
        for i, width in enumerate(widths):
            out += [width] * (layers[i] + (i < len(widths) - 1))
        return [*out, widths[-1]]

    def time_width(self, config: Any) -> int:
        return config["block_out_channels"][0]

    def hint_entry(self, config: Any, channels: int) -> nn.Module:
        """Return two convolutions, the second zero-initialized."""
        width = config["block_out_channels"][0]
        entry = nn.Sequential(
            nn.Conv2d(config["in_channels"] + channels - 3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        nn.init.zeros_(entry[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(entry[2].bias)  # type: ignore[arg-type]
        return entry

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        source: Any = UNet2DConditionModel.from_config(config) if network is None else network
        return ControlNetModel.from_unet(
            source, conditioning_embedding_out_channels=entry_widths(downscale), conditioning_channels=channels
        )

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        timestep = timestep.to(z.device).expand(z.shape[0])
        down, middle = controlnet(z, timestep, text, condition, added_cond_kwargs=added, return_dict=False)
        return [*down, middle]

    # ---- export

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        return network.get_time_embed(sample=timesteps[:, None].float(), timestep=timesteps)

    def time_constant(self, network: Any, extra: Tensor) -> Tensor:
        return (
            network.get_submodule(self.time_layer).weight.detach() @ extra
        )  # `extra` is added to the input of this layer


def entry_widths(downscale: int) -> tuple[int, ...]:
    """Return the widths of ControlNet's convolutions over a condition's pixels, down to the latent's size."""
    return (16, 32, 96, 256, 256, 256)[: downscale.bit_length()]


def empty_prompt_is_zeros(parts: Any) -> bool:
    """Return True if a Backbone or a pipeline encodes an empty prompt as zeros."""
    config = getattr(parts, "config", None)
    return config["force_zeros_for_empty_prompt"] if config is not None else parts.force_zeros_for_empty_prompt


def text_encoders(parts: Any, zero_empty: bool) -> TextEncoders:
    """Return the text encoders of a Backbone or a pipeline; `zero_empty` (see TextEncoders) is used only for XL."""
    if parts.text_encoder_2 is None:
        return TextEncoders((parts.tokenizer,), (parts.text_encoder,))
    return TextEncoders(
        (parts.tokenizer, parts.tokenizer_2), (parts.text_encoder, parts.text_encoder_2), zero_empty=zero_empty
    )


def fingerprint(unet: UNet2DConditionModel, vae: Any, scheduler: Any) -> str:
    """Return a name for the checkpoints that an adapter fits: fine-tunes of one architecture and prediction type.

    An example is "4ch-f8-320/640/1280/1280x2-text768-epsilon". "-depth1/2/10" is added if a level has several
    transformer layers (XL), and "-nomid" if there is no middle block, to distinguish pruned checkpoints.
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


def unet_down(
    unet: UNet2DConditionModel,
    z: Tensor,
    timestep: Tensor,
    text: Tensor,
    added: dict[str, Tensor] | None = None,
    timestep_cond: Tensor | None = None,
    hint: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Run the U-Net's encoder and middle block; return [skip features..., middle feature] and the time embedding.

    `z` (B, C, h, w), `timestep` (B,) or (1,), `text` (B, L, D), `added` SDXL's extra conditions,
    `timestep_cond` (B, W) added to the sinusoidal time features (W = the U-Net's first width), as in diffusers,
    `hint` (B, W, h, w) added to the output of the first convolution.
    `unet_up(unet, *unet_down(...))` is exactly `unet(...)`; adapters change the features in between.
    """
    timestep = timestep.to(z.device).expand(z.shape[0])
    time: Any = unet.get_time_embed(sample=z, timestep=timestep)
    embedding = unet.time_embedding(time if timestep_cond is None else time + timestep_cond.to(time))
    extra = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added or {})
    embedding = embedding if extra is None else embedding + extra
    h = unet.conv_in(z) if hint is None else unet.conv_in(z) + hint
    features = [h]
    for block in unet.down_blocks:
        text_argument = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        h, skips = block(hidden_states=h, temb=embedding, **text_argument)
        features.extend(skips)
    text_argument = {"encoder_hidden_states": text} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    # Pruned checkpoints (BK-SDM) have no middle block.
    features.append(h if unet.mid_block is None else unet.mid_block(h, embedding, **text_argument))  # type: ignore[misc]
    return features, embedding


def unet_up(unet: UNet2DConditionModel, features: list[Tensor], embedding: Tensor, text: Tensor) -> Tensor:
    """Run the U-Net's decoder on features from `unet_down`; return the network's prediction (B, C, h, w)."""
    *skips, h = features
    for block in unet.up_blocks:
        count = len(block.resnets)  # type: ignore[arg-type]
        block_skips, skips = skips[-count:], skips[:-count]
        text_argument = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        # Upsample to the next skip's size, not by 2: the encoder rounds odd sizes up.
        size = skips[-1].shape[2:] if skips else None
        h = block(
            hidden_states=h,
            temb=embedding,
            res_hidden_states_tuple=tuple(block_skips),
            upsample_size=size,
            **text_argument,
        )
    if unet.conv_norm_out is not None:
        h = unet.conv_act(unet.conv_norm_out(h))  # type: ignore[misc]
    return unet.conv_out(h)
