"""Adapters: what turns a text-to-image U-Net into an image-conditioned one. Zero influence before training.

Four forms. `FusedAdapter` is CoDi's: a copy of the U-Net's encoder looks at the condition alone, so its features are
computed once per image, and each backbone feature h_theta(z_t) becomes

    h'(z_t) = (1 - mu) h_theta(z_t) + mu h_eta(c),        mu = 0 at the start.

`ControlNetAdapter` wraps diffusers' ControlNet: an encoder copy that also sees z_t and t, so it runs at every step,
and adds its features through zero convolutions. `HintAdapter` is the lean one: two convolutions add the condition to
the U-Net's input, and low-rank updates of the backbone learn to use it; nothing runs beside the backbone. `LoraAdapter`
has no condition: it only makes the backbone faster.

Any form may come with low-rank updates of the backbone (see lora) and with distilled guidance (see guidance).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from . import codec
from .backbone import unet_down
from .guidance import GuidanceEmbedding, JumpEmbedding


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


def _entry_widths(downscale: int) -> tuple[int, ...]:
    """Of ControlNet's convolutions over a condition's pixels, down to the latent's size."""
    return (16, 32, 96, 256, 256, 256)[: downscale.bit_length()]


class _Form(ModelMixin, ConfigMixin):
    """What the forms share. Arguments of all of them: `unet`, the backbone U-Net's config; `condition_channels`, 3 for
    a picture, more when maps (a mask) follow it; `guidance_scales`, how many scales are distilled in; `jumps`, whether
    it can be asked where the ODE ends; `info`, what the adapter is (task, steps, backbone family, recipe, metrics),
    kept in config.json."""

    config_name = "config.json"
    guidance: GuidanceEmbedding | None
    jump: JumpEmbedding | None

    def _add_inputs(self, scales: int, jumps: bool, unet: dict[str, Any]) -> None:
        width = unet["block_out_channels"][0]
        self.guidance = GuidanceEmbedding(scales, width) if scales else None
        self.jump = JumpEmbedding(width) if jumps else None

    @classmethod
    def from_backbone(
        cls,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        jumps: bool = False,
    ) -> Self:
        """A new adapter of this backbone: no influence yet."""
        form: Any = cls
        return form(_architecture(unet), condition_channels, guidance_scales=guidance_scales, jumps=jumps).to(
            unet.device
        )

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """Condition (B, C, H, W) in [0, 1] -> the picture's latent, then any maps, (B, ..., h, w)."""
        with torch.no_grad():
            latent = codec.encode(vae, condition[:, :3])
            if condition.shape[1] == 3:
                return latent.contiguous()  # a part of the posterior, which convolutions would take in another layout
            maps = nn.functional.avg_pool2d(condition[:, 3:], codec.downscale(vae))
            return torch.cat([latent, maps.to(latent)], dim=1)

    def prepare(
        self,
        condition: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Any:
        """What can be computed of what was read once per image, before z_t is known."""
        return condition

    def timestep_cond(self, guidance: Tensor | None, jump: Tensor | None = None) -> Tensor | None:
        """Scales (B, k) and jumps (B,) -> what `unet_down` adds to the time features; None where nothing is told."""
        parts = [
            embed(told)
            for embed, told in ((self.guidance, guidance), (self.jump, jump))
            if embed is not None and told is not None
        ]
        return torch.stack(parts).sum(0) if parts else None

    def hint(self, prepared: Any, strength: float) -> Tensor | None:
        """What is added to the U-Net's input features, (B, W, h, w); None: nothing."""
        return None

    def look(
        self, prepared: Any, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> Any:
        """What `fuse` takes, of what was prepared: what depends on z_t is computed here, once a step."""
        return prepared

    def fuse(self, features: list[Tensor], seen: Any, strength: float) -> list[Tensor]:
        """Features of `unet_down`, with the adapter's own in them."""
        return features


READS = ("latent", "pixels")


class FusedAdapter(_Form):
    """CoDi's condition encoder h_eta and fusion weights mu.

    mu is one number a feature channel (the paper leaves its shape open; per channel contains per layer). `reads`: the
    condition's "latent", by the VAE, which keeps what a picture shows, or its "pixels", by a few convolutions of
    ControlNet's kind in the encoder's entry, which for a map of depth or edges is as good and saves the VAE's encoder;
    `downscale`: pixels a latent.
    """

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        condition_channels: int = 3,
        guidance_scales: int = 0,
        jumps: bool = False,
        info: dict[str, Any] | None = None,
        reads: str = "latent",
        downscale: int = 8,
    ) -> None:
        super().__init__()
        encoder: Any = UNet2DConditionModel.from_config(unet)
        channels, width = unet["in_channels"] + condition_channels - 3, unet["block_out_channels"][0]
        if reads == "pixels":
            encoder.conv_in = ControlNetConditioningEmbedding(width, condition_channels, _entry_widths(downscale))
            encoder.conv_in.conv_out.reset_parameters()  # not zero, as there: mu is
        elif channels != unet["in_channels"]:
            encoder.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(encoder, unused)
        self.encoder: UNet2DConditionModel = encoder
        self.mu = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in _feature_widths(unet))
        self._add_inputs(guidance_scales, jumps, unet)

    @classmethod
    def from_backbone(
        cls,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        jumps: bool = False,
        reads: str = "latent",
    ) -> Self:
        """The encoder starts as a copy of the backbone's; weights for extra condition channels start at zero, those
        that read pixels at random."""
        told = _architecture(unet), condition_channels, guidance_scales, jumps
        adapter = cls(*told, reads=reads, downscale=codec.downscale(vae))
        mine = adapter.encoder.state_dict()
        weights = {k: v for k, v in unet.state_dict().items() if k in mine}
        if reads == "latent":
            widened = torch.zeros_like(mine["conv_in.weight"])
            widened[:, : unet.config["in_channels"]] = unet.conv_in.weight.detach()
            weights["conv_in.weight"] = widened
        adapter.encoder.load_state_dict({**mine, **weights})
        return adapter.to(unet.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """The latent and any maps, or pixels as they are."""
        return super().read(condition, vae) if self.config["reads"] == "latent" else condition.to(self.dtype)

    def prepare(
        self,
        condition: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> list[Tensor]:
        """h_eta(c): independent of z_t and t, so once per image. The copied encoder's time input is held at 0."""
        zero = torch.zeros(1, dtype=torch.long, device=condition.device)
        return unet_down(self.encoder, condition, zero, text, added, self.timestep_cond(guidance))[0]

    def fuse(self, features: list[Tensor], seen: list[Tensor], strength: float) -> list[Tensor]:
        """(1 - mu) h + mu h_eta, with mu scaled by `strength` (0 gives the backbone exactly)."""
        return [
            torch.lerp(h, e.to(h.dtype).expand_as(h), (strength * mu).to(h.dtype).view(1, -1, 1, 1).expand_as(h))
            for h, e, mu in zip(features, seen, self.mu, strict=True)
        ]


class ControlNetAdapter(_Form):
    """diffusers' ControlNet behind the same interface. `downscale`: pixels a latent."""

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        condition_channels: int = 3,
        downscale: int = 8,
        guidance_scales: int = 0,
        jumps: bool = False,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        blank: Any = UNet2DConditionModel.from_config(unet)
        self.net = ControlNetAdapter._build(blank, condition_channels, downscale)
        self._add_inputs(guidance_scales, jumps, unet)

    @staticmethod
    def _build(unet: UNet2DConditionModel, condition_channels: int, downscale: int) -> ControlNetModel:
        return ControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=_entry_widths(downscale),
            conditioning_channels=condition_channels,
        )

    @classmethod
    def from_backbone(
        cls,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        jumps: bool = False,
    ) -> Self:
        """The encoder starts as a copy of the backbone's behind zero convolutions."""
        adapter = cls(_architecture(unet), condition_channels, codec.downscale(vae), guidance_scales, jumps)
        built = cls._build(unet, condition_channels, codec.downscale(vae))
        adapter.net.load_state_dict(built.state_dict())
        return adapter.to(unet.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """A ControlNet reads pixels itself."""
        return condition.to(self.dtype)

    def look(
        self, prepared: Tensor, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        """zero_conv(h_copy(z_t, t, c))."""
        timestep = timestep.to(z.device).expand(z.shape[0])
        down, middle = self.net(z, timestep, text, prepared, added_cond_kwargs=added, return_dict=False)
        return [*down, middle]

    def fuse(self, features: list[Tensor], seen: list[Tensor], strength: float) -> list[Tensor]:
        """h + strength * zero_conv(h_copy(z_t, t, c))."""
        return [h + strength * r for h, r in zip(features, seen, strict=True)]


class HintAdapter(_Form):
    """The condition's latent through two convolutions, the second zero at first, added to the U-Net's input features:
    channel concatenation (SR3, InstructPix2Pix) as an adapter. Without low-rank updates it can do little."""

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        condition_channels: int = 3,
        guidance_scales: int = 0,
        jumps: bool = False,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        width, channels = unet["block_out_channels"][0], unet["in_channels"] + condition_channels - 3
        self.entry = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        nn.init.zeros_(self.entry[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.entry[2].bias)  # type: ignore[arg-type]
        self._add_inputs(guidance_scales, jumps, unet)

    def prepare(self, condition: Tensor, *_: Any) -> Tensor:
        """What is added: independent of z_t and t, so once per image."""
        return self.entry(condition)

    def hint(self, prepared: Tensor, strength: float) -> Tensor:
        """The condition's features, scaled."""
        return strength * prepared


class LoraAdapter(_Form):
    """No condition: low-rank updates of the backbone and distilled guidance, which plain acceleration needs. It fits
    any fine-tune of its backbone, as consistency LoRAs do (LCM-LoRA, Luo et al. 2023)."""

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        condition_channels: int = 3,
        guidance_scales: int = 1,
        jumps: bool = False,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._add_inputs(max(1, guidance_scales), jumps, unet)  # a file of weights cannot be empty

    def read(self, condition: Tensor, vae: AutoencoderKL) -> Tensor:
        """Nothing to read."""
        return condition[:, :0]


Adapter = FusedAdapter | ControlNetAdapter | HintAdapter | LoraAdapter
FORMS: dict[str, type[Adapter]] = {
    "fused": FusedAdapter,
    "controlnet": ControlNetAdapter,
    "hint": HintAdapter,
    "lora": LoraAdapter,
}
