"""LoRAs of other programs on the backbone, by diffusers' names; adapters then work on the backbone with these."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import set_weights_and_activate_adapters

from ..errors import UserError, one_line
from ..models.lora import lora_names, set_stock_loras, stock_loras, without_lora
from ..tasks import TASKS
from .shelf import Shelf


class LoraManners(DiffusionPipeline):
    """`load_lora_weights` and what belongs to it; codi's own adapters are `load_adapter`'s."""

    _shelf: Shelf
    network: Any
    kind: Any
    parts: Any

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Load a LoRA in any format that diffusers reads onto the backbone and its text encoders, as stock pipelines
        do: it is active at once. `kwargs`: weight_name and other options of diffusers.

        Raises UserError for one that is not for this backbone, and for a name that is taken.
        """
        if adapter_name in (*TASKS, *lora_names(self.network)):
            raise UserError(f"adapter_name {adapter_name!r}: is taken: give the LoRA another name")
        self._shelf.require_free_for_loras()
        before, stock = set(lora_names(self.network)), self.kind.build_pipeline(self.parts)
        try:
            stock.load_lora_weights(source, adapter_name=adapter_name, **{"use_safetensors": True, **kwargs})
        except Exception as error:  # diffusers, peft and safetensors raise many kinds
            shown = source if isinstance(source, str) else type(source).__name__
            raise UserError(f"{shown}: not a LoRA for this model ({one_line(error)}): check the file") from error
        found = set(lora_names(self.network)) - before
        if not found and not stock.get_list_adapters():
            raise UserError("load_lora_weights: none of its weights are for this model: check the file")
        self._note({**stock_loras(self.network), **dict.fromkeys(found, 1.0)})

    def unload_lora_weights(self) -> None:
        """Remove what `load_lora_weights` has loaded; the weights are as they were."""
        self._shelf.require_free_for_loras()
        self.kind.build_pipeline(self.parts).unload_lora_weights()
        self._note({})

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Remove some of what `load_lora_weights` has loaded. Raises UserError for other names."""
        names = [names] if isinstance(names, str) else list(names)
        self._require_loras(names)
        self._shelf.require_free_for_loras()
        self.kind.build_pipeline(self.parts).delete_adapters(names)
        self._note({name: weight for name, weight in stock_loras(self.network).items() if name not in names})

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Set one adapter or several at once, each with a weight (1: as trained); an empty list sets none, and no LoRA.

        Names may be those of LoRAs, too: adapters and LoRAs are set each among their own kind. Raises UserError for
        unknown names, and for several adapters where one brings a backbone of its own.
        """
        several: list[str] = [names] if isinstance(names, str) else list(names)
        loras = [name for name in several if name in stock_loras(self.network)]
        if not loras:
            self._shelf.set(names, weights)
            return None if several else self.disable_lora()
        values: list[Any] = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(several)
        values = [1.0 if value is None else value for value in values]
        if wrong := [value for value in values if not isinstance(value, Real) or not math.isfinite(value)]:
            raise UserError(f"weights {wrong[0]!r}: not a number: use 1 for a LoRA as it was trained, 0 for none of it")
        if len(values) != len(several) or len(set(several)) != len(several):
            raise UserError(f"{', '.join(several)}: {len(values)} weights for {len(several)} adapters: give one each")
        chosen = dict(zip(several, values, strict=True))
        if own := {name: weight for name, weight in chosen.items() if name not in loras}:
            self._shelf.set(list(own), list(own.values()))
        self._weigh({name: float(chosen.get(name, 0.0)) for name in stock_loras(self.network)})  # type: ignore[arg-type]
        return None

    def disable_lora(self) -> None:
        """Set no LoRA; adapters stay as they are set."""
        before = stock_loras(self.network)
        if any(before.values()):
            self._weigh(dict.fromkeys(before, 0.0))
            self.network._codi_disabled_loras = before

    def enable_lora(self) -> None:
        """Set the LoRAs again that were set before `disable_lora`."""
        loras, before = stock_loras(self.network), getattr(self.network, "_codi_disabled_loras", {})
        if loras and not any(loras.values()):
            self._weigh({name: before.get(name, 1.0) for name in loras})

    def _weigh(self, weights: dict[str, float]) -> None:
        """Give the LoRAs of all parts these weights."""
        for part in self.components.values():
            if carried := [name for name in weights if name in lora_names(part)]:
                set_weights_and_activate_adapters(part, carried, [weights[name] for name in carried])
        self._note(weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of adapters and LoRAs that are set."""
        return [*self._shelf.weights, *(name for name, weight in stock_loras(self.network).items() if weight)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all LoRAs by the part that carries them, and of all adapters under "codi"."""
        found = {name: list(part.peft_config) for name, part in self.components.items()
                 if getattr(part, "peft_config", None)}  # fmt: skip
        return {**found, "codi": list(self._shelf.loaded)} if self._shelf.loaded else found

    @contextmanager
    def _without_loras(self) -> Iterator[None]:
        """Have the parts without their LoRAs, which a checkpoint has no place for, and warn if there are any."""
        carrying = {name: part for name, part in self.components.items() if lora_names(part)}
        if names := sorted({lora for part in carrying.values() for lora in lora_names(part)}):
            warnings.warn(f"save_pretrained: the LoRA {', '.join(names)} is not saved: load it again after opening, or "
                          "make it part of the backbone by from_pretrained(..., loras={file: 1.0}) before saving",
                          stacklevel=4)  # fmt: skip
        try:
            for name, part in carrying.items():
                setattr(self, name, without_lora(part))
            yield
        finally:
            for name, part in carrying.items():
                setattr(self, name, part)

    def _require_loras(self, names: list[str]) -> None:
        known = stock_loras(self.network)
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{unknown[0]}: no such LoRA loaded: use {', '.join(known) or 'load_lora_weights'}")

    def _note(self, loras: dict[str, float]) -> None:
        """Have adapters work on the backbone with these LoRAs."""
        set_stock_loras(self.network, loras)
        self._shelf.follow_loras()
