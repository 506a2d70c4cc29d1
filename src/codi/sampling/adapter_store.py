"""Adapters of a pipeline: loaded once, sharing one backbone, and switched in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from ..errors import UserError, nearest, one_line
from ..models.adapter import Adapter
from ..models.adapter_files import ADAPTERS, find_adapter, fitting_adapter, load_adapter, own_network
from ..models.composition import compose
from ..models.hooks import called
from ..models.lora import (
    copy_lora_scales,
    join_lora,
    lora_names,
    lora_state,
    merge_lora,
    scaled_loras,
    update_names,
)
from ..models.student import Student
from ..tasks import TASKS, Task, get_task
from .guidance import require_info
from .saved import saved_weights


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter with its network, its task, and its source folder."""

    adapter: Adapter
    network: Any
    task: Task
    folder: Path
    full: bool
    """True for a full adapter, which has a fine-tuned backbone of its own and therefore only strengths 0 and 1."""

    @property
    def info(self) -> dict[str, Any]:
        """Info in the adapter's configuration; {} without."""
        return self.adapter.config["info"] or {}


def names_of(names: Any) -> list[str]:
    """Return one name or several as a list. Raises UserError for anything else, including a dict, whose values would
    be ignored."""
    listed = isinstance(names, Iterable) and not isinstance(names, (str, Mapping))
    several: list[Any] = list(names) if listed else [names]
    if wrong := [name for name in several if not isinstance(name, str)]:
        raise UserError(f"{one_line(repr(wrong[0]))}: not the name of an adapter: pass a name, or a list of names")
    return several


class AdapterStore:
    """Adapters by name for the backbone's `network`, whose fingerprint is `family`. `weights`: of the active adapters.
    `model`: the backbone's source, whose folder may hold adapters."""

    def __init__(self, network: Any, family: str, model: str | Path = "mini") -> None:
        self.network, self.family, self.model = network, family, model
        self._loras = lora_state(network)  # users' LoRAs, as the networks of `loaded` have them too
        self.offload: Callable[[Any], Any] | None = None
        """Function that offloads the adapters' networks, which diffusers does not know of; None: no offloading."""
        self.loaded: dict[str, LoadedAdapter] = {}
        self.weights: dict[str, float] = {}
        self._students: dict[tuple[str, ...], Student] = {}
        self._merged: tuple[Any, Student] | None = None  # (settings, merged student)
        self._compiling: dict[str, Any] | None = None
        self.fused = False
        self.layout = torch.preserve_format

    def load(
        self, source: str | Path, name: str | None = None, task: str | None = None, loras: Sequence[str] = ()
    ) -> str:
        """Load an embedded adapter or a folder and return its name, by default the folder's. `loras`: names used by
        LoRAs of other parts than the network.

        Raises UserError for an adapter that does not fit or is not for `task`, and for a name in use.
        """
        if not isinstance(source, (str, Path)) or not isinstance(name, (str, type(None))):
            wrong = source if isinstance(name, (str, type(None))) else name
            raise UserError(f"{one_line(repr(wrong))}: not an adapter: pass a name or a folder")
        if self.network is None:
            raise UserError(f"{source}: this pipeline has no network: pass unet=... or transformer=... first")
        chosen = fitting_adapter(source, self.network, self.family, self.model)
        folder = chosen.resolve()
        name = (name or folder.name).replace(".", "-")  # module names cannot have dots
        if not name or "/" in name or "\\" in name:
            raise UserError(f"{name!r}: not a valid adapter name: it becomes a folder name, so use no slashes")
        if name in self.loaded:
            if self.loaded[name].folder == folder:
                return name
            raise UserError(f"{source}: an adapter called {name!r} is loaded already: name this one with as_=...")
        if clash := {name, *TASKS} & {*lora_names(self.network), *loras}:  # updates are named after their task
            raise UserError(f"{source}: a LoRA is called {clash.pop()!r}: load that under another name first")
        self._require_not_offloaded(name)
        shown = source if chosen == find_adapter(source, self.model) else chosen  # messages show the caller's value
        adapter, network = load_adapter(shown, task, self.family, self.network, self.model)
        info = require_info(adapter.config["info"] or {}, str(folder / "config.json"))
        kind = info.get("task", task)
        if kind is None:
            raise UserError(f"{source}: its info names no task: pass task=...")
        entry = LoadedAdapter(adapter, network, get_task(kind, **info.get("task_options", {})), folder,
                           own_network(folder) is not None)  # fmt: skip
        for module in (adapter, network):
            self._place(module).requires_grad_(False).eval()
        self.loaded[name] = entry
        return name

    def set(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Activate these adapters and no others; `weights` are 1 by default, and a single one is used for all.

        Raises UserError for adapters that cannot be activated, and then changes nothing.
        """
        names = names_of(names)
        several = isinstance(weights, Iterable) and getattr(weights, "ndim", 1) > 0
        values: list[Any] = list(weights) if several else [1.0 if weights is None else weights] * len(names)  # type: ignore[arg-type]
        if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
            raise UserError(f"weights {values}: not numbers: use 1 (as trained) or 0 (no influence)")
        if len(values) != len(names) or len(set(names)) != len(names):
            raise UserError(f"{', '.join(names)}: {len(values)} weights for {len(set(names))} adapters: give one each")
        for name in names:
            if name not in self.loaded:
                hint = nearest(name, self.loaded)
                raise UserError(f"{name}: no such adapter loaded{hint}: use {', '.join(self.loaded) or 'load_adapter'}")
        chosen = {name: float(weight) for name, weight in zip(names, values, strict=True)}
        for name, weight in chosen.items():
            self._require_on_or_off(name, "weight", weight)
        if len(chosen) > 1:
            self._student(tuple(chosen))  # raises UserError for adapters that cannot be combined
        self.weights = chosen

    def _require_not_offloaded(self, what: str) -> None:
        """Raise UserError if the backbone is offloaded, so that new networks cannot share its weights."""
        if self.offload is not None:
            raise UserError(f"{what}: the pipeline is offloaded: load and set adapters first, or call "
                            "remove_all_hooks() and enable offloading again afterwards")  # fmt: skip

    @property
    def active(self) -> dict[str, LoadedAdapter]:
        """Active adapters by name."""
        return {name: self.loaded[name] for name in self.weights}

    def require_strength(self, strength: float) -> None:
        """Raise UserError for a strength that an active full adapter does not support."""
        for name, weight in self.weights.items():
            if weight:
                self._require_on_or_off(name, "strength", strength)

    def _require_on_or_off(self, name: str, what: str, value: float) -> None:
        if self.loaded[name].full and value not in (0, 1):
            raise UserError(f"{what} {value:g}: {name} is a full adapter, with a trained backbone of its own, which "
                            "cannot be scaled: use 1 (as trained) or 0 (the original backbone)")  # fmt: skip

    def infos(self, strength: float = 1.0) -> list[dict[str, Any]]:
        """Return the info of each active adapter whose weight times `strength` is not 0."""
        return [self.loaded[name].info for name, weight in self.weights.items() if strength * weight]

    def student(self, strength: float = 1.0, lora_scale: float = 1.0) -> tuple[Student, float]:
        """Return the student to sample with, and the strength to call it with. If no adapter has any influence, the
        student is the backbone alone. `lora_scale`: strength of users' LoRAs in merged weights (else see on_device)."""
        self.sync_loras()
        if not self.infos(strength):
            return self._student(()), 1.0
        student = self._student(tuple(self.weights))
        if len(self.weights) == 1:
            strength *= next(iter(self.weights.values()))
        else:
            student.adapter.weights = dict(self.weights)  # type: ignore[union-attr]
        return (self._merge(student, strength, lora_scale) if self.fused else student), strength

    def _merge(self, student: Student, strength: float, lora_scale: float) -> Student:
        """Return the student with its low-rank updates merged into the weights; cached for the same settings."""
        if not lora_names(student.network):
            return student
        settings = (tuple(self.weights.items()), strength, lora_scale)
        if self._merged is None or self._merged[0] != settings:
            student.scale(strength)
            with scaled_loras(student.network, lora_scale):
                merged = Student(merge_lora(student.network), student.adapter).eval()
            self._merged = settings, self._place(merged)
            if self._compiling is not None:
                merged.compile(**self._compiling)
        return self._merged[1]

    def _student(self, names: tuple[str, ...]) -> Student:
        if names not in self._students:
            adapters = {name: self.loaded[name].adapter for name in names}
            networks = {name: self.loaded[name].network for name in names}
            if len(names) > 1:
                self._require_not_offloaded(", ".join(names))
                student = compose(self.network, adapters, networks, dict.fromkeys(names, 1.0))
            else:
                student = Student(networks[names[0]], adapters[names[0]]) if names else Student(self.network)
            self._students[names] = self._place(student).eval()
            if self._compiling is not None:
                student.compile(**self._compiling)
        return self._students[names]

    def compile(self, **options: Any) -> None:
        """Compile all students, including later ones, by torch.compile at their first use."""
        self._compiling, self._merged = options, None
        for student in self._students.values():
            student.compile(**options)

    def move_to_backbone(self) -> None:
        """Move everything to the backbone's device, dtype and memory format."""
        self._merged = None
        for entry in self.loaded.values():
            self._place(entry.adapter)
            self._place(entry.network)
        for student in self._students.values():
            self._place(student)

    @property
    def networks(self) -> list[Any]:
        """The backbone's network, then those of adapters that have modules of their own."""
        own_networks = [entry.network for entry in self.loaded.values()]
        own_networks += [student.network for student in self._students.values()]
        return list({id(network): network for network in (self.network, *own_networks)}.values())

    @contextmanager
    def on_device(self, student: Student, device: torch.device, lora_scale: float = 1.0) -> Iterator[None]:
        """Keep the student's networks on `device` while they are called part by part. `lora_scale`: strength of the
        LoRAs on the backbone. Caches that diffusers keeps between steps start empty."""
        network = student.network
        caching = network.cache_context("cond") if hasattr(network, "cache_context") else nullcontext()
        with called(self.network, network), caching, scaled_loras(network, lora_scale):
            if hasattr(self.network, "_hf_hook") and self.offload is None:  # offloaded as a whole, now on `device`
                nn.Module.to(student, device=device)
            try:
                yield
            finally:
                if hasattr(network, "_reset_stateful_cache"):
                    network._reset_stateful_cache()

    def set_offload(self, offload: Callable[[Any], Any] | None) -> None:
        """Offload the networks of adapters by `offload`, now and whenever one is added; None stops offloading."""
        if self.offload is not None:
            for network in self.networks[1:]:
                remove_hook_from_module(network, recurse=True)
        self.offload, self._merged = offload, None
        for part in (*self.networks[1:], *(entry.adapter for entry in self.loaded.values())):
            self._place(part)

    def sync_loras(self) -> None:
        """Update the adapters' networks to the backbone's current LoRAs, which other pipelines that share it may have
        changed."""
        loras = lora_state(self.network)
        if loras == self._loras:
            return
        if loras.keys() == self._loras.keys():
            for network in self.networks[1:]:
                copy_lora_scales(network, self.network)
        else:
            self.require_loras_changeable()
            self.loaded = {name: self._on_backbone(entry) for name, entry in self.loaded.items()}
            self._students = {}
        self._loras, self._merged = loras, None

    def require_loras_changeable(self) -> None:
        """Raise UserError if offloading keeps the loaded adapters from following a change of the backbone's LoRAs."""
        if self.loaded:
            self._require_not_offloaded("LoRA")

    def _on_backbone(self, entry: LoadedAdapter) -> LoadedAdapter:
        """Return the adapter with its low-rank updates on the current backbone."""
        if entry.full:
            return entry
        own = update_names(entry.network)
        network = join_lora(self.network, dict.fromkeys(own, entry.network)) if own else self.network
        return replace(entry, network=self._place(network).requires_grad_(False).eval())

    def _rebase(self, network: Any, family: str) -> None:
        """Load all adapters again for another network."""
        loaded, weights, self.network, self.family = self.loaded, self.weights, network, family
        self.loaded, self.weights, self._loras = {}, {}, lora_state(network)
        for name, entry in loaded.items():
            self.load(entry.folder, name, entry.task.name)
        self.set(list(weights), list(weights.values()))

    def copy(self, network: Any, family: str) -> AdapterStore:
        """Return a store of the same adapters for another pipeline; they are shared if `network` is the same."""
        other = AdapterStore(network, family, self.model)
        other.loaded, other.weights, other.fused, other.layout = (
            dict(self.loaded),
            dict(self.weights),
            self.fused,
            self.layout,
        )
        if network is self.network:
            other._students, other._loras = dict(self._students), self._loras
        else:
            other._rebase(network, family)
        return other

    def _place(self, module: Any) -> Any:
        """Move a module to the backbone's device, dtype and memory format, or offload it.

        Bypasses diffusers' `to`, which warns of every cast. Parameters shared with the backbone stay shared.
        """
        if self.offload is not None:
            for part in (module.network, module.adapter) if isinstance(module, Student) else (module,):
                if part is not None and not hasattr(part, "_hf_hook") and not hasattr(part, "_diffusers_hook"):
                    self.offload(part)
            return module
        placement: Any = {"device": self.network.device, "dtype": self.network.dtype, "memory_format": self.layout}
        return nn.Module.to(module, **placement)

    def load_saved(self, folder: Path) -> None:
        """Load and activate the adapters saved with a pipeline in `folder`, if any. Raises UserError if they are
        broken."""
        weights = saved_weights(folder)
        if weights is None:
            return
        for path in sorted((folder / ADAPTERS).glob("*/config.json")):
            self.load(path.parent, path.parent.name)
        self.set(list(weights), list(weights.values()))
