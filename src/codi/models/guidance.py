"""Further inputs of the network beside the timestep, zero at first: guidance scales, and the target time.

They join the time features where diffusers' U-Net puts its `timestep_cond`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16


class SineEmbedding(nn.Module):
    """Numbers u (B, k) -> (B, width), added to the time features of a U-Net.

    e(u) = sum_k P_k sin(w u_k), w from 1/2 to 8: e(0) = 0 exactly whatever was learnt. P is zero before training.
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
    """Guidance scales (B, k), each >= 0, by their logarithms (Meng et al., CVPR 2023): guided pictures in one pass.
    Guidance 1 is no guidance, bit for bit."""

    def __init__(self, scales: int, width: int) -> None:
        super().__init__(scales, width)
        self.scales = scales

    def forward(self, guidance: Tensor) -> Tensor:
        return super().forward(guidance.float().clamp_min(math.exp(-3)).log())


class TargetTimeEmbedding(SineEmbedding):
    """The target time r of a flow map, as the way (t - r) / T from the time t: 0 is the instantaneous prediction,
    exactly the network without this input. See objectives.flow_map."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, jump: Tensor) -> Tensor:
        return super().forward(jump[:, 1:])


class JumpEmbedding(SineEmbedding):
    """The same as the share (t - r) / t of the way to the clean latent, in older adapters."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, jump: Tensor) -> Tensor:
        return super().forward(jump[:, :1])


def jump_between(t: Tensor, r: Tensor, horizon: float) -> Tensor:
    """Return what a network with a target time is given for steps from times `t` to `r` (B,): [(t - r) / t,
    (t - r) / T], float32 (B, 2)."""
    way = (t - r).double()
    return torch.stack([way / t, way / horizon], dim=1).float()
