"""The objectives that a recipe may name. A new one is a file in this folder and an entry of OBJECTIVES."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .codi import codi
from .consistency import consistency
from .decoupled import decoupled
from .finetune import finetune
from .flow_map import flow_map
from .guided import guided

Options = Mapping[str, Any]
Passes = Callable[[Options, int], float]


def _data_term(options: Options, scales: int) -> float:
    """Return the passes of a guided target: one for each conditioning, from full to none."""
    return scales + 1 if scales else 0


@dataclass(frozen=True)
class Objective:
    """An objective and what the training has to know of it.

    `loss(student, average, batch, schedule, generator, **options)` returns named losses. `passes(options)` are the
    forward passes of the network that an image costs, a backward pass counted as two; `guided(options, scales)` those
    that an image with distilled guidance adds. `sampler`: of sampling.sampler.SAMPLERS. `target_time`: whether the
    network gets a target time as an input. `teacher`: a frozen network that the loss gets, "adapter" (the recipe's
    teacher, by default the starting point) or "backbone" (without any adapter); "" for none. `label`: the name in
    tables of adapters that it trained; "" for the adapter's own name.
    """

    loss: Callable[..., dict[str, Tensor]]
    passes: Callable[[Options], float]
    label: str
    guided: Passes = _data_term
    sampler: str = "ddim"
    target_time: bool = False
    teacher: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the loss with their values; not the networks and tensors among its arguments."""
        parameters = inspect.signature(self.loss).parameters.values()
        inputs = ("teacher", "t", "index")
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in inputs}

    def teacher_for(self, options: Options) -> str:
        """Return the frozen network that the loss needs with these options, as `teacher` has it."""
        ode = {**self.defaults, **options}.get("ode")
        return "" if ode == "own" else self.teacher or ("adapter" if ode == "teacher" else "")

    def cost(self, options: Options, scales: int, share: float) -> float:
        """Return the passes of an image on average, where a `share` of the updates distils `scales` guidance scales."""
        options = {**self.defaults, **options}
        return self.passes(options) + share * self.guided(options, scales)


def _codi_passes(options: Options) -> float:
    return 4 + (options["ode"] == "teacher") - (options["consistency_weight"] == 0)


def _instant_share(options: Options) -> float:
    """Return the share of a flow map's rows whose target time is their own time."""
    return options["warmup"] + (1 - options["warmup"]) * options["instant"]


# `codi` has every choice of the paper, `codi-release` those of the code that its authors released: times on a grid of
# 50 levels, drawn for each sample, steps by the frozen backbone without the condition, consistency of signals.
# `codi-tuned` is the paper's loss for a short training: a time of its own for every sample (less noise), the data term
# weighted as the backbone was trained with (low noise counts too), and a longer step of the consistency.
_RELEASE: dict[str, Any] = {"dt": 50, "shared_t": False, "on_grid": True, "consistency": "signal", "ode": "teacher"}
_TUNED: dict[str, Any] = {"dt": 50, "shared_t": False, "signal_weighting": "velocity"}
OBJECTIVES: dict[str, Objective] = {
    "codi": Objective(codi, _codi_passes, "codi"),
    "codi-release": Objective(
        functools.partial(codi, **_RELEASE), _codi_passes, "codi-release", teacher="backbone"
    ),
    "codi-tuned": Objective(functools.partial(codi, **_TUNED), _codi_passes, "codi-tuned"),
    "flow-map": Objective(
        flow_map, lambda options: 3 + 2 * (1 - _instant_share(options)), "flow-map", sampler="map", target_time=True,
        guided=lambda options, scales: _instant_share(options) * _data_term(options, scales),
    ),
    "decoupled": Objective(decoupled, lambda options: 7, "decoupled", sampler="renoise", target_time=True),
    "finetune": Objective(finetune, lambda options: 3, "ldm"),
    "guided": Objective(
        guided, lambda options: 5, "", guided=lambda options, scales: 2 * scales, teacher="adapter"
    ),
    "consistency": Objective(
        consistency, lambda options: 5, "", guided=lambda options, scales: scales, sampler="renoise",
        teacher="adapter",
    ),
}  # fmt: skip
