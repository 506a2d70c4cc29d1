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

from ..data.batches import Batch, collate
from ..data.sources import CorruptSample, Sample, Source
from ..errors import UserError
from ..tasks import Task, means
from .metrics import MAX_PSNR, Features, default_features, frechet_distance, maps_distance, psnr, ssim

READ_AT_ONCE = 16  # samples; independent of the batch, so that what is skipped does not depend on it

Run = Callable[[Tensor, list[str], int, list[int]], Tensor]
Judge = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
"""(output (B, 3, H, W), given, batch) -> named figures (B,), higher is better, NaN where there is nothing to measure:
what only another network can tell, e.g. how far the depth that it reads from the output is from the given one."""


@dataclass(frozen=True)
class Method:
    """One way to make pictures.

    `run(given, prompts, steps, seeds)` maps what a user would bring (B, ...), a prompt and a seed for each to pictures
    (B, 3, H, W) in [0, 1]. Row i may depend on `given[i]`, `prompts[i]` and `seeds[i]` alone, not on the batch around
    it. `steps` are the step counts to measure; (0,) for a method that takes none. With `sees_truth`, `run` gets the
    true pictures instead of what a user would bring: a bound on what others can reach.
    """

    name: str
    run: Run
    steps: tuple[int, ...] = (1, 2, 4)
    sees_truth: bool = False


@dataclass(frozen=True)
class Row:
    """One method at one step count: means over the samples, `fd` over the whole set, latency of a single picture."""

    method: str
    steps: int
    psnr: float  # dB, higher is better
    ssim: float  # at most 1, higher is better
    distance: float  # ENLite0 distance, lower is better
    fd: float  # FD-ENLite0, lower is better
    obedience: float | None  # the headline of `measures`, higher is better; None where there is none
    latency_ms: float  # median of single-picture calls
    measures: dict[str, float] = field(default_factory=dict)  # the judge's and the task's own figures


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
    pipe: Any, steps: Sequence[int] = (1, 2, 4), name: str = "codi", guidance_scale: float | None = None
) -> Method:
    """`pipe` (a `CoDiPipeline`: one seed for each picture, `output_type="pt"`) as a method, called as users call it: a
    picture and its mask apart, a size where there is no picture. `guidance_scale` None is the adapter's own."""

    def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        inputs: dict[str, Any] = {"image": given}
        if given.shape[1] == 0:
            inputs = {"height": given.shape[-2], "width": given.shape[-1]}
        elif given.shape[1] == 4:
            inputs = {"image": given[:, :3], "mask": given[:, 3:]}
        made = pipe(**inputs, prompt=prompts, steps=steps, guidance_scale=guidance_scale, seed=seeds, output_type="pt")
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
    judge: Judge | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> Results:
    """Measure `methods` (a list of `Method`, or a pipeline, then run at `steps`) on `source`, baselines first.

    The first `count` readable samples, rendered or cropped to `size` pixels, are used (all, if there are fewer). What
    each method is given is made by `task.given` from a generator keyed by (seed, position), and starting noise is keyed
    by `sample_seeds`, so neither `batch` nor the list of methods changes any figure but latency. Latency is the median
    of `calls` single-picture calls after a warm-up, methods taking turns so that a busy moment hits all alike. The
    first `keep` samples' pictures are kept in `Results.pictures`. `progress(done, total)` counts pictures made.
    Truth and prompts are the task's. Obedience is the first figure of `judge`, or else of the task; both are told in
    `Row.measures`, means over the samples that have them.

    Raises `UserError` when fewer than two samples can be read or a method makes non-finite pictures.
    """
    chosen: list[Method] = list(methods) if isinstance(methods, (list, tuple)) else [pipeline_method(methods, steps)]
    runs = [(method, n) for method in [*baselines(task), *chosen] for n in method.steps]
    features = features or default_features()
    reader = _Reader(source, size)
    tallies = [_Tally() for _ in runs]
    truths: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {}
    first: tuple[Tensor, Tensor, list[str]] | None = None
    count = min(count, len(source))
    done = 0
    samples = islice(reader, count)
    while group := list(islice(samples, batch)):
        positions = range(done, done + len(group))
        given = torch.cat([task.given(collate([s]), _stream(seed, k)) for s, k in zip(group, positions, strict=True)])
        whole = collate(group)
        prompts, truth = task.prompts(whole), task.truth(whole)
        first = first or (given, truth, prompts)
        truth_maps = features(truth)
        truths.append(truth_maps.pooled.cpu())
        _keep(kept, "given", _shown(task, given), keep)
        for number, ((method, n), tally) in enumerate(zip(runs, tallies, strict=True)):
            seen = truth if method.sees_truth else given
            output = _pictures(method, n, seen, prompts, sample_seeds(seed, positions), truth)
            maps = features(output)
            tally.pooled.append(maps.pooled.cpu())
            tally.add(
                {"psnr": psnr(output, truth), "ssim": ssim(output, truth), "distance": maps_distance(maps, truth_maps)},
                (judge(output, given, whole) if judge else {}) | task.obedience(output, given, whole),
            )
            _keep(kept, f"{method.name} · {n}" if n else method.name, output, keep)
            if progress:
                progress(done * len(runs) + (number + 1) * len(group), count * len(runs))
        _keep(kept, "truth", truth, keep)
        done += len(group)
    if first is None or done < 2:
        raise UserError(f"{source.describe()}: holds {done} readable pictures: at least 2 are needed to measure")
    latencies = _latencies(runs, *first, seed=seed, calls=calls)
    headline = next(iter(tallies[0].measures), None) if tallies else None
    rows = []
    for (method, n), tally, ms in zip(runs, tallies, latencies, strict=True):
        measures, fd = means(tally.measures), frechet_distance(torch.cat(tally.pooled), torch.cat(truths))
        obeys = measures.get(headline) if headline else None
        rows.append(
            Row(method.name, n, **means(tally.figures), fd=fd, obedience=obeys, latency_ms=ms, measures=measures)
        )
    # "truth" is the last column whatever the number of batches.
    kept["truth"] = kept.pop("truth")
    return Results(
        task=task.name,
        count=done,
        seed=seed,
        rows=rows,
        obedience_unit=f"{headline}, by a judge" if judge and headline else task.obedience_unit,
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
    """The figures of one method at one step count, sample by sample, in the order in which they first come."""

    def __init__(self) -> None:
        self.figures: dict[str, Tensor] = {}
        self.measures: dict[str, Tensor] = {}
        self.pooled: list[Tensor] = []

    def add(self, figures: dict[str, Tensor], measures: dict[str, Tensor]) -> None:
        for into, values in ((self.figures, figures), (self.measures, measures)):
            for name, value in values.items():
                value = value.double().cpu().clamp_max(MAX_PSNR)
                into[name] = torch.cat([into[name], value]) if name in into else value


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


def _shown(task: Task, given: Tensor) -> Tensor:
    """What people see of `given`: itself where it is a picture or a map, else the picture that the adapter sees."""
    return given if given.shape[1] in (1, 3) else task.condition(given)[:, :3]


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
    runs: list[tuple[Method, int]], given: Tensor, truth: Tensor, prompts: list[str], *, seed: int, calls: int
) -> list[float]:
    """Median milliseconds of one picture for each run; round r takes every run once, round 0 is the warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(calls + 1):
        k = turn % len(given)
        for (method, steps), spent in zip(runs, times, strict=True):
            seen = truth if method.sees_truth else given
            start = time.perf_counter()
            method.run(seen[k : k + 1], prompts[k : k + 1], steps, sample_seeds(seed, [k])).cpu()  # .cpu() waits
            spent.append((time.perf_counter() - start) * 1000)
    return [statistics.median(spent[1:]) for spent in times]


def _keep(kept: dict[str, list[Tensor]], name: str, pictures: Tensor, keep: int) -> None:
    have = sum(len(part) for part in kept.setdefault(name, []))
    if have < keep:
        kept[name].append(pictures[: keep - have].cpu())
