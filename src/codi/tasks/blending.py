"""Seamless blending of generated pixels with known ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RELAXATIONS = 32


def membrane(values: Tensor, known: Tensor) -> Tensor:
    """Interpolate `values` (B, C, H, W) smoothly into the pixels where `known` (B, 1, H, W; 0 or 1) is 0.

    The result equals `values` where known and is nearly harmonic elsewhere, like the surface that Poisson blending adds
    to a patch (Pérez et al. 2003); 0 if no pixel is known. A pyramid of averages fills holes of any size (pull-push,
    Gortler et al. 1996), then Jacobi relaxation smooths the fill.
    """
    fixed = known > 0
    levels = [(values * known, known)]
    while max(levels[-1][0].shape[-2:]) > 1:
        part, weight = (F.pad(t, (0, t.shape[-1] % 2, 0, t.shape[-2] % 2)) for t in levels[-1])
        part, weight = F.avg_pool2d(part, 2), F.avg_pool2d(weight, 2)
        full = (4 * weight).clamp(max=1)  # one known pixel of four counts as fully known
        levels.append((part / weight.clamp_min(1e-6) * full, full))
    surface, _ = levels.pop()
    for part, weight in reversed(levels):
        surface = part + (1 - weight) * F.interpolate(surface, part.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(RELAXATIONS):
        p = F.pad(surface, (1, 1, 1, 1), mode="replicate")
        mean = (p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]) / 4
        surface = torch.where(fixed, values, mean)
    return surface
