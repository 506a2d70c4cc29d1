"""Run several processes as torchrun does, but forked from the test process to skip imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from codi.apps.cli import main

TIMEOUT = 120  # seconds after which the processes count as stuck


@dataclass(frozen=True)
class Results:
    """Exit code, stdout and stderr of each process."""

    codes: list[int | None]
    out: list[str]
    err: list[str]


def launch(
    folder: Path, *arguments: object, count: int = 2, before: Callable[[int], None] = lambda rank: None
) -> Results:
    """Run `codi` with these arguments in `count` processes at once, each after `before(rank)`.

    Output goes through files in `folder`. Fails if a process still runs after TIMEOUT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if torch.cuda.is_initialized():
        pytest.skip("a fork cannot use CUDA again")
    context = multiprocessing.get_context("fork")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    processes = [
        context.Process(
            target=_run, args=(rank, environment, folder, [str(argument) for argument in arguments], before)
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    output = [[(folder / f"{rank}.{kind}").read_text() for rank in range(count)] for kind in ("out", "err")]
    assert not stuck, f"processes {stuck} still run after {TIMEOUT} s: {output}"
    return Results([process.exitcode for process in processes], *output)


def _run(
    rank: int, environment: dict[str, str], folder: Path, arguments: list[str], before: Callable[[int], None]
) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = 99
    try:
        before(rank)
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
