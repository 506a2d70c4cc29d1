"""The base of all families of flow-matching transformers: image tokens as a residual stream through the blocks.

`predict` follows the stock forward pass block by block, so that an adapter can change the stream between two blocks. A
family's file defines how the stream starts, how a block is called and how the stream ends; tests compare the result
with the stock network's.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import UserError
from ...schedule import FlowSchedule, Schedule
from .. import codec
from .base import Family, Fuse


@dataclass
class Stream:
    """The state passed from block to block: `image` (B, N, W) tokens and `text` (B, L, W) tokens or None; and
    constants: `time` (B, W'), the time embedding, `grid`, the rows and columns of image tokens, and the family's own in
    `rest`."""

    image: Tensor
    text: Tensor | None
    time: Tensor
    grid: tuple[int, int]
    rest: dict[str, Any] = field(default_factory=dict)


class TokenEntry(nn.Module):
    """A patch embedding of a condition (B, C, h, w) as (B, N, W) tokens, in place of a network's own."""

    def __init__(self, channels: int, width: int, patch: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and their rows and columns."""
        tokens = self.conv(condition)
        return tokens.flatten(2).transpose(1, 2), tuple(tokens.shape[-2:])  # type: ignore[return-value]


class PixelEntry(nn.Module):
    """An embedding of a condition's pixels as tokens, by ControlNet's convolutions down to one position per token."""

    def __init__(self, channels: int, width: int, pixels: int) -> None:
        super().__init__()
        widths = (16, 32, 96, 256, 256, 256, 256)[: pixels.bit_length()]
        self.conv = ControlNetConditioningEmbedding(width, channels, widths)
        self.conv.conv_out.reset_parameters()  # not zero as in a ControlNet: the fusion weights are zero already

    forward = TokenEntry.forward


class HintEntry(TokenEntry):
    """A zero-initialized embedding of a condition's latent, to be added to the input tokens."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__(channels, width, patch, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(condition)[0]


class TransformerFamily(Family):
    """The loop over blocks, condition encoders and schedules that the families have in common."""

    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|net\.0\.proj|net\.2)"
    entry_name = "x_embedder"
    """The network's patch embedding, which a condition encoder replaces."""
    unused: tuple[str, ...] = ("norm_out", "proj_out")
    """Modules that a condition encoder does not need."""
    time_embedder: str = "time_text_embed"
    """The module that embeds the timestep."""

    # ---- defined by each family

    @abstractmethod
    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        """Return the stream before the first block; `tokens` (B, N, W) are those of `embed`, plus any hint."""

    @abstractmethod
    def blocks(self, network: Any) -> list[nn.Module]:
        """Return the blocks in order."""

    @abstractmethod
    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Call one block; return its image and text tokens."""

    @abstractmethod
    def finish(self, network: Any, stream: Stream) -> Tensor:
        """Return the output (B, C, h, w) of the last block's stream."""

    @abstractmethod
    def embed(self, network: Any, z: Tensor) -> Tensor:
        """Return the tokens (B, N, W) of a latent."""

    @abstractmethod
    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        """Return the patch embedding's weights as those of a convolution over the latent: weight (W, C, p, p), bias."""

    @abstractmethod
    def shortened(self, config: Any, depth: int | None) -> Any:
        """Return an untrained network of that `config` with only the first `depth` (None: half) of its blocks."""

    @abstractmethod
    def width(self, config: Any) -> int:
        """Return the number of channels of image tokens."""

    @abstractmethod
    def latent_channels(self, config: Any) -> int:
        """Return the number of channels of the latent."""

    # ---- common to all families

    def require_scheduler(self, scheduler: Any, name: str) -> None:
        try:
            flow_schedule(scheduler.config, 1.0, None)
        except UserError as error:
            raise UserError(f"{name}/{error}") from error

    def patch(self, config: Any) -> int:
        return 2

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        c = network.config
        blocks = "+".join(str(c[name]) for name in ("num_layers", "num_single_layers") if name in c)
        return f"{self.name}-{self.latent_channels(c)}ch-f{codec.downscale(vae)}-{self.width(c)}x{blocks}-flow"

    def predict(
        self, network: Any, z: Tensor, timestep: Tensor, text: Tensor, added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None, hint: Tensor | None = None, fuse: Fuse | None = None,
    ) -> Tensor:  # fmt: skip
        tokens = self.embed(network, z)
        tokens = tokens if hint is None else tokens + hint.to(tokens)
        patch = self.patch(network.config)
        grid = (z.shape[-2] // patch, z.shape[-1] // patch)
        stream = self.start(network, tokens, grid, self._time(timestep, z), text, added or {}, extra)
        for index, block in enumerate(self.blocks(network)):
            self._run_block(network, block, stream)
            if fuse is not None:
                stream.image = fuse(index, stream.image)
        return self.finish(network, stream)

    def features(
        self, encoder: Any, condition: Tensor, text: Tensor, added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        tokens, grid = getattr(encoder, self.entry_name)(condition)
        zero = self._time(torch.zeros(1, device=condition.device), condition)
        stream = self.start(encoder, tokens, grid, zero, text, added or {}, extra)
        features = []
        for block in self.blocks(encoder):
            self._run_block(encoder, block, stream)
            features.append(stream.image)
        return features

    def _run_block(self, network: Any, block: Any, stream: Stream) -> None:
        if network.gradient_checkpointing and torch.is_grad_enabled():
            constant = copy.copy(stream)  # recomputation must not use changes by later blocks
            stream.image, stream.text = checkpoint(
                self.run, block, stream.image, stream.text, constant, use_reentrant=False
            )  # type: ignore[misc]
        else:
            stream.image, stream.text = self.run(block, stream.image, stream.text, stream)

    @staticmethod
    def _time(timestep: Tensor, like: Tensor) -> Tensor:
        return timestep.to(device=like.device, dtype=torch.float32).expand(like.shape[0])

    def depth(self, config: Any, depth: int | None) -> int:
        """Return the number of blocks of a condition encoder: `depth`, at most all, or half of the network's."""
        blocks = config["num_layers"] + config.get("num_single_layers", 0)
        return min(depth or -(-blocks // 2), blocks)

    def encoder(self, config: Any, channels: int, reads: str, downscale: int, depth: int | None) -> nn.Module:
        encoder, width, patch = self.shortened(config, depth), self.width(config), self.patch(config)
        if reads == "pixels":
            entry: nn.Module = PixelEntry(channels, width, downscale * patch)
        else:
            entry = TokenEntry(self.latent_channels(config) + channels - 3, width, patch)
        setattr(encoder, self.entry_name, entry)
        for name in self.unused:
            delattr(encoder, name)
        return encoder

    def encoder_weights(self, network: Any, encoder: Any, reads: str) -> dict[str, Tensor]:
        own, weights = encoder.state_dict(), network.state_dict()
        copied = {k: v for k, v in weights.items() if k in own and not k.startswith(f"{self.entry_name}.")}
        if reads == "latent":
            for name, value in self.embedding_weights(network).items():
                key = f"{self.entry_name}.conv.{name}"
                if value.ndim > 1:  # channels of further maps start at zero
                    padding = own[key].shape[1] - value.shape[1]
                    value = torch.cat([value, value.new_zeros(len(value), padding, *value.shape[2:])], dim=1)
                copied[key] = value
        return copied

    def feature_widths(self, config: Any, depth: int | None) -> list[int]:
        return [self.width(config)] * self.depth(config, depth)

    def time_width(self, config: Any) -> int:
        return self.width(config)

    def hint_entry(self, config: Any, channels: int) -> nn.Module:
        return HintEntry(self.latent_channels(config) + channels - 3, self.width(config), self.patch(config))

    # ---- export

    @property
    def time_layer(self) -> str:  # type: ignore[override]
        return f"{self.time_embedder}.timestep_embedder.linear_2"

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        embedder = network.get_submodule(self.time_embedder)
        inner = embedder.timestep_embedder
        return inner.act(inner.linear_1(embedder.time_proj(self.time_argument(network, timesteps.float()))))

    def time_argument(self, network: Any, timesteps: Tensor) -> Tensor:
        """Return the time embedder's input for timesteps."""
        return timesteps

    def refuse_maps(self, channels: int) -> None:
        """Raise UserError for a condition with maps beside the picture, which stock ControlNets do not take."""
        if channels != 3:
            raise UserError(f"adapter controlnet: {self.name}'s ControlNet takes only a picture, and this task has "
                            "a mask too: use adapter fused or hint")  # fmt: skip

    def schedule(self, scheduler: Any, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        """Return the schedule of a FlowMatchEulerDiscreteScheduler, whose shift is static or depends on the number of
        tokens."""
        return flow_schedule(scheduler.config, self.shift_exponent(scheduler.config, cells, steps), steps)

    def shift_exponent(self, config: Any, cells: tuple[int, int], steps: int | None) -> float:
        """Return mu of dynamic shifting, which is linear in the number of tokens in the stock pipelines."""
        tokens = cells[0] * cells[1] / 4
        min_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        min_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (max_shift - min_shift) / (max_tokens - min_tokens)
        return tokens * slope + min_shift - slope * min_tokens


def spread(samples: Sequence[Tensor] | None, count: int) -> list[Tensor | None]:
    """Return, for each of `count` blocks, the output of a ControlNet that diffusers' transformers add after it."""
    if not samples:
        return [None] * count
    interval = -(-count // len(samples))
    return [samples[index // interval] for index in range(count)]


def flow_schedule(config: Any, mu: float, steps: int | None) -> FlowSchedule:
    """Return the schedule of a FlowMatchEulerDiscreteScheduler's config; `mu` is used only with dynamic shifting.

    We compute the sigmas ourselves, because `set_timesteps(n)` of diffusers 0.42 shifts a static shift's sigmas twice
    (diffusers #13243). Raises UserError for a scheduler without flow shift and for options that are not supported.
    """
    if "shift" not in config and "flow_shift" not in config:
        raise UserError(f"scheduler: a {config.get('_class_name')} has no flow shift, and this network predicts flow: "
                        "use the checkpoint's own FlowMatchEulerDiscreteScheduler")  # fmt: skip
    if "flow_shift" in config and not (
        config.get("use_flow_sigmas") and config.get("prediction_type") == FlowSchedule.prediction
    ):
        raise UserError(f"scheduler: a {config.get('_class_name')} that is not for flow matching: set use_flow_sigmas "
                        f"to true and prediction_type to {FlowSchedule.prediction}")  # fmt: skip
    spacings = [f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")]
    unsupported = [name for name in (*spacings, "invert_sigmas", "stochastic_sampling") if config.get(name)]
    if unsupported:
        raise UserError(f"scheduler: {unsupported[0]} is not supported for flow matching: set it to false")
    shift = config.get("shift", config.get("flow_shift"))
    if config.get("use_dynamic_shifting"):
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return FlowSchedule(float(shift), config.get("shift_terminal"), steps)


def require_channels(parts: Any, name: str, channels: int) -> None:
    """Raise UserError if the network's number of latent channels, `channels`, is not the VAE's."""
    latent = codec.channels(parts.vae)
    if channels != latent:
        raise UserError(
            f"{name}: its network takes {channels} channels where latents have {latent}, as fill and control variants "
            "do: use the text-to-image model, and train the task as an adapter"
        )
