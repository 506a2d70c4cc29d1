"""Procedural textures with the statistics of photographs, for training a codec without photographs.

"Dead leaves": opaque discs and bars of power-law sizes occlude one another, which gives the edge and scale statistics
of natural images (Lee, Mumford & Huang, IJCV 2001); each leaf has some 1/f noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dead_leaves(count: int, size: int, generator: torch.Generator, leaves: int = 70) -> Tensor:
    """Return images, uint8 (count, 3, size, size). The same generator state gives the same bytes."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    axis = torch.linspace(0, 1, size)
    y, x = (g.expand(count, -1, -1) for g in torch.meshgrid(axis, axis, indexing="ij"))
    picture = uniform(count, 3, 1, 1).expand(-1, -1, size, size).clone()
    for _ in range(leaves):
        # p(r) ~ r^-3 between 2 % and 50 % of the image; one leaf in three is a bar.
        r = (1 / (1 / 0.02**2 - uniform(count, 1, 1) * (1 / 0.02**2 - 1 / 0.5**2))).sqrt()
        angle = uniform(count, 1, 1, high=math.pi)
        dx, dy = x - uniform(count, 1, 1, low=-0.1, high=1.1), y - uniform(count, 1, 1, low=-0.1, high=1.1)
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        bar = uniform(count, 1, 1) < 1 / 3
        distance = torch.where(bar, torch.maximum(u.abs() * 0.35, v.abs() * 1.6), (u * u + v * v).sqrt())
        cover = ((r - distance) * size + 0.5).clamp(0, 1)[:, None]  # one pixel of anti-aliasing
        shade = 1 + uniform(count, 1, 1, low=-0.6, high=0.6) * u / r
        color = uniform(count, 3, 1, 1) * shade[:, None]
        picture = picture + cover * (color - picture)
    spectrum = torch.fft.rfft2(torch.randn(count, 1, size, size, generator=generator))
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    noise = torch.fft.irfft2(spectrum / (fx * fx + fy * fy).sqrt().clamp_min(1 / size), s=(size, size))
    noise = noise / noise.std(dim=(-2, -1), keepdim=True)
    picture = picture + uniform(count, 1, 1, 1, high=0.12) * noise
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
