"""Several processes that train one model: what they agree on, so that none waits for one that is gone.

A launcher (torchrun, accelerate launch) starts them, make_accelerator lets them meet. In a process of its own all of
this does nothing. Messages are a few bytes between CPUs, beside the groups that gradients go through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # all wait while one encodes a data set; one that is gone is noticed at once


def rank() -> int:
    """This process' number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def _group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _reduce(tensor: torch.Tensor, operation: Any) -> torch.Tensor:
    if count() > 1:
        try:
            dist.all_reduce(tensor, operation, _group(dist.group.WORLD))
        except RuntimeError as error:
            raise UserError("another process of this run has ended: its own message says why: mend that") from error
    return tensor


def part() -> None:
    """Ends what make_accelerator began: for the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def in_any(flag: bool) -> bool:
    """Whether `flag` is set in one of the processes."""
    return bool(_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX))


def total(values: dict[str, float]) -> dict[str, float]:
    """The sums over the processes; all bring the same names."""
    sums = _reduce(torch.tensor(list(values.values()), dtype=torch.float64), dist.ReduceOp.SUM)
    return dict(zip(values, sums.tolist(), strict=True))


@contextmanager
def together() -> Iterator[None]:
    """What one process cannot do, none does: a UserError in one of them is raised in all. All wait at the end."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    if not in_any(mine is not None):
        return
    told: list[str | None] = [mine and str(mine)] * count()
    if count() > 1:
        dist.all_gather_object(told, mine and str(mine), group=_group(dist.group.WORLD))
    first = next(number for number, text in enumerate(told) if text is not None)
    raise mine or UserError(f"process {first} of {count()}: {told[first]}")


@contextmanager
def alone() -> Iterator[None]:
    """For work that others cannot be told about, because they may already wait for its result: a UserError is this
    process' own to say, and ends it. The others notice."""
    try:
        yield
    except UserError as error:
        error.alone = True
        raise


def first_then_all(work: Callable[[], T]) -> T:
    """What `work` gives, which writes files when first called: the first process calls it, then the others do."""
    with together():
        made = work() if rank() == 0 else None
    with together():
        return work() if made is None else made
