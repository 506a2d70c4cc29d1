"""Embeddings of inputs beside the timestep, zero before training: guidance scales and the target time.

They are added to the time features where diffusers' U-Net adds its `timestep_cond`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16


class SineEmbedding(nn.Module):
    """Embedding of numbers u (B, k) as (B, width), to be added to the time features of the network.

    e(u) = sum_k P_k sin(w u_k), w from 1/2 to 8, so that e(0) = 0 exactly for any P. P is zero before training.
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(numbers * FREQUENCIES, width, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        weight = self.projection.weight
        frequencies = torch.logspace(-1, 3, FREQUENCIES, base=2.0, device=weight.device, dtype=torch.float32)
        numbers = numbers.to(weight.device).float()
        return self.projection((numbers[..., None] * frequencies).sin().flatten(1).to(weight.dtype))


class GuidanceEmbedding(SineEmbedding):
    """Embedding of guidance scales (B, k), each >= 0, by their logarithms, so that guided pictures need one pass (Meng
    et al., CVPR 2023). Guidance 1 is no guidance, bit for bit."""

    def __init__(self, scales: int, width: int) -> None:
        super().__init__(scales, width)
        self.scales = scales

    def forward(self, guidance: Tensor) -> Tensor:
        return super().forward(guidance.float().clamp_min(math.exp(-3)).log())


class TargetTimeEmbedding(SineEmbedding):
    """Embedding of a flow map's target time r as (t - r) / T, the time span of the step from t. 0 is the instantaneous
    prediction, exactly that of the network without this input. See objectives.flow_map."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, jump: Tensor) -> Tensor:
        return super().forward(jump[:, 1:])


class JumpEmbedding(SineEmbedding):
    """Embedding of the target time in older adapters, as the fraction (t - r) / t of the time to the clean latent."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, jump: Tensor) -> Tensor:
        return super().forward(jump[:, :1])


def jump_between(t: Tensor, r: Tensor, horizon: float) -> Tensor:
    """Return the target-time input of a network for steps from times `t` to `r` (B,): [(t - r) / t, (t - r) / T],
    float32 (B, 2)."""
    span = (t - r).double()
    return torch.stack([span / t, span / horizon], dim=1).float()
