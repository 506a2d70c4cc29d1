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

_PREFIX = "set_"  # of the names of low-rank updates: peft keeps them in a dict of modules, which refuses some names


class AdapterSet(nn.Module):
    """Several adapters by name, each with a weight (1: as trained), behind the interface of a single one.

    Conditions and prepared features are dicts by the same names. Each adapter fuses its features into the output of
    the one before, so the last has the most influence; therefore the result is the mean of both orders. With one
    adapter it is exactly that adapter.
    """

    def __init__(self, adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> None:
        super().__init__()
        # A list, because a dict of modules refuses the names of a module's attributes, such as "training".
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
        """Return the weighted sum of the embeddings of guidance and jump, of the adapters that have these inputs; the
        weighted mean if the weights add up to more than 1, so that the effect of the inputs is not exaggerated."""
        parts = [(self.weights[n], a.time_condition(_columns(a, guidance), jump)) for n, a in self._items()]
        used = [(weight, part) for weight, part in parts if part is not None and weight]
        total = max(1.0, sum(abs(weight) for weight, _ in used))
        return torch.stack([weight / total * part for weight, part in used]).sum(0) if used else None

    def hint(self, prepared: dict[str, Any], strength: float) -> Tensor | None:
        """Return the weighted sum of the adapters' hints; None if none has one."""
        hints = [a.hint(prepared[n], strength * self.weights[n]) for n, a in self._items() if self.weights[n]]
        present = [hint for hint in hints if hint is not None]
        return torch.stack(present).sum(0) if present else None

    def step_features(self, prepared: dict[str, Any], *inputs: Any) -> dict[str, Any]:
        return {
            name: adapter.step_features(prepared[name], *inputs)
            for name, adapter in self._items()
            if self.weights[name]
        }

    def fuse(self, index: int, feature: Tensor, adapter_features: dict[str, Any], strength: float) -> Tensor:
        names = list(adapter_features)

        def fuse_in_order(order: list[str]) -> Tensor:
            fused = feature
            for name in order:
                fused = self.adapters[name].fuse(index, fused, adapter_features[name], strength * self.weights[name])
            return fused

        if len(names) < 2:
            return fuse_in_order(names)
        return (fuse_in_order(names) + fuse_in_order(names[::-1])) / 2

    @property
    def lora_weights(self) -> dict[str, float]:
        """The weight of each adapter's low-rank updates, by the name of the updates in the network."""
        return {_PREFIX + name: weight for name, weight in self.weights.items()}

    @property
    def adapters(self) -> dict[str, Any]:
        """The adapters by name."""
        return dict(zip(self.names, self.members, strict=True))

    def _items(self) -> list[tuple[str, Any]]:
        return list(self.adapters.items())


def _columns(adapter: Any, guidance: Tensor | None) -> Tensor | None:
    """Return the columns of guidance scales (text, then image) that the adapter takes, padded with 1; None if it takes
    none."""
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
    """Return a student that runs several adapters on `network`, the backbone's network. `networks` are those that
    load_adapter returned, for their low-rank updates. Conditioning.condition is a dict by the adapters' names.

    Raises UserError for an adapter that has its own backbone: two backbones cannot run at once.
    """
    for name, own in networks.items():
        if own is not network and not lora_names(own):
            raise UserError(f"{name}: a full adapter has its own backbone and cannot be combined with others: "
                            "train it with train_backbone: false")  # fmt: skip
    joined = join_lora(network, {_PREFIX + name: own for name, own in networks.items()})
    return Student(joined, AdapterSet(adapters, weights))
