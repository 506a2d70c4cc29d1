"""Several processes as torchrun starts them, but forked from the tests: nothing is imported again."""

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

PATIENCE = 120  # seconds, after which the processes count as stuck


@dataclass(frozen=True)
class Ended:
    """Of each process its exit code, stdout and stderr."""

    codes: list[int | None]
    out: list[str]
    err: list[str]


def launch(folder: Path, *words: object, count: int = 2, before: Callable[[int], None] = lambda rank: None) -> Ended:
    """Runs `codi` with these words in `count` processes at once, each after `before(rank)`; what they print goes
    through files in `folder`. Fails where one is still there after PATIENCE."""
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
        context.Process(target=_run, args=(rank, environment, folder, [str(word) for word in words], before))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = [[(folder / f"{rank}.{kind}").read_text() for rank in range(count)] for kind in ("out", "err")]
    assert not stuck, f"processes {stuck} were still there after {PATIENCE} s: {said}"
    return Ended([process.exitcode for process in processes], *said)


def _run(rank: int, environment: dict[str, str], folder: Path, words: list[str], before: Callable[[int], None]) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = 99
    try:
        before(rank)
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
