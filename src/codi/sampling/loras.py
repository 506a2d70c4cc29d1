"""LoRAs of other programs on the backbone, by diffusers' methods; adapters work on top of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from numbers import Real
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import UserError, one_line
from ..models.lora import active_loras, enable_loras, lora_names, set_active_loras, set_lora_weights, without_lora
from ..tasks import TASKS
from .adapter_store import AdapterStore, names_of


class LoraLoaderMixin(DiffusionPipeline):
    """Loading, activating and removing of users' LoRAs; `load_adapter` loads adapters."""

    _store: AdapterStore
    network: Any
    kind: Any
    parts: Any

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Load a LoRA, in any format that diffusers reads, onto the backbone and its text encoders.

        It becomes active in addition to other LoRAs. `kwargs`: weight_name and other options of diffusers.
        `save_pretrained` leaves LoRAs out. Raises UserError for one that is not for this backbone, and for a name in
        use.
        """
        taken = {*TASKS, *self._store.loaded, *self._lora_names}
        if adapter_name in taken:
            raise UserError(f"adapter_name {adapter_name!r}: is taken: give the LoRA another name")
        name = adapter_name or next(free for i in count() if (free := f"default_{i}") not in taken)
        self._store.require_loras_changeable()
        active = {part: active_loras(module) for part, module in self._lora_parts.items()}
        stock = self.kind.build_pipeline(self.parts)
        try:
            stock.load_lora_weights(source, adapter_name=name, **{"use_safetensors": True, **kwargs})
        except Exception as error:  # diffusers, peft and safetensors raise many kinds
            stock.delete_adapters([name])  # from parts that had loaded it already
            shown = source if isinstance(source, str) else type(source).__name__
            raise UserError(f"{shown}: not a LoRA for this model ({one_line(error)}): check the file") from error
        if name not in self._lora_names:
            raise UserError("load_lora_weights: none of its weights are for this model: check the file")
        for part, module in self._lora_parts.items():
            set_active_loras(module, [*active.get(part, []), name])
        self._store.sync_loras()

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs and restore the original weights."""
        self._store.require_loras_changeable()
        self.kind.build_pipeline(self.parts).unload_lora_weights()
        self._store.sync_loras()

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Remove some LoRAs. Raises UserError for unknown names."""
        names, known = names_of(names), self._lora_names
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{unknown[0]}: no such LoRA loaded: use {', '.join(known) or 'load_lora_weights'}")
        self._store.require_loras_changeable()
        self.kind.build_pipeline(self.parts).delete_adapters(names)
        self._store.sync_loras()

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Activate one adapter or several, each with a weight (1: as trained); an empty list deactivates all and LoRAs.

        Names of LoRAs are accepted too: adapters and LoRAs are switched independently. Raises UserError for unknown
        names, and for a full adapter together with another.
        """
        several = names_of(names)
        loras = [name for name in several if name in self._lora_names]
        if not loras:
            self._store.set(names, weights)
            return None if several else self.disable_lora()
        values: list[Any] = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(several)
        values = [1.0 if value is None else value for value in values]
        if wrong := [value for value in values if not isinstance(value, Real) or not math.isfinite(value)]:
            raise UserError(f"weights {wrong[0]!r}: not a number: use 1 (as trained) or 0 (no influence)")
        if len(values) != len(several) or len(set(several)) != len(several):
            raise UserError(f"{', '.join(several)}: {len(values)} weights for {len(several)} adapters: give one each")
        chosen = {name: float(value) for name, value in zip(several, values, strict=True)}
        if own := {name: weight for name, weight in chosen.items() if name not in loras}:
            self._store.set(list(own), list(own.values()))
        for module in self._lora_parts.values():
            set_lora_weights(module, {name: chosen[name] for name in loras if name in lora_names(module)})
        return None

    def disable_lora(self) -> None:
        """Deactivate all LoRAs, not adapters."""
        for module in self._lora_parts.values():
            enable_loras(module, enabled=False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        for module in self._lora_parts.values():
            enable_loras(module, enabled=True)

    @property
    def _lora_parts(self) -> dict[str, Any]:
        """Parts that have LoRAs, by name: the backbone's network and text encoders."""
        return {name: part for name, part in self.components.items() if lora_names(part)}

    @property
    def _lora_names(self) -> list[str]:
        """Names of all LoRAs of all parts."""
        return list(dict.fromkeys(name for part in self._lora_parts.values() for name in lora_names(part)))

    def get_active_adapters(self) -> list[str]:
        """Return the names of active adapters and LoRAs."""
        active = {name for part in self._lora_parts.values() for name in active_loras(part)}
        return [*self._store.weights, *(name for name in self._lora_names if name in active)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all LoRAs by part, and of all adapters under "codi"."""
        names = {name: lora_names(part) for name, part in self._lora_parts.items()}
        return {**names, "codi": list(self._store.loaded)} if self._store.loaded else names

    @contextmanager
    def _without_loras(self) -> Iterator[None]:
        """Replace the parts by ones without LoRAs, which cannot be saved in a checkpoint, and warn if there are any."""
        lora_parts = self._lora_parts
        if lora_parts:
            warnings.warn(f"save_pretrained: the LoRA {', '.join(self._lora_names)} is not saved: load it again after "
                          "opening, or merge it into the backbone by from_pretrained(..., loras={file: 1.0}) before "
                          "saving", stacklevel=4)  # fmt: skip
        try:
            for name, part in lora_parts.items():
                setattr(self, name, without_lora(part))
            yield
        finally:
            for name, part in lora_parts.items():
                setattr(self, name, part)
