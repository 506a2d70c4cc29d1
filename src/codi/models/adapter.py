"""Adapters: what turns a text-to-image network into an image-conditioned one. Zero influence before training.

Four forms. `FusedAdapter` is CoDi's: a copy of the first half of the network looks at the condition alone, so its
features are computed once per image, and each backbone feature h_theta(z_t) becomes

    h'(z_t) = (1 - mu) h_theta(z_t) + mu h_eta(c),        mu = 0 at the start.

`ControlNetAdapter` wraps diffusers' ControlNet: a copy that also sees z_t and t, so it runs at every step, and adds its
features through zero layers. `HintAdapter` is the lean one: the condition's latent is added to the network's input
features, and low-rank updates of the backbone learn to use it; nothing runs beside the backbone. `LoraAdapter` has no
condition: it only makes the backbone faster.

All forms work with every family of backbones (see backbones.base). Any form may come with low-rank updates of the
backbone (see lora) and with distilled guidance (see guidance).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from . import codec
from .backbones import Family, family_of
from .guidance import GuidanceEmbedding, JumpEmbedding, TargetTimeEmbedding


def network_config(network: Any) -> dict[str, Any]:
    """Return the configuration of a network, with its class, as adapters keep it."""
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return {"_class_name": type(network).__name__, **config}


class _Form(ModelMixin, ConfigMixin):
    """What the forms share. Arguments of all of them: `network`, the backbone network's config; `condition_channels`, 3
    for a picture, more when maps (a mask) follow it; `guidance_scales`, how many scales are distilled in;
    `target_time`, whether it has that input; `info`, what the adapter is (task, steps, backbone family, recipe,
    metrics), kept in config.json; `unet`, what `network` was called when all were U-Nets; `jumps`, of older files,
    whether the target time is given as a share of the way."""

    config_name = "config.json"
    guidance: GuidanceEmbedding | None
    jump: TargetTimeEmbedding | JumpEmbedding | None
    kind: Family

    def _begin(self, network: Mapping[str, Any] | None, unet: Mapping[str, Any] | None) -> dict[str, Any]:
        """Set the family; return the network's config."""
        config = dict(network or unet or {})
        self.kind = family_of(config)
        return config

    def _add_inputs(self, scales: int, target_time: bool, jumps: bool, config: Mapping[str, Any]) -> None:
        width = self.kind.time_width(config)
        self.guidance = GuidanceEmbedding(scales, width) if scales else None
        self.jump = TargetTimeEmbedding(width) if target_time else JumpEmbedding(width) if jumps else None

    @classmethod
    def from_backbone(
        cls, network: Any, vae: Any, condition_channels: int = 3, guidance_scales: int = 0, target_time: bool = False
    ) -> Self:
        """A new adapter of this backbone: no influence yet."""
        form: Any = cls
        inputs: Any = {"guidance_scales": guidance_scales, "target_time": target_time}
        return form(network_config(network), condition_channels, **inputs).to(network.device)

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Condition (B, C, H, W) in [0, 1] -> the picture's latent, then any maps, (B, ..., h, w)."""
        with torch.no_grad():
            latent = codec.encode(vae, condition[:, :3])
            if condition.shape[1] == 3:
                return latent.contiguous()  # a part of the posterior, which convolutions would take in another layout
            maps = nn.functional.avg_pool2d(condition[:, 3:], codec.downscale(vae))
            return torch.cat([latent, maps.to(latent)], dim=1)

    def prepare(
        self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> Any:
        """What can be computed of what was read once per image, before z_t is known."""
        return condition

    def time_condition(self, guidance: Tensor | None, jump: Tensor | None = None) -> Tensor | None:
        """Return what scales (B, k) and jumps (B, 2) add to the time embedding, (B, W); None: nothing."""
        parts = [
            embed(value)
            for embed, value in ((self.guidance, guidance), (self.jump, jump))
            if embed is not None and value is not None
        ]
        return torch.stack(parts).sum(0) if parts else None

    def hint(self, prepared: Any, strength: float) -> Tensor | None:
        """What is added to the network's input features; None: nothing."""
        return None

    def look(
        self, prepared: Any, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> Any:
        """What `fuse` takes, of what was prepared: what depends on z_t is computed here, once a step."""
        return prepared

    def fuse(self, index: int, feature: Tensor, seen: Any, strength: float) -> Tensor:
        """The backbone's feature of that number (see Family.predict), with the adapter's own in it."""
        return feature


READS = ("latent", "pixels")


class FusedAdapter(_Form):
    """CoDi's condition encoder h_eta and fusion weights mu.

    mu is one number a feature channel (the paper leaves its shape open; per channel contains per layer). `reads`: the
    condition's "latent", by the VAE, which keeps what a picture shows, or its "pixels", by a few convolutions of
    ControlNet's kind in the encoder's entry, which for a map of depth or edges is as good and saves the VAE's encoder;
    `downscale`: pixels a latent; `depth`: of a transformer, the blocks of the encoder, by default half of them all.
    """

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any] | None = None,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        target_time: bool = False,
        info: dict[str, Any] | None = None,
        reads: str = "latent",
        downscale: int = 8,
        depth: int | None = None,
        unet: dict[str, Any] | None = None,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        config = self._begin(network, unet)
        self.encoder: Any = self.kind.encoder(config, condition_channels, reads, downscale, depth)
        self.mu = nn.ParameterList(nn.Parameter(torch.zeros(w)) for w in self.kind.feature_widths(config, depth))
        self._add_inputs(guidance_scales, target_time, jumps, config)

    @classmethod
    def from_backbone(
        cls,
        network: Any,
        vae: Any,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        target_time: bool = False,
        reads: str = "latent",
        depth: int | None = None,
    ) -> Self:
        """The encoder starts as a copy of the backbone's; weights for extra condition channels start at zero, those
        that read pixels at random."""
        shape = (network_config(network), condition_channels, guidance_scales, target_time)
        adapter = cls(*shape, reads=reads, downscale=codec.downscale(vae), depth=depth)
        copied = adapter.kind.encoder_weights(network, adapter.encoder, reads)
        adapter.encoder.load_state_dict({**adapter.encoder.state_dict(), **copied})
        return adapter.to(network.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """The latent and any maps, or pixels as they are."""
        return super().read(condition, vae) if self.config["reads"] == "latent" else condition.to(self.dtype)

    def prepare(
        self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> list[Tensor]:
        """h_eta(c): independent of z_t and t, so once per image. The copied encoder's time input is held at 0."""
        return self.kind.features(self.encoder, condition, text, added, self.time_condition(guidance))

    def fuse(self, index: int, feature: Tensor, seen: list[Tensor], strength: float) -> Tensor:
        """(1 - mu) h + mu h_eta, with mu scaled by `strength` (0 gives the backbone exactly)."""
        if index >= len(seen):
            return feature
        shape = [1] * feature.ndim
        shape[self.kind.channel_dim] = -1
        weight = (strength * self.mu[index]).to(feature.dtype).view(shape).expand_as(feature)
        return torch.lerp(feature, seen[index].to(feature.dtype).expand_as(feature), weight)


class ControlNetAdapter(_Form):
    """diffusers' ControlNet behind the same interface. `downscale`: pixels a latent."""

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any] | None = None,
        condition_channels: int = 3,
        downscale: int = 8,
        guidance_scales: int = 0,
        target_time: bool = False,
        info: dict[str, Any] | None = None,
        unet: dict[str, Any] | None = None,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        self._network_config = self._begin(network, unet)
        self.net: Any = self.kind.new_controlnet(None, self._network_config, condition_channels, downscale)
        self._add_inputs(guidance_scales, target_time, jumps, self._network_config)

    @classmethod
    def from_backbone(
        cls, network: Any, vae: Any, condition_channels: int = 3, guidance_scales: int = 0, target_time: bool = False
    ) -> Self:
        """It starts as a copy of the backbone's first part behind zero layers."""
        config, downscale = network_config(network), codec.downscale(vae)
        adapter = cls(config, condition_channels, downscale, guidance_scales, target_time)
        built = adapter.kind.new_controlnet(network, config, condition_channels, downscale)
        adapter.net.load_state_dict(built.state_dict())
        return adapter.to(network.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Pixels, which the ControlNet of a U-Net reads itself, or the latent."""
        return condition.to(self.dtype) if self.kind.control_reads == "pixels" else super().read(condition, vae)

    def look(
        self, prepared: Tensor, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> list[Tensor | None]:
        """zero_layer(h_copy(z_t, t, c)) for each feature."""
        return self.kind.control(self._network_config, self.net, prepared, z, timestep, text, added)

    def fuse(self, index: int, feature: Tensor, seen: list[Tensor | None], strength: float) -> Tensor:
        """h + strength * zero_layer(h_copy(z_t, t, c))."""
        residual = seen[index]
        return feature if residual is None else feature + strength * residual


class HintAdapter(_Form):
    """The condition's latent, through layers that are zero at first, added to the network's input features: channel
    concatenation (SR3, InstructPix2Pix, Control-LoRA) as an adapter. Without low-rank updates it can do little."""

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any] | None = None,
        condition_channels: int = 3,
        guidance_scales: int = 0,
        target_time: bool = False,
        info: dict[str, Any] | None = None,
        unet: dict[str, Any] | None = None,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        config = self._begin(network, unet)
        self.entry: Any = self.kind.hint_entry(config, condition_channels)
        self._add_inputs(guidance_scales, target_time, jumps, config)

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
        network: dict[str, Any] | None = None,
        condition_channels: int = 3,
        guidance_scales: int = 1,
        target_time: bool = False,
        info: dict[str, Any] | None = None,
        unet: dict[str, Any] | None = None,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        config = self._begin(network, unet)
        self._add_inputs(max(1, guidance_scales), target_time, jumps, config)  # a file of weights cannot be empty

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Nothing to read."""
        return condition[:, :0]


Adapter = FusedAdapter | ControlNetAdapter | HintAdapter | LoraAdapter
FORMS: dict[str, type[Adapter]] = {
    "fused": FusedAdapter,
    "controlnet": ControlNetAdapter,
    "hint": HintAdapter,
    "lora": LoraAdapter,
}
