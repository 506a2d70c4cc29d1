"""Communication between the processes that train one model, so that none waits for one that has ended.

A launcher (torchrun, accelerate launch) starts the processes, make_accelerator connects them. In a single process none
of this does anything. Messages are a few bytes between CPUs, in a group apart from that of the gradients.
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
TIMEOUT = timedelta(hours=6)  # all wait while one encodes a data set; a process that has ended is noticed at once


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def _group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def _reduce(tensor: torch.Tensor, operation: Any) -> torch.Tensor:
    if count() > 1:
        try:
            dist.all_reduce(tensor, operation, _group(dist.group.WORLD))
        except RuntimeError as error:
            raise UserError("another process of this run has ended: its own message says why: fix that") from error
    return tensor


def shut_down() -> None:
    """Close the connection that make_accelerator opened: for the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_true(flag: bool) -> bool:
    """Return whether `flag` is set in one of the processes."""
    return bool(_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX))


def total(values: dict[str, float]) -> dict[str, float]:
    """Return the sums of `values` over the processes, all of which pass the same names."""
    sums = _reduce(torch.tensor(list(values.values()), dtype=torch.float64), dist.ReduceOp.SUM)
    return dict(zip(values, sums.tolist(), strict=True))


@contextmanager
def sharing_errors() -> Iterator[None]:
    """Raise a UserError that the block raises in one process in all of them. All wait at the end of the block."""
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    if not any_true(own is not None):
        return
    messages: list[str | None] = [own and str(own)] * count()
    if count() > 1:
        dist.all_gather_object(messages, own and str(own), group=_group(dist.group.WORLD))
    first = next(number for number, text in enumerate(messages) if text is not None)
    raise own or UserError(f"process {first} of {count()}: {messages[first]}")


@contextmanager
def local_errors() -> Iterator[None]:
    """Raise a UserError of the block in this process only: for work whose result the others may already wait for, so
    that they cannot receive its message. They notice that this process has ended."""
    try:
        yield
    except UserError as error:
        error.alone = True
        raise


def first_then_all(work: Callable[[], T]) -> T:
    """Return the result of `work`, which writes files when first called: in the first process, then in the others."""
    with sharing_errors():
        result = work() if rank() == 0 else None
    with sharing_errors():
        return work() if result is None else result
