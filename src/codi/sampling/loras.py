"""LoRAs of other programs on the backbone, by diffusers' names; adapters then work on the backbone with these."""

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
    """Load, set and remove the LoRAs of users; `load_adapter` loads adapters."""

    _store: AdapterStore
    network: Any
    kind: Any
    parts: Any

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Load a LoRA in any format that diffusers reads onto the backbone and its text encoders: it is active at once,
        beside those that are. `kwargs`: weight_name and other options of diffusers. `save_pretrained` leaves LoRAs out.

        Raises UserError for one that is not for this backbone, and for a name that is taken.
        """
        taken = {*TASKS, *self._store.loaded, *self._lora_names}
        if adapter_name in taken:
            raise UserError(f"adapter_name {adapter_name!r}: is taken: give the LoRA another name")
        name = adapter_name or next(free for i in count() if (free := f"default_{i}") not in taken)
        self._store.require_free_for_loras()
        active = {part: active_loras(module) for part, module in self._lora_parts.items()}
        stock = self.kind.build_pipeline(self.parts)
        try:
            stock.load_lora_weights(source, adapter_name=name, **{"use_safetensors": True, **kwargs})
        except Exception as error:  # diffusers, peft and safetensors raise many kinds
            stock.delete_adapters([name])  # of a part that had it already
            shown = source if isinstance(source, str) else type(source).__name__
            raise UserError(f"{shown}: not a LoRA for this model ({one_line(error)}): check the file") from error
        if name not in self._lora_names:
            raise UserError("load_lora_weights: none of its weights are for this model: check the file")
        for part, module in self._lora_parts.items():
            set_active_loras(module, [*active.get(part, []), name])
        self._store.follow_loras()

    def unload_lora_weights(self) -> None:
        """Remove what `load_lora_weights` has loaded; the weights are as they were."""
        self._store.require_free_for_loras()
        self.kind.build_pipeline(self.parts).unload_lora_weights()
        self._store.follow_loras()

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Remove some of what `load_lora_weights` has loaded. Raises UserError for other names."""
        names, known = names_of(names), self._lora_names
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{unknown[0]}: no such LoRA loaded: use {', '.join(known) or 'load_lora_weights'}")
        self._store.require_free_for_loras()
        self.kind.build_pipeline(self.parts).delete_adapters(names)
        self._store.follow_loras()

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Set one adapter or several at once, each with a weight (1: as trained); an empty list sets none, and no LoRA.

        Names may be those of LoRAs, too: adapters and LoRAs are set each among their own kind. Raises UserError for
        unknown names, and for several adapters where one brings a backbone of its own.
        """
        several = names_of(names)
        loras = [name for name in several if name in self._lora_names]
        if not loras:
            self._store.set(names, weights)
            return None if several else self.disable_lora()
        values: list[Any] = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(several)
        values = [1.0 if value is None else value for value in values]
        if wrong := [value for value in values if not isinstance(value, Real) or not math.isfinite(value)]:
            raise UserError(f"weights {wrong[0]!r}: not a number: use 1 for a LoRA as it was trained, 0 for none of it")
        if len(values) != len(several) or len(set(several)) != len(several):
            raise UserError(f"{', '.join(several)}: {len(values)} weights for {len(several)} adapters: give one each")
        chosen = {name: float(value) for name, value in zip(several, values, strict=True)}
        if own := {name: weight for name, weight in chosen.items() if name not in loras}:
            self._store.set(list(own), list(own.values()))
        for module in self._lora_parts.values():
            set_lora_weights(module, {name: chosen[name] for name in loras if name in lora_names(module)})
        return None

    def disable_lora(self) -> None:
        """Set no LoRA; adapters stay as they are set."""
        for module in self._lora_parts.values():
            enable_loras(module, enabled=False)

    def enable_lora(self) -> None:
        """Set the LoRAs again that were set before `disable_lora`."""
        for module in self._lora_parts.values():
            enable_loras(module, enabled=True)

    @property
    def _lora_parts(self) -> dict[str, Any]:
        """The backbone's network and text encoders, by name, if they carry LoRAs."""
        return {name: part for name, part in self.components.items() if lora_names(part)}

    @property
    def _lora_names(self) -> list[str]:
        """The names of all LoRAs, whichever parts carry them."""
        return list(dict.fromkeys(name for part in self._lora_parts.values() for name in lora_names(part)))

    def get_active_adapters(self) -> list[str]:
        """Return the names of adapters and LoRAs that are set."""
        active = {name for part in self._lora_parts.values() for name in active_loras(part)}
        return [*self._store.weights, *(name for name in self._lora_names if name in active)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all LoRAs by the part that carries them, and of all adapters under "codi"."""
        found = {name: lora_names(part) for name, part in self._lora_parts.items()}
        return {**found, "codi": list(self._store.loaded)} if self._store.loaded else found

    @contextmanager
    def _without_loras(self) -> Iterator[None]:
        """Have the parts without their LoRAs, which a checkpoint has no place for, and warn if there are any."""
        carrying = self._lora_parts
        if carrying:
            warnings.warn(f"save_pretrained: the LoRA {', '.join(self._lora_names)} is not saved: load it again after "
                          "opening, or make it part of the backbone by from_pretrained(..., loras={file: 1.0}) before "
                          "saving", stacklevel=4)  # fmt: skip
        try:
            for name, part in carrying.items():
                setattr(self, name, without_lora(part))
            yield
        finally:
            for name, part in carrying.items():
                setattr(self, name, part)
