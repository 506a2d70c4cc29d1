"""The adapters of a pipeline: loaded once, side by side on one backbone, and set in milliseconds."""

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
    """One adapter, the network that works with it, its task, and the folder it came from."""

    adapter: Adapter
    network: Any
    task: Task
    folder: Path
    full: bool
    """Whether it brought a network of its own, which is there in whole or not at all."""

    @property
    def info(self) -> dict[str, Any]:
        """What the adapter says of itself."""
        return self.adapter.config["info"] or {}


def names_of(names: Any) -> list[str]:
    """Return one name or several as a list. Raises UserError for anything else, and for a dict, whose values would be
    ignored."""
    listed = isinstance(names, Iterable) and not isinstance(names, (str, Mapping))
    several: list[Any] = list(names) if listed else [names]
    if wrong := [name for name in several if not isinstance(name, str)]:
        raise UserError(f"{one_line(repr(wrong[0]))}: not the name of an adapter: give one, or a list of them")
    return several


class AdapterStore:
    """Adapters by name for `network`, the backbone's own, of `family`; `weights` are those of the ones that are set.
    `model` is where the backbone came from, which may have adapters of its own."""

    def __init__(self, network: Any, family: str, model: str | Path = "mini") -> None:
        self.network, self.family, self.model = network, family, model
        self._loras = lora_state(network)  # of users, which the networks of `loaded` carry, too
        self.offload: Callable[[Any], Any] | None = None
        """What is done to networks that a pipeline of diffusers does not know of, where its own are offloaded."""
        self.loaded: dict[str, LoadedAdapter] = {}
        self.weights: dict[str, float] = {}
        self._students: dict[tuple[str, ...], Student] = {}
        self._merged: tuple[Any, Student] | None = None  # what for, and the student
        self._compiling: dict[str, Any] | None = None
        self.fused = False
        self.layout = torch.preserve_format

    def load(
        self, source: str | Path, name: str | None = None, task: str | None = None, loras: Sequence[str] = ()
    ) -> str:
        """Loads an embedded adapter or a folder; returns the name it has from now on, by default the folder's. `loras`:
        names that are taken by LoRAs of other parts than the network.

        Raises UserError for an adapter that does not fit or is not of `task`, and for a name that is taken.
        """
        if not isinstance(source, (str, Path)) or not isinstance(name, (str, type(None))):
            wrong = source if isinstance(name, (str, type(None))) else name
            raise UserError(f"{one_line(repr(wrong))}: not an adapter: give the name of one, or a folder")
        if self.network is None:
            raise UserError(f"{source}: this pipeline has no network: pass unet=... or transformer=... first")
        chosen = fitting_adapter(source, self.network, self.family, self.model)
        folder = chosen.resolve()
        name = (name or folder.name).replace(".", "-")  # dots would part the names of modules
        if not name or "/" in name or "\\" in name:
            raise UserError(f"{name!r}: not a name for an adapter: it becomes a folder's, so leave slashes out")
        if name in self.loaded:
            if self.loaded[name].folder == folder:
                return name
            raise UserError(f"{source}: an adapter called {name!r} is loaded already: name this one with as_=...")
        if clash := {name, *TASKS} & {*lora_names(self.network), *loras}:  # its updates are called by its task
            raise UserError(f"{source}: a LoRA is called {clash.pop()!r}: load that under another name first")
        self._require_free(name)
        wanted = source if chosen == find_adapter(source, self.model) else chosen  # messages repeat what was given
        adapter, network = load_adapter(wanted, task, self.family, self.network, self.model)
        info = require_info(adapter.config["info"] or {}, str(folder / "config.json"))
        kind = info.get("task", task)
        if kind is None:
            raise UserError(f"{source}: does not say which task it does: name it with task=...")
        entry = LoadedAdapter(adapter, network, get_task(kind, **info.get("task_options", {})), folder,
                           own_network(folder) is not None)  # fmt: skip
        for module in (adapter, network):
            self._place(module).requires_grad_(False).eval()
        self.loaded[name] = entry
        return name

    def set(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Set these and no others; `weights` are 1 by default, and one serves all. Raises UserError for what cannot be
        set, and then leaves everything as it was."""
        names = names_of(names)
        several = isinstance(weights, Iterable) and getattr(weights, "ndim", 1) > 0
        values: list[Any] = list(weights) if several else [1.0 if weights is None else weights] * len(names)  # type: ignore[arg-type]
        if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
            raise UserError(f"weights {values}: not numbers: use 1 for an adapter as it was trained, 0 for none of it")
        if len(values) != len(names) or len(set(names)) != len(names):
            raise UserError(f"{', '.join(names)}: {len(values)} weights for {len(set(names))} adapters: give one each")
        for name in names:
            if name not in self.loaded:
                hint = nearest(name, self.loaded)
                raise UserError(f"{name}: no such adapter loaded{hint}: use {', '.join(self.loaded) or 'load_adapter'}")
        chosen = {name: float(weight) for name, weight in zip(names, values, strict=True)}
        for name, weight in chosen.items():
            self._require_whole(name, "weight", weight)
        if len(chosen) > 1:
            self._student(tuple(chosen))  # which may be refused
        self.weights = chosen

    def _require_free(self, what: str) -> None:
        """Raise UserError where the backbone's layers are offloaded, so that its weights cannot be shared."""
        if self.offload is not None:
            raise UserError(f"{what}: the pipeline is offloaded: load and set adapters first, or call "
                            "remove_all_hooks() and enable offloading again afterwards")  # fmt: skip

    @property
    def active(self) -> dict[str, LoadedAdapter]:
        """Those that are set."""
        return {name: self.loaded[name] for name in self.weights}

    def require_whole(self, strength: float) -> None:
        """Raises UserError for a strength that a full adapter which is set cannot have."""
        for name, weight in self.weights.items():
            if weight:
                self._require_whole(name, "strength", strength)

    def _require_whole(self, name: str, what: str, value: float) -> None:
        if self.loaded[name].full and value not in (0, 1):
            raise UserError(f"{what} {value:g}: {name} is a full adapter, whose backbone is trained too and has no "
                            "degrees: use 1 (as trained) or 0 (the backbone as it was)")  # fmt: skip

    def infos(self, strength: float = 1.0) -> list[dict[str, Any]]:
        """What the adapters with some influence say of themselves."""
        return [self.loaded[name].info for name, weight in self.weights.items() if strength * weight]

    def student(self, strength: float = 1.0, lora_scale: float = 1.0) -> tuple[Student, float]:
        """Return the student to sample with, without influence the backbone alone, and the strength to give it.
        `lora_scale`: of users' LoRAs, where they become part of the weights (see at_work)."""
        self.follow_loras()
        if not self.infos(strength):
            return self._student(()), 1.0
        student = self._student(tuple(self.weights))
        if len(self.weights) == 1:
            strength *= next(iter(self.weights.values()))
        else:
            student.adapter.weights = dict(self.weights)  # type: ignore[union-attr]
        return (self._merge(student, strength, lora_scale) if self.fused else student), strength

    def _merge(self, student: Student, strength: float, lora_scale: float) -> Student:
        """The same, its low-rank updates part of the weights; kept for the next call alike."""
        if not lora_names(student.network):
            return student
        like = (tuple(self.weights.items()), strength, lora_scale)
        if self._merged is None or self._merged[0] != like:
            student.scale(strength)
            with scaled_loras(student.network, lora_scale):
                merged = Student(merge_lora(student.network), student.adapter).eval()
            self._merged = like, self._place(merged)
            if self._compiling is not None:
                merged.compile(**self._compiling)
        return self._merged[1]

    def _student(self, names: tuple[str, ...]) -> Student:
        if names not in self._students:
            adapters = {name: self.loaded[name].adapter for name in names}
            networks = {name: self.loaded[name].network for name in names}
            if len(names) > 1:
                self._require_free(", ".join(names))
                student = compose(self.network, adapters, networks, dict.fromkeys(names, 1.0))
            else:
                student = Student(networks[names[0]], adapters[names[0]]) if names else Student(self.network)
            self._students[names] = self._place(student).eval()
            if self._compiling is not None:
                student.compile(**self._compiling)
        return self._students[names]

    def compile(self, **options: Any) -> None:
        """Has what is loaded, and will be, compiled by torch.compile when first used."""
        self._compiling, self._merged = options, None
        for student in self._students.values():
            student.compile(**options)

    def follow(self) -> None:
        """Moves everything to where the backbone went."""
        self._merged = None
        for entry in self.loaded.values():
            self._place(entry.adapter)
            self._place(entry.network)
        for student in self._students.values():
            self._place(student)

    @property
    def networks(self) -> list[Any]:
        """The backbone's network and those of adapters that have their own modules."""
        found = [entry.network for entry in self.loaded.values()]
        found += [student.network for student in self._students.values()]
        return list({id(network): network for network in (self.network, *found)}.values())

    @contextmanager
    def at_work(self, student: Student, device: torch.device, lora_scale: float = 1.0) -> Iterator[None]:
        """Hold the student's networks ready on `device` while they are called part by part. `lora_scale` weakens the
        LoRAs that the backbone carries. Caches that diffusers keeps between steps start empty."""
        network = student.network
        caching = network.cache_context("cond") if hasattr(network, "cache_context") else nullcontext()
        with called(self.network, network), caching, scaled_loras(network, lora_scale):
            if (
                hasattr(self.network, "_hf_hook") and self.offload is None
            ):  # it was moved as a whole, its weights with it
                nn.Module.to(student, device=device)
            try:
                yield
            finally:
                if hasattr(network, "_reset_stateful_cache"):
                    network._reset_stateful_cache()

    def offloaded(self, how: Callable[[Any], Any] | None) -> None:
        """Offload the networks of adapters by `how`, now and whenever there are new ones; None: no longer."""
        if self.offload is not None:
            for network in self.networks[1:]:
                remove_hook_from_module(network, recurse=True)
        self.offload, self._merged = how, None
        for part in (*self.networks[1:], *(entry.adapter for entry in self.loaded.values())):
            self._place(part)

    def follow_loras(self) -> None:
        """Have the adapters work on the backbone with the LoRAs that it carries now. Other pipelines that share it may
        have changed them."""
        loras = lora_state(self.network)
        if loras == self._loras:
            return
        if loras.keys() == self._loras.keys():
            for network in self.networks[1:]:
                copy_lora_scales(network, self.network)
        else:
            self.require_free_for_loras()
            self.loaded = {name: self._on_backbone(entry) for name, entry in self.loaded.items()}
            self._students = {}
        self._loras, self._merged = loras, None

    def require_free_for_loras(self) -> None:
        """Raise UserError where adapters cannot follow a change of the backbone's LoRAs, which offloading forbids."""
        if self.loaded:
            self._require_free("LoRA")

    def _on_backbone(self, entry: LoadedAdapter) -> LoadedAdapter:
        """Return the same adapter, its low-rank updates on the backbone as it is now."""
        if entry.full:
            return entry
        own = update_names(entry.network)
        network = join_lora(self.network, dict.fromkeys(own, entry.network)) if own else self.network
        return replace(entry, network=self._place(network).requires_grad_(False).eval())

    def _rebase(self, network: Any, family: str) -> None:
        """Load all adapters again, for another network."""
        loaded, weights, self.network, self.family = self.loaded, self.weights, network, family
        self.loaded, self.weights, self._loras = {}, {}, lora_state(network)
        for name, entry in loaded.items():
            self.load(entry.folder, name, entry.task.name)
        self.set(list(weights), list(weights.values()))

    def copy(self, network: Any, family: str) -> AdapterStore:
        """Return the same adapters for a pipeline of `network`: shared, if that is ours."""
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
        """Past diffusers' own `to`, which warns of every cast. Parameters shared with the backbone stay shared."""
        if self.offload is not None:
            for part in (module.network, module.adapter) if isinstance(module, Student) else (module,):
                if part is not None and not hasattr(part, "_hf_hook") and not hasattr(part, "_diffusers_hook"):
                    self.offload(part)
            return module
        where: Any = {"device": self.network.device, "dtype": self.network.dtype, "memory_format": self.layout}
        return nn.Module.to(module, **where)

    def load_saved(self, folder: Path) -> None:
        """Load and set the adapters that were saved with a pipeline in `folder`, if any. Raises UserError where they
        are broken."""
        weights = saved_weights(folder)
        if weights is None:
            return
        for path in sorted((folder / ADAPTERS).glob("*/config.json")):
            self.load(path.parent, path.parent.name)
        self.set(list(weights), list(weights.values()))
