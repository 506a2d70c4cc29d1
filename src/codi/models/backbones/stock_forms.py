"""What export asks of a family: where stock diffusers has a place for an adapter, and how its pipelines are called."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


class StockForms:
    """A part of `base.Family`; the defaults are those of a family with no place for a condition."""

    name: str
    network_kind: str = "transformer"
    """What messages call the network."""
    formats: tuple[str, ...] = ("diffusers",)
    """What `codi export --to` writes for it."""
    takes_pictures: bool = False
    """Whether the stock pipelines take a condition as a picture, and its size. Others are given a tensor and a size."""
    time_layer: str
    """The linear layer by which a constant is added to the time embedding; see `time_constant`."""
    passes_sigmas: bool = True
    """Whether the stock pipelines give the scheduler evenly spaced sigmas from 1 to 1 / steps. Otherwise it takes its
    own, which end near 0."""
    dynamic_by_config: bool = True
    """Whether the scheduler's base_shift and max_shift are what the stock pipelines shift by, with dynamic shifting."""
    control_pipeline: str | None = None
    """diffusers' pipeline for a condition beside the latent; see `control_lora`."""
    stock_controlnet: bool = False
    """Whether diffusers has a pipeline that samples with its ControlNets as `predict` does."""

    draws_condition: bool = True
    """Whether they draw the condition's latent from the VAE's posterior, whose mean codi takes."""
    control_argument: str = "control_image=condition"
    """How a call gives the stock pipelines a tensor `condition` in [0, 1], which some expect in [-1, 1]."""

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        """Return what `time_layer` is given at these timesteps (B,), (B, W)."""
        raise NotImplementedError

    def time_constant(self, network: Any, extra: Tensor) -> Tensor:
        """Return what `time_layer` has to give more, for `extra` of `predict` (W,) to be added."""
        return extra

    def loading_arguments(self, parts: Any) -> list[str]:
        """Return the arguments, as code, with which the stock pipeline of such `parts` is loaded, besides the model."""
        names = inspect.signature(self.pipeline_for(parts).__init__).parameters  # type: ignore[attr-defined]
        return [f"{name}=None" for name in names if getattr(parts, name, 0) is None]  # e.g. SD3's third text encoder

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        """Return why no stock pipeline samples with this ControlNet as `predict` does; None: one does."""
        return None if self.stock_controlnet else f"diffusers has no ControlNet pipeline for {self.name}"

    def control_lora(self, entry: Any) -> dict[str, Tensor]:
        """Return the low-rank update of the patch embedding by which `control_pipeline` computes what `entry`, of
        `hint_entry`, adds for a picture."""
        raise NotImplementedError

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        """Return the arguments of a stock pipeline's call for classifier-free guidance of `scale`, 1 for none, and for
        embedded guidance, None for the default."""
        return {"guidance_scale": scale}
