"""The part of the family protocol for export: which adapters stock diffusers supports, and how to call its
pipelines."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


class StockForms:
    """A base class of `base.Family`; the defaults are for a family whose stock pipelines take no condition."""

    name: str
    network_kind: str = "transformer"
    """The name of the network in messages."""
    formats: tuple[str, ...] = ("diffusers",)
    """The formats that `codi export --to` writes for it."""
    takes_pictures: bool = False
    """True if stock pipelines take a condition as a picture and use its size; others need a tensor and the size."""
    time_layer: str
    """The linear layer whose bias can add a constant to the time embedding; see `time_constant`."""
    passes_sigmas: bool = True
    """True if the stock pipelines pass the scheduler evenly spaced sigmas from 1 to 1 / steps. Otherwise it uses its
    own, which end near 0."""
    dynamic_by_config: bool = True
    """True if the stock pipelines use the scheduler's base_shift and max_shift for dynamic shifting."""
    control_pipeline: str | None = None
    """diffusers' pipeline that concatenates a condition to the latent; see `control_lora`."""
    stock_controlnet: bool = False
    """True if diffusers has a pipeline that uses the family's ControlNets as `predict` does."""

    draws_condition: bool = True
    """True if these pipelines sample the condition's latent from the VAE's posterior, of which codi takes the mean."""
    control_argument: str = "control_image=condition"
    """The code of the argument that passes a tensor `condition` in [0, 1] to the stock pipelines; some need [-1, 1]."""

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        """Return the input (B, W) of `time_layer` at timesteps (B,)."""
        raise NotImplementedError

    def time_constant(self, network: Any, extra: Tensor) -> Tensor:
        """Return the constant to add to the output of `time_layer` that has the effect of `extra` (W,) in `predict`."""
        return extra

    def loading_arguments(self, parts: Any) -> list[str]:
        """Return the arguments, as code, for loading the stock pipeline of `parts`, beside the model."""
        names = inspect.signature(self.pipeline_for(parts).__init__).parameters  # type: ignore[attr-defined]
        return [f"{name}=None" for name in names if getattr(parts, name, 0) is None]  # e.g. SD3's third text encoder

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        """Return the reason that no stock pipeline uses this ControlNet as `predict` does; None if one does."""
        return None if self.stock_controlnet else f"diffusers has no ControlNet pipeline for {self.name}"

    def control_lora(self, entry: Any) -> dict[str, Tensor]:
        """Return the low-rank update of the patch embedding with which `control_pipeline` adds the same hint for a
        picture as `entry`, a module from `hint_entry`."""
        raise NotImplementedError

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        """Return the arguments of a stock pipeline's call for classifier-free guidance of `scale` (1: none) and for
        `embedded` guidance (None: the default)."""
        return {"guidance_scale": scale}
