"""The exponential moving average of a network: the target theta- of consistency losses, and the finished model."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import full_tensor

M = TypeVar("M", bound=nn.Module)


def average_copy(module: M) -> M:
    """Return a gradient-free copy that holds the average. Frozen parameters are shared, since they never differ."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()  # type: ignore[arg-type]


def warmed_decay(decay: float, updates: int) -> float:
    """Return the decay after n = `updates` updates, min(decay, (1 + n) / (10 + n)): low for the first updates."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def update(average: nn.Module, online: nn.Module, decay: float) -> None:
    """Update the average: theta- <- decay theta- + (1 - decay) theta, over the trainable parameters."""
    pairs = [(a, p) for a, p in zip(average.parameters(), online.parameters(), strict=True) if p.requires_grad]
    if any(isinstance(p, DTensor) for _, p in pairs):
        for a, p in pairs:  # gathers one parameter at a time
            a.lerp_(full_tensor(p).to(a.dtype), 1 - decay)
    else:
        torch._foreach_lerp_([a for a, _ in pairs], [p.to(a.dtype) for a, p in pairs], 1 - decay)
