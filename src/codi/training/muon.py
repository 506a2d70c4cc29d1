"""Muon (Jordan et al. 2024): orthogonalized momentum for matrices, AdamW for all other parameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

# The quintic of Jordan et al.: five steps bring every singular value to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_ADAM_SHARE = 0.25  # AdamW's learning rate as a share of Muon's
_PER_IMAGE = ("norm", "time")  # parts of names of diffusers' layers whose input is a single vector per image
_LEAST = 24  # smaller matrices, mostly of first and last layers, are trained by AdamW


class Muon(torch.optim.Optimizer):
    """Optimizer that applies Muon to groups with `matrices=True` and AdamW to the others.

    An orthogonalized update is scaled to a root mean square of 0.2, about that of AdamW's (Liu et al. 2025, "Muon is
    scalable"), so that one learning rate serves both kinds. A convolution (O, I, H, W) counts as a matrix (O, I H W).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "matrices": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            (self._matrices if group["matrices"] else self._adam)(group, parameters)

    def _matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, same in by_shape.items():  # one batched product for all matrices of a shape
            momenta = []
            for p in same:
                state, gradient = self.state[p], cast(Tensor, p.grad)
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                momenta.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov's
            updates = orthogonalized(torch.stack(momenta))
            scale = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
            for p, update in zip(same, updates, strict=True):
                p.add_(update.view(shape).to(p.dtype), alpha=-scale)

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        low, high = group["betas"]
        if not parameters:
            return
        states, gradients = [self.state[p] for p in parameters], [cast(Tensor, p.grad) for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
        mean, square = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(mean, gradients, 1 - low)
        torch._foreach_mul_(square, high)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - high)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, [(1 - high ** s["step"]) ** 0.5 for s in states])
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_(parameters, mean, root, [-group["lr"] / (1 - low ** s["step"]) for s in states])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return roughly U V' of the singular value decompositions U S V' of `matrices` (N, rows, columns), bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)).bfloat16()
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def muon_groups(module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Return parameter groups for `Muon`: the weights of linear layers and convolutions on tokens or pixels, and all
    others (embeddings, norms, biases, matrices with fewer than 24 rows or columns, and layers that read only the time
    or modulate a norm), for AdamW at a quarter of the learning rate."""
    matrix_ids = {
        id(m.weight)
        for name, m in module.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
        and min(m.weight.flatten(1).shape) >= _LEAST
        and not any(word in name for word in _PER_IMAGE)
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if id(p) in matrix_ids], [p for p in trained if id(p) not in matrix_ids]
    groups = [{"params": matrices, "lr": learning_rate, "matrices": True}]
    return [*groups, {"params": rest, "lr": learning_rate * _ADAM_SHARE, "matrices": False}]
