"""The student w_theta(z_t, c, t): backbone plus adapter, as one module with one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .adapter import Adapter
from .backbone import unet_down, unet_up


@dataclass
class Conditioning:
    """What a prediction may look at besides z_t and t.

    `text` (B, L, D) prompt features; `condition` what `adapter.read` gave (None: no adapter); `prepared` the adapter's
    cached features, made by `Student.prepare`; `added` SDXL's extra conditions.
    """

    text: Tensor
    condition: Tensor | None = None
    prepared: Any = None
    added: dict[str, Tensor] | None = None


class Student(nn.Module):
    """A backbone U-Net with an optional adapter. Without an adapter, or before training, exactly the backbone."""

    def __init__(self, unet: UNet2DConditionModel, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.adapter = adapter

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Computes once what does not depend on z_t, for samplers that call the student several times."""
        if self.adapter is None or conditioning.condition is None or conditioning.prepared is not None:
            return conditioning
        prepared = self.adapter.prepare(conditioning.condition, conditioning.text, conditioning.added)
        return replace(conditioning, prepared=prepared)

    def forward(self, z: Tensor, timestep: Tensor, conditioning: Conditioning, strength: float = 1.0) -> Tensor:
        """The network's prediction (B, C, h, w) at z_t. `timestep` (B,) or (1,), the checkpoint's own numbering;
        `strength` scales the adapter's influence (0: exactly the backbone)."""
        text, added = conditioning.text, conditioning.added
        features, embedding = unet_down(self.unet, z, timestep, text, added)
        if self.adapter is not None and conditioning.condition is not None and strength != 0:
            prepared = self.prepare(conditioning).prepared
            features = self.adapter.fuse(features, prepared, strength, z=z, timestep=timestep, text=text, added=added)
        return unet_up(self.unet, features, embedding, text)


def cat_conditionings(a: Conditioning, b: Conditioning) -> Conditioning:
    """Both in one batch, `a` first: classifier-free guidance in one forward pass."""

    def join(x: Any, y: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, list):
            return [torch.cat(pair) for pair in zip(x, y, strict=True)]
        if isinstance(x, dict):
            return {k: torch.cat([x[k], y[k]]) for k in x}
        return torch.cat([x, y])

    return Conditioning(*(join(getattr(a, f), getattr(b, f)) for f in ("text", "condition", "prepared", "added")))
