"""Guidance that costs nothing: the scale becomes an input of the network (Meng et al., CVPR 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16


class GuidanceEmbedding(nn.Module):
    """Guidance scales (B, k), each >= 0 -> (B, width), added to the time features of a U-Net.

    e(g) = sum_k P_k phi(g_k) with phi(g) = sin(w log g), w from 1/2 to 8: odd in log g, so that e(1) = 0 exactly
    whatever was learnt: guidance 1 is no guidance, bit for bit. P is zero before training.
    """

    def __init__(self, scales: int, width: int) -> None:
        super().__init__()
        self.scales = scales
        self.projection = nn.Linear(scales * FREQUENCIES, width, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, guidance: Tensor) -> Tensor:
        weight = self.projection.weight
        frequencies = torch.logspace(-1, 3, FREQUENCIES, base=2.0, device=weight.device, dtype=torch.float32)
        logarithm = guidance.to(weight.device).float().clamp_min(math.exp(-3)).log()
        return self.projection((logarithm[..., None] * frequencies).sin().flatten(1).to(weight.dtype))
