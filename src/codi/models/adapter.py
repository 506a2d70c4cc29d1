"""Adapters: what turns a text-to-image U-Net into an image-conditioned one. Zero influence before training.

Two forms. `FusedAdapter` is CoDi's: a copy of the U-Net's encoder looks at the condition alone, so its features are
computed once per image, and each backbone feature h_theta(z_t) becomes

    h'(z_t) = (1 - mu) h_theta(z_t) + mu h_eta(c),        mu = 0 at the start.

`ControlNetAdapter` wraps diffusers' ControlNet: an encoder copy that also sees z_t and t, so it runs at every step,
and adds its features through zero convolutions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError
from . import codec
from .backbone import EMBEDDED, require_finite, unet_down


def _architecture(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {k: v for k, v in unet.config.items() if not k.startswith("_")}


def _feature_widths(config: dict[str, Any]) -> list[int]:
    """Channels of each feature of `unet_down`, in order."""
    widths = list(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    out = [widths[0]]
    for i, width in enumerate(widths):
        out += [width] * (layers[i] + (i < len(widths) - 1))
    return [*out, widths[-1]]


class FusedAdapter(ModelMixin, ConfigMixin):
    """CoDi's condition encoder h_eta and fusion weights mu.

    `unet`: the backbone U-Net's config. `condition_channels`: 3 for a picture, more when maps (a mask) follow it.
    `info`: what the adapter is (task, steps, backbone family, recipe, metrics), kept in config.json.
    mu is one number a feature channel (the paper leaves its shape open; per channel contains per layer).
    """

    sees_noise = False
    config_name = "config.json"

    @register_to_config
    def __init__(self, unet: dict[str, Any], condition_channels: int = 3, info: dict[str, Any] | None = None) -> None:
        super().__init__()
        encoder: Any = UNet2DConditionModel.from_config(unet)
        channels = unet["in_channels"] + condition_channels - 3
        if channels != unet["in_channels"]:
            encoder.conv_in = nn.Conv2d(channels, unet["block_out_channels"][0], 3, padding=1)
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(encoder, unused)
        self.encoder: UNet2DConditionModel = encoder
        self.mu = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in _feature_widths(unet))

    @classmethod
    def from_backbone(cls, unet: UNet2DConditionModel, vae: AutoencoderKL, condition_channels: int = 3, **info: Any):
        """The encoder starts as a copy of the backbone's; weights for extra condition channels start at zero."""
        adapter = cls(_architecture(unet), condition_channels, info)
        mine = adapter.encoder.state_dict().keys()
        weights = {k: v for k, v in unet.state_dict().items() if k in mine}
        widened = torch.zeros_like(adapter.encoder.conv_in.weight)
        widened[:, : unet.config["in_channels"]] = unet.conv_in.weight.detach()
        adapter.encoder.load_state_dict({**weights, "conv_in.weight": widened})
        return adapter.to(unet.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """Condition (B, C, H, W) in [0, 1] -> what the encoder takes: the picture's latent, then any maps."""
        with torch.no_grad():
            latent = codec.encode(vae, condition[:, :3])
            maps = nn.functional.interpolate(condition[:, 3:], latent.shape[-2:], mode="area")
            return torch.cat([latent, maps.to(latent)], dim=1)

    def prepare(self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None) -> list[Tensor]:
        """h_eta(c): independent of z_t and t, so once per image. The copied encoder's time input is held at 0."""
        zero = torch.zeros(1, dtype=torch.long, device=condition.device)
        return unet_down(self.encoder, condition, zero, text, added)[0]

    def fuse(self, features: list[Tensor], prepared: list[Tensor], strength: float, **_: Any) -> list[Tensor]:
        """(1 - mu) h + mu h_eta, with mu scaled by `strength` (0 gives the backbone exactly)."""
        return [
            torch.lerp(h, e.to(h.dtype).expand_as(h), (strength * mu).to(h.dtype).view(1, -1, 1, 1).expand_as(h))
            for h, e, mu in zip(features, prepared, self.mu, strict=True)
        ]


class ControlNetAdapter(ModelMixin, ConfigMixin):
    """diffusers' ControlNet behind the same interface. Arguments as in FusedAdapter; `downscale`: pixels a latent."""

    sees_noise = True
    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        condition_channels: int = 3,
        downscale: int = 8,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        blank: Any = UNet2DConditionModel.from_config(unet)
        self.net = ControlNetAdapter._build(blank, condition_channels, downscale)

    @staticmethod
    def _build(unet: UNet2DConditionModel, condition_channels: int, downscale: int) -> ControlNetModel:
        halvings = downscale.bit_length() - 1
        return ControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=(16, 32, 96, 256, 256, 256)[: halvings + 1],
            conditioning_channels=condition_channels,
        )

    @classmethod
    def from_backbone(cls, unet: UNet2DConditionModel, vae: AutoencoderKL, condition_channels: int = 3, **info: Any):
        """The encoder starts as a copy of the backbone's behind zero convolutions."""
        adapter = cls(_architecture(unet), condition_channels, codec.downscale(vae), info)
        built = cls._build(unet, condition_channels, codec.downscale(vae))
        adapter.net.load_state_dict(built.state_dict())
        return adapter.to(unet.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """A ControlNet reads pixels itself."""
        return condition.to(self.dtype)

    def prepare(self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None) -> Tensor:
        """Nothing can be computed before z_t is known."""
        return condition

    def fuse(
        self,
        features: list[Tensor],
        prepared: Tensor,
        strength: float,
        *,
        z: Tensor,
        timestep: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """h + strength * zero_conv(h_copy(z_t, t, c))."""
        timestep = timestep.to(z.device).expand(len(z))
        down, middle = self.net(z, timestep, text, prepared, strength, added_cond_kwargs=added, return_dict=False)
        return [h + r for h, r in zip(features, [*down, middle], strict=True)]


Adapter = FusedAdapter | ControlNetAdapter
FORMS: dict[str, type[FusedAdapter] | type[ControlNetAdapter]] = {
    "fused": FusedAdapter,
    "controlnet": ControlNetAdapter,
}


def find_adapter(name: str | Path) -> Path:
    """An embedded adapter's name, or a folder -> the folder."""
    embedded = EMBEDDED / "adapters" / str(name)
    return embedded if (embedded / "config.json").is_file() else Path(name)


def load_adapter(
    name: str | Path, task: str | None, family: str | None, unet: UNet2DConditionModel
) -> tuple[Adapter, UNet2DConditionModel]:
    """Loads an adapter folder (config.json + safetensors), in float32 -> (adapter, the U-Net it works with).

    A full adapter brings its own trained U-Net in `unet/`; otherwise the second answer is the backbone's `unet`.
    Raises UserError where it is missing, broken, made for another `task`, or for another backbone `family`
    (None: not checked).
    """
    folder = find_adapter(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        shipped = sorted(p.parent.name for p in (EMBEDDED / "adapters").glob("*/config.json"))
        raise UserError(
            f"{name}: no adapter there (no config.json): give a folder or one of {', '.join(shipped) or '(none)'}"
        )
    try:
        config = json.loads(config_file.read_text())
        cls = {c.__name__: c for c in FORMS.values()}[config["_class_name"]]
        info = dict(config.get("info") or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config_file}: not an adapter's config ({error!r}): train or fetch the adapter again"
        ) from error
    if family and info.get("family") and info["family"] != family:
        raise UserError(
            f"{name}: this adapter was trained for backbone {info['family']}, the model given is {family}: "
            "use the model it was trained on (or a fine-tune of it), or train an adapter for this one"
        )
    if task and info.get("task") and info["task"] != task:
        raise UserError(f"{name}: this adapter does {info['task']!r}, not {task!r}: give an adapter of that task")
    adapter = _weights(cls, folder)
    if (folder / "unet" / "config.json").is_file():
        unet = _weights(UNet2DConditionModel, folder / "unet").to(device=unet.device, dtype=unet.dtype)
    return adapter, unet


def _weights(cls: Any, folder: Path) -> Any:
    try:
        module, report = cls.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # diffusers would leave them random
            raise ValueError(f"weight {sorted(report['missing_keys'])[0]!r} is missing")
    except Exception as error:  # diffusers and safetensors raise many kinds; the user needs one line
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: the weights could not be read ({reason}): train or fetch the adapter again"
        ) from error
    require_finite(module, str(folder))
    return module
