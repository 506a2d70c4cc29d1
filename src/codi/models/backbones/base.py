"""The protocol of a backbone family: everything that the rest of the library needs from a pretrained diffusion model.

A family is one stateless object, defined in one file. It defines how prompts are encoded, how the network is called,
which of its features an adapter can change, and how its scheduler spaces the steps. The file hides the family's own
conventions: the scale of the timestep, the sign of the output, packing of latents into tokens, positions.

The rest of the library uses one convention: a latent is (B, C, h, w) of about unit variance, a timestep is what
`Schedule.timestep` returns, and the network's output is what `Schedule.signal_noise` takes.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ...errors import UserError
from ...schedule import Schedule
from .. import codec
from ..hooks import device_of
from ..text import PromptEncoder, limit_tokenizers
from .stock import opener, stock
from .stock_forms import StockForms

# (index of a feature, the feature) -> the feature combined with the adapter's.
Fuse = Callable[[int, Tensor], Tensor]


def named_parts(parts: Any) -> dict[str, Any]:
    """Return the components and settings of a Backbone or a pipeline, by name."""
    return {**getattr(parts, "config", {}), **vars(parts)}


class Family(StockForms, ABC):
    """One family of backbones. `parts` is a Backbone, or a pipeline with components of the same names."""

    name: str
    """For messages, e.g. "FLUX.1"."""
    component: str = "transformer"
    """The network's name in diffusers' pipelines."""
    network: str
    """The network's class in diffusers, by name: classes are imported when first used, as importing all takes
    seconds."""
    pipelines: tuple[str, ...]
    """diffusers' text-to-image pipelines of the family; the first one loads folders."""
    control_reads: str = "latent"
    """The form in which its ControlNet takes the condition: "latent" or "pixels"."""
    lora_targets: str
    """A regular expression for the names of layers that low-rank updates change."""
    block_classes: tuple[str, ...] = ()
    """Classes of the blocks that sharded training gathers one at a time; see `sharded_blocks`."""
    channel_dim: int = -1
    """The dimension of a feature that counts channels."""
    file_key: str | None = None
    """A key suffix that identifies a single file of the network in its authors' layout."""
    samplers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """Classes of its checkpoints' schedulers whose steps codi's own sampler implements."""
    embedded_guidance: float = 1.0
    """The default of the guidance scale that some networks of the family take as an input (not classifier-free)."""

    # ---- loading

    def require_pipeline(self, pipeline: str, source: str) -> None:
        """Raise UserError for a pipeline class, from a model_index.json, that is not text-to-image."""
        if pipeline not in (*self.pipelines, "CoDiPipeline"):
            raise UserError(f"{source}: a {pipeline} takes more than noise and a prompt, as edit, fill and control "
                            f"variants do: use the text-to-image model of {self.name}, and train the task as an "
                            "adapter")  # fmt: skip

    def open_folder(self, source: str, index: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        """Return diffusers' pipeline of a folder or hub id; `index` is its model_index.json."""
        return opener(self.pipelines[0]).from_pretrained(source, dtype=dtype, use_safetensors=True, **options)

    def holds(self, keys: set[str]) -> bool:
        """Return True if a single file with these keys is of this family."""
        return bool(self.file_key) and any(key.endswith(self.file_key) for key in keys)  # type: ignore[arg-type]

    def open_file(self, path: Path, keys: set[str], dtype: torch.dtype, fetching: dict[str, Any]) -> Any:
        """Return diffusers' pipeline of a single file that has only the network; the other components are those of
        `config` in `fetching`, a folder or hub id of the same family."""
        config = fetching.pop("config", None)
        if config is None:
            raise UserError(f"{path}: has a network of {self.name} alone: pass config (--config), a folder or hub id "
                            "with its text encoders and VAE")  # fmt: skip
        network_class: Any = stock(self.network)
        network = network_class.from_single_file(
            path.as_posix(), config=config, subfolder=self.component, torch_dtype=dtype, **fetching
        )
        index: Any = diffusers.DiffusionPipeline.load_config(config, **fetching)
        self.require_pipeline(str(index.get("_class_name")), str(config))
        return self.open_folder(config, index, dtype, {self.component: network, **fetching})

    def require_scheduler(self, scheduler: Any, name: str) -> None:  # noqa: B027
        """Raise UserError for a scheduler of the wrong kind."""

    @abstractmethod
    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        """Return a name for the checkpoints that an adapter fits: architecture, latent space and prediction type."""

    def sharded_blocks(self) -> tuple[str, ...]:
        """Return `block_classes`, by default the blocks in diffusers' `_no_split_modules`."""
        names = stock(self.network)._no_split_modules
        return self.block_classes or tuple(name for name in names if name.endswith("Block"))

    def sample_size(self, network: Any, vae: Any) -> int:
        """Return the side, in latent cells, of pictures that the network was trained on: from its configuration or, if
        that has none, as FLUX's, from the VAE's."""
        return network.config.get("sample_size") or (vae.config.get("sample_size") or 1024) // codec.downscale(vae)

    def patch(self, config: Any) -> int:
        """Return the number of latent cells along a side of one token."""
        return 1

    text_parts: tuple[str, ...] = ("text_encoder",)
    """The text encoders that prompts need."""

    def require_text(self, parts: Any, name: str) -> None:
        """Raise UserError for a checkpoint without one of its text encoders."""
        for part in self.text_parts:
            if getattr(parts, part) is None:
                raise UserError(f"{name}: has no {part}, so prompts cannot be read: fetch the whole model")

    def require_usable(self, parts: Any, name: str) -> None:  # noqa: B027 - some families have no special case
        """Raise UserError for a checkpoint of the family that is not a text-to-image model."""

    def pipeline_for(self, parts: Any) -> Any:
        """Return the class of diffusers' text-to-image pipeline for these parts."""
        return stock(self.pipelines[0])

    def build_pipeline(self, parts: Any) -> Any:
        """Return diffusers' own text-to-image pipeline with the same components, not copies."""
        pipeline_class, values = self.pipeline_for(parts), named_parts(parts)
        names = [name for name in inspect.signature(pipeline_class.__init__).parameters if name in values]
        return pipeline_class(**{name: values[name] for name in names})

    def prepare_parts(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Return the loaded components with the changes that codi needs."""
        return parts

    # ---- prompts and schedule

    @abstractmethod
    def prompts(self, parts: Any) -> PromptEncoder:
        """Return the encoder of prompts."""

    @abstractmethod
    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape, without the batch, of each prompt tensor that the network takes."""

    @abstractmethod
    def schedule(self, scheduler: Any, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        """Return the noise schedule for latents of `cells` (h, w). Some schedulers depend on the number of steps."""

    def usual_steps(self, parts: Any) -> int | None:
        """Return the number of steps to assume for `schedule` in training; None if the schedule does not depend on
        it."""
        return None

    def solver(self, scheduler: Any) -> Any:
        """Return the checkpoint's scheduler if it must sample the plain backbone, or None for codi's own sampler."""
        return None

    def own_grid(self, scheduler: Any, schedule: Schedule, steps: int) -> Tensor:
        """Return the `steps` + 1 times of the checkpoint's own scheduler, noisiest first."""
        return schedule.horizon * torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def with_embedded_guidance(
        self, network: Any, added: dict[str, Tensor] | None, scale: float | None, count: int
    ) -> dict[str, Tensor] | None:
        """Add the embedded guidance scale (None: the family's default) to the tensors of `count` prompts, if the
        network has this input. Raises UserError for a scale that the network does not take."""
        if not network.config.get("guidance_embeds"):
            if scale is not None:
                raise UserError(f"embedded_guidance {scale:g}: this {self.name} has no such input: leave it out")
            return added
        value = self.embedded_guidance if scale is None else scale
        return {**(added or {}), "embedded_guidance": torch.full((count,), value, device=device_of(network))}

    def require_guidance(self, parts: Any, scale: float) -> None:  # noqa: B027
        """Raise UserError if the checkpoint was not trained for classifier-free guidance of this `scale`, not 1."""

    def guide(self, with_: Tensor, without: Tensor, scale: float) -> Tensor:
        """Combine two outputs of the network by classifier-free guidance."""
        return without + scale * (with_ - without)

    def to_stock(self, z: Tensor) -> Tensor:
        """Return a latent (B, C, h, w) in the layout of the stock pipeline's argument `latents`."""
        return z

    def from_stock(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        """Return the latent (B, C, h, w) of `cells` (h, w), given in the layout of `to_stock`."""
        return latents

    # ---- the network

    @abstractmethod
    def predict(
        self,
        network: Any,
        z: Tensor,
        timestep: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None,
        hint: Tensor | None = None,
        fuse: Fuse | None = None,
    ) -> Tensor:
        """Return the network's output (B, C, h, w) at z (B, C, h, w).

        `timestep` (B,) or (1,); `text` (B, L, D) and `added`, further tensors of the prompts; `extra` (B, W), with W
        from `time_width`, is added to the time embedding; `hint` to the input features; `fuse` replaces each feature
        that an adapter may change. If these three are None, the result is exactly the network's.
        """

    @abstractmethod
    def features(
        self,
        encoder: Any,
        condition: Tensor,
        text: Tensor,
        added: dict[str, Tensor] | None = None,
        extra: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the features of a condition encoder (see `encoder`) at time 0, in the order in which `predict` passes
        the network's features to `fuse`."""

    @abstractmethod
    def encoder(self, config: Any, channels: int, reads: str, downscale: int, depth: int | None) -> nn.Module:
        """Return a condition encoder: the untrained first half (or `depth` blocks) of a network of that `config`.

        `channels` of the condition in pixels: 3, and one for each further map. `reads`: its input, "latent" (the
        latent's channels plus maps) or "pixels". `downscale`: pixels per latent cell.
        """

    @abstractmethod
    def encoder_weights(self, network: Any, encoder: Any, reads: str) -> dict[str, Tensor]:
        """Return the weights to copy from `network` to `encoder` before training; others keep their initial values."""

    @abstractmethod
    def feature_widths(self, config: Any, depth: int | None) -> list[int]:
        """Return the number of channels of each tensor in `features`."""

    @abstractmethod
    def time_width(self, config: Any) -> int:
        """Return the width of `extra`."""

    @abstractmethod
    def hint_entry(self, config: Any, channels: int) -> nn.Module:
        """Return a module, zero-initialized, that maps a condition's latent (B, channels, h, w) to a `hint`."""

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        """Return diffusers' ControlNet for `network` (None: untrained, for a network of that `config`), with outputs
        that are zero before training. Raises UserError if the family has none for this number of `channels`."""
        raise UserError(
            f"adapter controlnet: diffusers has no ControlNet for {self.name}: use adapter fused, hint or lora"
        )

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the tensors that a ControlNet adds to each feature of `predict`, or None. `config`: the network's."""
        raise NotImplementedError


@dataclass
class Backbone:
    """The components of a checkpoint, of diffusers and transformers classes, named as in diffusers' pipelines."""

    vae: Any
    unet: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool = True
    transformer: Any = None
    text_encoder_3: Any = None
    tokenizer_3: Any = None
    is_distilled: bool = False
    """True for FLUX.2 klein if distilled to a few steps, without classifier-free guidance."""

    def __post_init__(self) -> None:
        limit_tokenizers(vars(self))

    @property
    def network(self) -> Any:
        """The denoising network."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def kind(self) -> Family:
        """The family of the network."""
        from .registry import family_of

        return family_of(self.network)

    @property
    def text(self) -> PromptEncoder:
        """The encoder of prompts."""
        return self.kind.prompts(self)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The components that are networks."""
        return (self.vae, self.network, *self.text.encoders)

    @property
    def schedule(self) -> Schedule:
        """The noise schedule at the size that the network was trained at."""
        side = self.kind.sample_size(self.network, self.vae)
        return self.schedule_for((side, side))

    def schedule_for(self, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        """Return the noise schedule for latents of `cells` (h, w)."""
        return self.kind.schedule(self.scheduler, cells, steps or self.kind.usual_steps(self))

    @property
    def family(self) -> str:
        """The name of the checkpoints that an adapter of this one fits; see `Family.fingerprint`."""
        return self.kind.fingerprint(self.network, self.vae, self.scheduler)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Backbone:
        for part in self.modules:
            part.to(device=device, dtype=dtype)
        return self

    def freeze(self) -> Backbone:
        for part in self.modules:
            part.requires_grad_(False).eval()
        return self

    def pipeline(self) -> Any:
        """Return diffusers' own text-to-image pipeline with the same components."""
        return self.kind.build_pipeline(self)
