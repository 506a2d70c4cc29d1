"""The registry of objectives that a recipe can select. A new one is a file in this folder and an entry in
OBJECTIVES."""

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
    """Return the number of forward passes for a guided target: one for each conditioning, from full to none."""
    return scales + 1 if scales else 0


@dataclass(frozen=True)
class Objective:
    """An objective and the properties of it that training needs.

    `loss(student, average, batch, schedule, generator, **options)` returns named losses. `passes(options)` is the cost
    of an image in forward passes of the network, a backward pass counted as two; `guided(options, scales)` the extra
    cost of an image with distilled guidance. `sampler`: a key of sampling.sampler.SAMPLERS. `target_time`: True if the
    network has the target time as an input. `teacher`: the frozen network that the loss takes, "adapter" (the recipe's
    teacher, by default the starting point) or "backbone" (without any adapter); "" for none. `label`: the name, in
    tables, of adapters trained with it; "" for the adapter's own name.
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
        """The options of the loss and their default values, without the arguments that are networks or tensors."""
        parameters = inspect.signature(self.loss).parameters.values()
        inputs = ("teacher", "t", "index")
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in inputs}

    def teacher_for(self, options: Options) -> str:
        """Return the frozen network that the loss needs with these options, as a value of `teacher`."""
        ode = {**self.defaults, **options}.get("ode")
        return "" if ode == "own" else self.teacher or ("adapter" if ode == "teacher" else "")

    def cost(self, options: Options, scales: int, share: float) -> float:
        """Return the mean cost of an image in passes, if a `share` of the updates distills `scales` guidance scales."""
        options = {**self.defaults, **options}
        return self.passes(options) + share * self.guided(options, scales)


def _codi_passes(options: Options) -> float:
    return 4 + (options["ode"] == "teacher") - (options["consistency_weight"] == 0)


def _flow_map_passes(options: Options) -> float:
    return 3 + 5 * (1 - options["warmup"]) * options["share"]


# `codi` has the settings of the paper; `codi-release` those of the authors' released code: a time for each sample,
# a multiple of 50 levels, steps by the frozen backbone without the condition, consistency of signal predictions.
# `codi-tuned` is the paper's loss for short trainings: a time for each sample (less gradient noise), the data term
# weighted as in the backbone's own training (so low noise levels count too), and a longer consistency step.
_RELEASE: dict[str, Any] = {"dt": 50, "shared_t": False, "on_grid": True, "consistency": "signal", "ode": "teacher"}
_TUNED: dict[str, Any] = {"dt": 50, "shared_t": False, "signal_weighting": "velocity"}
OBJECTIVES: dict[str, Objective] = {
    "codi": Objective(codi, _codi_passes, "codi"),
    "codi-release": Objective(
        functools.partial(codi, **_RELEASE), _codi_passes, "codi-release", teacher="backbone"
    ),
    "codi-tuned": Objective(functools.partial(codi, **_TUNED), _codi_passes, "codi-tuned"),
    "flow-map": Objective(flow_map, _flow_map_passes, "flow-map", sampler="map", target_time=True),
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
