"""Adapters, which turn a text-to-image network into an image-conditioned one. Zero influence before training.

Four forms. `FusedAdapter` is CoDi's: a copy of the first half of the network reads only the condition, so its
features are computed once per image, and each backbone feature h_theta(z_t) becomes

    h'(z_t) = (1 - mu) h_theta(z_t) + mu h_eta(c),        mu = 0 at the start.

`ControlNetAdapter` wraps diffusers' ControlNet: a copy that also reads z_t and t, so it runs at every step, and adds
its features through zero-initialized layers. `HintAdapter` is the cheapest one: the condition's latent is added to the
network's input features, and low-rank updates of the backbone learn to use it; no other network runs. `LoraAdapter` has
no condition: it only makes the backbone faster.

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
    """Return the configuration of a network and its class name, as stored in an adapter's config."""
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return {"_class_name": type(network).__name__, **config}


class _AdapterBase(ModelMixin, ConfigMixin):
    """Base class of all forms. Common arguments: `network`, the backbone network's config; `condition_channels`, 3 for
    a picture, more when maps (a mask) follow it; `guidance_scales`, the number of distilled guidance scales;
    `target_time`, True if the target time is an input; `info`, metadata (task, steps, backbone family, recipe,
    metrics), kept in config.json. Only in older files: `unet`, the former name of `network`; `jumps`, True if the
    target time is given as a fraction of the remaining time."""

    config_name = "config.json"
    guidance: GuidanceEmbedding | None
    jump: TargetTimeEmbedding | JumpEmbedding | None
    kind: Family

    def _set_family(self, network: Mapping[str, Any] | None, unet: Mapping[str, Any] | None) -> dict[str, Any]:
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
        """Return a new adapter for this backbone, without influence before training."""
        form: Any = cls
        inputs: Any = {"guidance_scales": guidance_scales, "target_time": target_time}
        return form(network_config(network), condition_channels, **inputs).to(network.device)

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Map a condition (B, C, H, W) in [0, 1] to the picture's latent, followed by any maps, (B, ..., h, w)."""
        with torch.no_grad():
            latent = codec.encode(vae, condition[:, :3])
            if condition.shape[1] == 3:
                return latent.contiguous()  # a view of the posterior, whose memory layout convolutions would keep
            maps = nn.functional.avg_pool2d(condition[:, 3:], codec.downscale(vae))
            return torch.cat([latent, maps.to(latent)], dim=1)

    def prepare(
        self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> Any:
        """Compute, once per image, everything that does not depend on z_t; `condition` is the output of `read`."""
        return condition

    def time_condition(self, guidance: Tensor | None, jump: Tensor | None = None) -> Tensor | None:
        """Return the embedding (B, W) of guidance scales (B, k) and jumps (B, 2), to be added to the time embedding, or
        None."""
        parts = [
            embed(value)
            for embed, value in ((self.guidance, guidance), (self.jump, jump))
            if embed is not None and value is not None
        ]
        return torch.stack(parts).sum(0) if parts else None

    def hint(self, prepared: Any, strength: float) -> Tensor | None:
        """Return the tensor to be added to the network's input features, or None."""
        return None

    def step_features(
        self, prepared: Any, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> Any:
        """Compute, once per step, the features for `fuse` from the output of `prepare` and z_t."""
        return prepared

    def fuse(self, index: int, feature: Tensor, adapter_features: Any, strength: float) -> Tensor:
        """Return the backbone's feature number `index` (see Family.predict) combined with the adapter's, which are the
        output of `step_features`."""
        return feature


READS = ("latent", "pixels")


class FusedAdapter(_AdapterBase):
    """CoDi's condition encoder h_eta and fusion weights mu.

    mu has one number per feature channel (the paper leaves its shape open; per channel includes per layer). `reads`:
    the encoder's input, the condition's "latent" by the VAE, which keeps the content of a picture, or its "pixels" by a
    few convolutions like ControlNet's, which are as good for a map of depth or edges and save the VAE's encoder.
    `downscale`: pixels per latent cell. `depth`: the number of encoder blocks of a transformer, by default half of the
    network's.
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
        config = self._set_family(network, unet)
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
        """Return an adapter whose encoder is a copy of the backbone's; its weights for extra condition channels start
        at zero, its convolutions over pixels at random."""
        shape = (network_config(network), condition_channels, guidance_scales, target_time)
        adapter = cls(*shape, reads=reads, downscale=codec.downscale(vae), depth=depth)
        weights = adapter.kind.encoder_weights(network, adapter.encoder, reads)
        adapter.encoder.load_state_dict({**adapter.encoder.state_dict(), **weights})
        return adapter.to(network.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Return the latent and any maps, or the pixels unchanged."""
        return super().read(condition, vae) if self.config["reads"] == "latent" else condition.to(self.dtype)

    def prepare(
        self, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None, guidance: Tensor | None = None
    ) -> list[Tensor]:
        """Return h_eta(c), which depends neither on z_t nor t. The encoder's time input is held at 0."""
        return self.kind.features(self.encoder, condition, text, added, self.time_condition(guidance))

    def fuse(self, index: int, feature: Tensor, adapter_features: list[Tensor], strength: float) -> Tensor:
        """Return (1 - mu) h + mu h_eta, with mu scaled by `strength` (0 is exactly the backbone)."""
        if index >= len(adapter_features):
            return feature
        shape = [1] * feature.ndim
        shape[self.kind.channel_dim] = -1
        weight = (strength * self.mu[index]).to(feature.dtype).view(shape).expand_as(feature)
        return torch.lerp(feature, adapter_features[index].to(feature.dtype).expand_as(feature), weight)


class ControlNetAdapter(_AdapterBase):
    """diffusers' ControlNet behind the same interface. `downscale`: pixels per latent cell."""

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
        self._network_config = self._set_family(network, unet)
        self.net: Any = self.kind.new_controlnet(None, self._network_config, condition_channels, downscale)
        self._add_inputs(guidance_scales, target_time, jumps, self._network_config)

    @classmethod
    def from_backbone(
        cls, network: Any, vae: Any, condition_channels: int = 3, guidance_scales: int = 0, target_time: bool = False
    ) -> Self:
        """Return a ControlNet that is a copy of the backbone's first part, followed by zero-initialized layers."""
        config, downscale = network_config(network), codec.downscale(vae)
        adapter = cls(config, condition_channels, downscale, guidance_scales, target_time)
        initialized = adapter.kind.new_controlnet(network, config, condition_channels, downscale)
        adapter.net.load_state_dict(initialized.state_dict())
        return adapter.to(network.device)  # type: ignore[arg-type]

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Return the pixels, which the ControlNet of a U-Net encodes itself, or the latent."""
        return condition.to(self.dtype) if self.kind.control_reads == "pixels" else super().read(condition, vae)

    def step_features(
        self, prepared: Tensor, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None
    ) -> list[Tensor | None]:
        """Return zero_layer(h_copy(z_t, t, c)) for each feature."""
        return self.kind.control(self._network_config, self.net, prepared, z, timestep, text, added)

    def fuse(self, index: int, feature: Tensor, adapter_features: list[Tensor | None], strength: float) -> Tensor:
        """Return h + strength * zero_layer(h_copy(z_t, t, c))."""
        residual = adapter_features[index]
        return feature if residual is None else feature + strength * residual


class HintAdapter(_AdapterBase):
    """The condition's latent, passed through zero-initialized layers and added to the network's input features: channel
    concatenation (SR3, InstructPix2Pix, Control-LoRA) as an adapter. It needs low-rank updates to have much effect."""

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
        config = self._set_family(network, unet)
        self.entry: Any = self.kind.hint_entry(config, condition_channels)
        self._add_inputs(guidance_scales, target_time, jumps, config)

    def prepare(self, condition: Tensor, *_: Any) -> Tensor:
        """Return the hint, which depends neither on z_t nor t."""
        return self.entry(condition)

    def hint(self, prepared: Tensor, strength: float) -> Tensor:
        """Return the hint scaled by `strength`."""
        return strength * prepared


class LoraAdapter(_AdapterBase):
    """Low-rank updates of the backbone and distilled guidance, without a condition, for acceleration alone. It fits any
    fine-tune of its backbone, as consistency LoRAs do (LCM-LoRA, Luo et al. 2023)."""

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
        config = self._set_family(network, unet)
        # At least one guidance scale, because a file of weights cannot be empty.
        self._add_inputs(max(1, guidance_scales), target_time, jumps, config)

    def read(self, condition: Tensor, vae: Any) -> Tensor:
        """Return an empty tensor: there is no condition to read."""
        return condition[:, :0]


Adapter = FusedAdapter | ControlNetAdapter | HintAdapter | LoraAdapter
FORMS: dict[str, type[Adapter]] = {
    "fused": FusedAdapter,
    "controlnet": ControlNetAdapter,
    "hint": HintAdapter,
    "lora": LoraAdapter,
}
