"""Measures methods against each other on held-out samples: the same inputs, noise keys, truth and machine for all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.sources import CorruptSample, Sample, Source
from ..errors import UserError
from ..tasks import Task
from .metrics import MAX_PSNR, Features, default_features, frechet_distance, maps_distance, psnr, ssim

READ_AT_ONCE = 16  # samples; independent of the batch, so that what is skipped does not depend on it

Run = Callable[[Tensor, list[str], int, list[int]], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to make pictures.

    `run(given, prompts, steps, seeds)` maps what a user would bring (B, ...), a prompt and a seed for each to pictures
    (B, 3, H, W) in [0, 1]. Row i may depend on `given[i]`, `prompts[i]` and `seeds[i]` alone, not on the batch around
    it. `steps` are the step counts to measure; (0,) for a method that takes none.
    """

    name: str
    run: Run
    steps: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """One method at one step count: means over the samples, `fd` over the whole set, latency of a single picture."""

    method: str
    steps: int
    psnr: float  # dB, higher is better
    ssim: float  # at most 1, higher is better
    distance: float  # ENLite0 distance, lower is better
    fd: float  # FD-ENLite0, lower is better
    obedience: float  # the task's own unit, higher is better
    latency_ms: float  # median of single-picture calls


@dataclass
class Results:
    """The rows of one run and what is needed to read them."""

    task: str
    count: int
    seed: int
    rows: list[Row]
    obedience_unit: str = ""
    skipped: int = 0  # unreadable samples passed over
    machine: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False)  # column -> (K, C, H, W), for a contact sheet

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: task, count, seed, rows (one object a row) and how and where they were measured."""
        told: dict[str, Any] = {"task": self.task, "count": self.count, "seed": self.seed}
        if self.command:
            told["command"] = self.command
        if self.skipped:
            told["skipped"] = self.skipped
        told["obedience_unit"] = self.obedience_unit
        told["rows"] = [asdict(row) for row in self.rows]
        told["machine"] = self.machine
        return told


def pipeline_method(
    pipe: Any, steps: Sequence[int] = (1, 2, 4), name: str = "codi", guidance_scale: float = 1.0
) -> Method:
    """`pipe` (a `CoDiPipeline`: one seed for each picture, `output_type="pt"`) as a method."""

    def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        made = pipe(
            image=given, prompt=prompts, steps=steps, guidance_scale=guidance_scale, seed=seeds, output_type="pt"
        )
        return made.images

    return Method(name, run, tuple(steps))


def baselines(task: Task) -> list[Method]:
    """What anyone has without a model: bicubic enlargement for upscaling, nothing for the other tasks."""
    if task.name != "upscale":
        return []
    return [Method("bicubic", lambda given, prompts, steps, seeds: task.condition(given), (0,))]


def sample_seeds(seed: int, positions: Sequence[int]) -> list[int]:
    """The seed of each sample's starting noise, from the run's `seed` and the sample's position."""
    return [seed * 100003 + k for k in positions]


@torch.no_grad()
def evaluate(
    methods: Any,
    task: Task,
    source: Source,
    count: int = 500,
    steps: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    batch: int = 16,
    *,
    size: int = 64,
    features: Features | None = None,
    calls: int = 5,
    keep: int = 8,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> Results:
    """Measure `methods` (a list of `Method`, or a pipeline, then run at `steps`) on `source`, baselines first.

    The first `count` readable samples, rendered or cropped to `size` pixels, are used (all, if there are fewer). What
    each method is given is made by `task.given` from a generator keyed by (seed, position), and starting noise is keyed
    by `sample_seeds`, so neither `batch` nor the list of methods changes any figure but latency. Latency is the median
    of `calls` single-picture calls after a warm-up, methods taking turns so that a busy moment hits all alike. The
    first `keep` samples' pictures are kept in `Results.pictures`. `progress(done, total)` counts pictures made.

    Raises `UserError` when fewer than two samples can be read or a method makes non-finite pictures.
    """
    chosen: list[Method] = list(methods) if isinstance(methods, (list, tuple)) else [pipeline_method(methods, steps)]
    runs = [(method, n) for method in [*baselines(task), *chosen] for n in method.steps]
    features = features or default_features()
    reader = _Reader(source, size)
    tallies = [_Tally() for _ in runs]
    truths: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {}
    first: tuple[Tensor, list[str]] | None = None
    count = min(count, len(source))
    done = 0
    samples = islice(reader, count)
    while group := list(islice(samples, batch)):
        positions = range(done, done + len(group))
        given = torch.cat([task.given(_single(s), _stream(seed, k)) for s, k in zip(group, positions, strict=True)])
        prompts = [sample.text if task.prompted else "" for sample in group]
        truth = torch.stack([sample.image for sample in group])
        first = first or (given, prompts)
        truth_maps = features(truth)
        truths.append(truth_maps.pooled.cpu())
        _keep(kept, "given", given, keep)
        for number, ((method, n), tally) in enumerate(zip(runs, tallies, strict=True)):
            output = _pictures(method, n, given, prompts, sample_seeds(seed, positions), truth)
            maps = features(output)
            tally.pooled.append(maps.pooled.cpu())
            for figure, values in (
                ("psnr", psnr(output, truth)),
                ("ssim", ssim(output, truth)),
                ("distance", maps_distance(maps, truth_maps)),
                ("obedience", torch.nan_to_num(task.obedience(output, given), posinf=MAX_PSNR)),
            ):
                tally.values[figure].append(values.double().cpu())
            _keep(kept, f"{method.name} · {n}" if n else method.name, output, keep)
            if progress:
                progress(done * len(runs) + (number + 1) * len(group), count * len(runs))
        _keep(kept, "truth", truth, keep)
        done += len(group)
    if first is None or done < 2:
        raise UserError(f"{source.describe()}: holds {done} readable pictures: at least 2 are needed to measure")
    latencies = _latencies(runs, *first, seed=seed, calls=calls)
    rows = [
        Row(
            method.name,
            n,
            **tally.means(),
            fd=frechet_distance(torch.cat(tally.pooled), torch.cat(truths)),
            latency_ms=ms,
        )
        for (method, n), tally, ms in zip(runs, tallies, latencies, strict=True)
    ]
    # "truth" is the last column whatever the number of batches.
    kept["truth"] = kept.pop("truth")
    return Results(
        task=task.name,
        count=done,
        seed=seed,
        rows=rows,
        obedience_unit=task.obedience_unit,
        skipped=reader.skipped,
        machine=describe_machine(),
        command=command,
        pictures={name: torch.cat(parts) for name, parts in kept.items()},
    )


def describe_machine() -> dict[str, Any]:
    """What latency depends on: processor, cores, threads, torch, accelerator."""
    told: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
    return told


class _Tally:
    """The figures of one method at one step count, sample by sample."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "distance", "obedience")}
        self.pooled: list[Tensor] = []

    def means(self) -> dict[str, float]:
        return {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}


class _Reader:
    """The readable samples of a source in order; counts those passed over."""

    def __init__(self, source: Source, size: int):
        self.source, self.size, self.skipped = source, size, 0

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self.source), READ_AT_ONCE):
            for sample in self.source.read(range(start, min(start + READ_AT_ONCE, len(self.source))), self.size):
                if isinstance(sample, CorruptSample):
                    self.skipped += 1
                else:
                    yield sample


def _single(sample: Sample) -> Batch:
    extras = {name: column[None] for name, column in sample.extras.items()}
    return Batch(sample.image[None], [sample.text], extras, [sample.index], [sample.instruction])


def _stream(seed: int, position: int) -> torch.Generator:
    """The generator that degrades sample `position`: its own stream, or its noise would equal the sampler's."""
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _pictures(method: Method, steps: int, given: Tensor, prompts: list[str], seeds: list[int], truth: Tensor) -> Tensor:
    output = method.run(given, prompts, steps, seeds).detach().float().cpu()
    if output.shape != truth.shape:
        raise ValueError(f"{method.name}: made {tuple(output.shape)}, the truth is {tuple(truth.shape)}")
    if not output.isfinite().all():
        raise UserError(f"{method.name}: made pictures with non-finite values at {steps} steps: check its weights")
    return output.clamp(0, 1)


def _latencies(
    runs: list[tuple[Method, int]], given: Tensor, prompts: list[str], *, seed: int, calls: int
) -> list[float]:
    """Median milliseconds of one picture for each run; round r takes every run once, round 0 is the warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(calls + 1):
        k = turn % len(given)
        for (method, steps), spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            method.run(given[k : k + 1], prompts[k : k + 1], steps, sample_seeds(seed, [k])).cpu()  # .cpu() waits
            spent.append((time.perf_counter() - start) * 1000)
    return [statistics.median(spent[1:]) for spent in times]


def _keep(kept: dict[str, list[Tensor]], name: str, pictures: Tensor, keep: int) -> None:
    have = sum(len(part) for part in kept.setdefault(name, []))
    if have < keep:
        kept[name].append(pictures[: keep - have].cpu())
