"""The student w_theta(z_t, c, t): backbone plus adapter, as one module with one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .backbones import family_of
from .lora import lora_names, scale_lora


@dataclass
class Conditioning:
    """The inputs of a prediction other than z_t and t.

    `text` (B, L, D) prompt features; `condition` the output of `adapter.read` (None: no adapter, exactly the backbone);
    `prepared` the adapter's cached features, from `Student.prepare`; `added` further tensors of the prompts that the
    network takes, such as the pooled features of XL and FLUX.1; `guidance` (B, k) distilled guidance scales, one column
    each (text, then image), None if all are 1; `jump` (B, 2) the target time (see guidance.jump_between), None for the
    instantaneous prediction.
    """

    text: Tensor
    condition: Any = None
    prepared: Any = None
    added: dict[str, Tensor] | None = None
    guidance: Tensor | None = None
    jump: Tensor | None = None


C = TypeVar("C", bound=Any)


class Student(nn.Module):
    """A backbone network with an optional adapter. Without an adapter, or before training, exactly the backbone.

    `adapter` is an Adapter or, for several at once, a composition.AdapterSet. `network` (a U-Net or a transformer)
    includes the adapter's low-rank updates, if any.
    """

    def __init__(self, network: Any, adapter: Any | None = None) -> None:
        super().__init__()
        self.network = network
        self.adapter = adapter
        self.kind = family_of(network)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Compute once whatever does not depend on z_t, for samplers that call the student several times."""
        c = conditioning
        if self.adapter is None or c.condition is None or c.prepared is not None:
            return c
        return replace(c, prepared=self.adapter.prepare(c.condition, c.text, c.added, c.guidance))

    def forward(self, z: Tensor, timestep: Tensor, conditioning: Conditioning, strength: float = 1.0) -> Tensor:
        """Return the network's prediction (B, C, h, w) at z_t. `timestep` (B,) or (1,), the checkpoint's own numbering;
        `strength` scales the adapter's influence (0: exactly the backbone)."""
        if conditioning.condition is None:
            strength = 0.0
        self.scale(strength if self.adapter is not None else 0.0)
        return self._predict(z, timestep, conditioning, strength)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the student in place by `torch.compile` with these arguments, except for setting the weights of
        low-rank updates."""
        for name in ("_predict", "prepare"):  # methods of the class, not those that an earlier call compiled
            setattr(self, name, _cloned_outputs(torch.compile(getattr(Student, name).__get__(self), *args, **kwargs)))

    def _predict(self, z: Tensor, timestep: Tensor, conditioning: Conditioning, strength: float) -> Tensor:
        inputs = (z, timestep, conditioning.text, conditioning.added)
        adapter = self.adapter
        if adapter is None or strength == 0:
            return self.kind.predict(self.network, *inputs)
        extra = adapter.time_condition(conditioning.guidance, conditioning.jump)
        extra = None if extra is None else strength * extra
        prepared = Student.prepare(self, conditioning).prepared  # not the compiled method, so that all is one graph
        hint = adapter.hint(prepared, strength)
        adapter_features = adapter.step_features(prepared, *inputs)

        def fuse(index: int, feature: Tensor) -> Tensor:
            return adapter.fuse(index, feature, adapter_features, strength)

        return self.kind.predict(self.network, *inputs, extra, hint, fuse)

    def scale(self, strength: float) -> None:
        """Set the weights of the low-rank updates."""
        weights = getattr(self.adapter, "lora_weights", {})  # of an AdapterSet
        scale_lora(self.network, {name: strength * weights.get(name, 1.0) for name in lora_names(self.network)})


def _cloned_outputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled function so that its outputs are copies that stay valid after the next call. CUDA graphs
    (mode="reduce-overhead") write every output to the same memory, but samplers keep the prepared features, and some
    solvers keep earlier predictions."""

    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        output = compiled(*args)
        return output.clone() if isinstance(output, Tensor) else cat_conditionings(output)

    return call


def cat_conditionings(*parts: C) -> C:
    """Concatenate conditionings along the batch, to compute several predictions in one forward pass. Works for any
    dataclass of tensors."""
    first = parts[0]
    return type(first)(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(first)})


def conditioning_rows(conditioning: C, rows: slice) -> C:
    """Return the `rows` of a batch of conditionings, or of any dataclass of tensors (B, ...)."""
    return type(conditioning)(**{f.name: _rows(getattr(conditioning, f.name), rows) for f in fields(conditioning)})


def _rows(part: Any, rows: slice) -> Any:
    if isinstance(part, dict):
        return {k: _rows(v, rows) for k, v in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_rows(item, rows) for item in part)
    return part[rows] if isinstance(part, Tensor) else part


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, list):
        return [_join(list(items)) for items in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {k: _join([p[k] for p in parts]) for k in first}
    return torch.cat(parts)
