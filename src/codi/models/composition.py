"""Several adapters at once, on one backbone: depth and inpainting, edges and upscaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adapter import Adapter
from .lora import join_lora, lora_names
from .student import Student

_PREFIX = "set_"  # of low-rank updates: peft, too, keeps them in a dict of modules


class AdapterSet(nn.Module):
    """Adapters by name, each with a weight (1: as trained), behind the interface of one.

    Conditions and prepared features are dicts by the same names. Each adapter fuses its features into those left by
    the one before; since the last would otherwise have the last word, the result is the mean of both orders. With one
    adapter it is exactly that adapter.
    """

    def __init__(self, adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> None:
        super().__init__()
        # A list, because a dict of modules refuses names that modules have attributes for, such as "training".
        self.members, self.names = nn.ModuleList(adapters.values()), list(adapters)  # type: ignore[arg-type]
        self.weights = {name: float(weights[name]) for name in adapters}

    def read(self, condition: dict[str, Tensor], vae: Any) -> dict[str, Tensor]:
        return {name: adapter.read(condition[name], vae) for name, adapter in self._items()}

    def prepare(
        self,
        condition: dict[str, Tensor],
        text: Tensor,
        added: dict[str, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> dict[str, Any]:
        scales = {name: _columns(adapter, guidance) for name, adapter in self._items()}
        return {n: adapter.prepare(condition[n], text, added, scales[n]) for n, adapter in self._items()}

    def time_condition(self, guidance: Tensor | None, jump: Tensor | None = None) -> Tensor | None:
        """The sum of what the adapters that know guidance and jumps make of them, by weight; their mean where the
        weights exceed 1 together, so that as much comes out as was asked for."""
        parts = [(self.weights[n], a.time_condition(_columns(a, guidance), jump)) for n, a in self._items()]
        known = [(weight, part) for weight, part in parts if part is not None and weight]
        total = max(1.0, sum(abs(weight) for weight, _ in known))
        return torch.stack([weight / total * part for weight, part in known]).sum(0) if known else None

    def hint(self, prepared: dict[str, Any], strength: float) -> Tensor | None:
        """The sum of theirs, by weight."""
        hints = [a.hint(prepared[n], strength * self.weights[n]) for n, a in self._items() if self.weights[n]]
        known = [hint for hint in hints if hint is not None]
        return torch.stack(known).sum(0) if known else None

    def look(self, prepared: dict[str, Any], *at: Any) -> dict[str, Any]:
        return {name: adapter.look(prepared[name], *at) for name, adapter in self._items() if self.weights[name]}

    def fuse(self, index: int, feature: Tensor, seen: dict[str, Any], strength: float) -> Tensor:
        names = list(seen)

        def through(order: list[str]) -> Tensor:
            fused = feature
            for name in order:
                fused = self.adapters[name].fuse(index, fused, seen[name], strength * self.weights[name])
            return fused

        if len(names) < 2:
            return through(names)
        return (through(names) + through(names[::-1])) / 2

    @property
    def lora_weights(self) -> dict[str, float]:
        """The weight of each adapter's low-rank updates, by the name that they have in the U-Net."""
        return {_PREFIX + name: weight for name, weight in self.weights.items()}

    @property
    def adapters(self) -> dict[str, Any]:
        """The adapters by name."""
        return dict(zip(self.names, self.members, strict=True))

    def _items(self) -> list[tuple[str, Any]]:
        return list(self.adapters.items())


def _columns(adapter: Any, guidance: Tensor | None) -> Tensor | None:
    """As many scales as the adapter knows: text comes first, image second."""
    if guidance is None or adapter.guidance is None:
        return None
    missing = adapter.guidance.scales - guidance.shape[1]
    return torch.cat([guidance, guidance.new_ones(len(guidance), max(0, missing))], 1)[:, : adapter.guidance.scales]


def compose(
    network: Any,
    adapters: Mapping[str, Adapter],
    networks: Mapping[str, Any],
    weights: Mapping[str, float],
) -> Student:
    """A student of `network`, the backbone's own, and of several adapters; `networks` are those that they were loaded
    with (see load_adapter), for their low-rank updates. Conditioning.condition is a dict by the adapters' names.

    Raises UserError for an adapter that brings a backbone of its own: two cannot run at once.
    """
    for name, own in networks.items():
        if own is not network and not lora_names(own):
            raise UserError(f"{name}: a full adapter with a backbone of its own cannot be combined: "
                            "train it with train_backbone: false")  # fmt: skip
    joined = join_lora(network, {_PREFIX + name: own for name, own in networks.items()})
    return Student(joined, AdapterSet(adapters, weights))
