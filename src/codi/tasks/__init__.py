"""Tasks: what image a user brings, how the adapter sees it, and how well a result obeys it. One file a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .upscale import Upscale

if TYPE_CHECKING:
    from ..data.batches import Batch


class Task(Protocol):
    """What training, sampling and evaluation ask of a task. Images are (B, C, H, W) in [0, 1]."""

    name: ClassVar[str]
    """As get_task knows it."""
    condition_channels: ClassVar[int]
    """C of `condition`."""
    prompted: ClassVar[bool]
    """Whether users say what to make: a task without prompts is measured without them."""
    obedience_unit: ClassVar[str]
    """What `obedience` measures and its unit, for tables."""

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """What a user would bring, made from a training sample. The same generator state gives the same bytes."""
        ...

    def condition(self, given: Tensor) -> Tensor:
        """The adapter's input (B, condition_channels, H, W) at output size."""
        ...

    def obedience(self, output: Tensor, given: Tensor) -> Tensor:
        """How well `output` (B, 3, H, W) keeps to `given`, (B,), higher is better."""
        ...

    def config(self) -> dict[str, Any]:
        """The options, JSON-able: get_task(name, **config) rebuilds the task."""
        ...


TASKS: dict[str, Callable[..., Task]] = {Upscale.name: Upscale}


def get_task(name: str, **options: Any) -> Task:
    """The task of that name. Raises UserError for an unknown name or option, with the nearest one and the list."""
    if name not in TASKS:
        raise UserError(f"{name}: unknown task{nearest(name, TASKS)}: use one of {', '.join(sorted(TASKS))}")
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(f"{option}: unknown option of task {name}{nearest(option, known)}: use {', '.join(known)}")
    return TASKS[name](**options)
