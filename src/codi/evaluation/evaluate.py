"""Measurement of methods on held-out samples: same inputs, noise keys, truth and machine for all of them."""

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

READ_AT_ONCE = 16  # samples; not the batch size, so that the choice of skipped samples does not depend on it

Run = Callable[[Tensor, list[str], int, list[int]], Tensor]
Judge = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
"""(output (B, 3, H, W), task input, batch) -> named figures (B,), higher is better, NaN where undefined. For figures
that need another network, e.g. the distance of the depth estimated from the output to the input depth."""


@dataclass(frozen=True)
class Method:
    """One way to generate images.

    `run(inputs, prompts, steps, seeds)` maps task inputs (B, C, H, W), with a prompt and a seed each, to images
    (B, 3, H, W) in [0, 1]. Row i may depend only on `inputs[i]`, `prompts[i]` and `seeds[i]`, not on the rest of the
    batch. `steps` are the step counts to measure; (0,) for a method without steps. With `sees_truth`, `run` gets the
    true images instead of the task inputs: an upper bound for the other methods.
    """

    name: str
    run: Run
    steps: tuple[int, ...] = (1, 2, 4)
    sees_truth: bool = False


@dataclass(frozen=True)
class Row:
    """One method at one step count: means over the samples, `fd` over the whole set, latency of a single image."""

    method: str
    steps: int
    psnr: float  # dB, higher is better
    ssim: float  # at most 1, higher is better
    distance: float  # ENLite0 distance, lower is better
    fd: float  # FD-ENLite0, lower is better
    obedience: float | None  # the first of `measures`, higher is better; None if there is none
    latency_ms: float  # median over calls with one image
    measures: dict[str, float] = field(default_factory=dict)  # figures of the judge and of the task


@dataclass
class Results:
    """The rows of one run, and the information needed to interpret them."""

    task: str
    count: int
    seed: int
    rows: list[Row]
    obedience_unit: str = ""
    skipped: int = 0  # unreadable samples
    machine: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False)  # column -> (K, C, H, W), for a contact sheet

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict: task, count, seed, rows (one object each), command and machine."""
        content: dict[str, Any] = {"task": self.task, "count": self.count, "seed": self.seed}
        if self.command:
            content["command"] = self.command
        if self.skipped:
            content["skipped"] = self.skipped
        content["obedience_unit"] = self.obedience_unit
        content["rows"] = [asdict(row) for row in self.rows]
        content["machine"] = self.machine
        return content


def pipeline_method(
    pipe: Any, steps: Sequence[int] = (1, 2, 4), name: str = "codi", guidance_scale: float | None = None
) -> Method:
    """Return `pipe` (a `CoDiPipeline`) as a method that calls it as users do: one seed per image, image and mask as
    separate arguments, height and width where the task has no image. `guidance_scale` None is the adapter's default."""

    def run(inputs: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
        call: dict[str, Any] = {"image": inputs}
        if inputs.shape[1] == 0:
            call = {"height": inputs.shape[-2], "width": inputs.shape[-1]}
        elif inputs.shape[1] == 4:
            call = {"image": inputs[:, :3], "mask": inputs[:, 3:]}
        result = pipe(**call, prompt=prompts, steps=steps, guidance_scale=guidance_scale, seed=seeds, output_type="pt")
        return result.images

    return Method(name, run, tuple(steps))


def baselines(task: Task) -> list[Method]:
    """Return the methods that need no model: bicubic enlargement for upscaling, none for other tasks."""
    if task.name != "upscale":
        return []
    return [Method("bicubic", lambda inputs, prompts, steps, seeds: task.condition(inputs), (0,))]


def sample_seeds(seed: int, positions: Sequence[int]) -> list[int]:
    """Return the seed of each sample's starting noise, derived from the run's `seed` and the sample's position."""
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

    The first `count` readable samples are used (all, if there are fewer), rendered or cropped to `size` pixels. Task
    inputs come from `task.given` with a generator keyed by (seed, position), and starting noise is keyed by
    `sample_seeds`, so neither `batch` nor the list of methods changes any figure but latency. Latency is the median
    of `calls` calls with one image after a warm-up; methods take turns, so that load on the machine affects all
    equally. `Results.pictures` holds the images of the first `keep` samples. `progress(done, total)` counts generated
    images. The task defines truth and prompts. Obedience is the first figure of `judge`, or of the task if there is no
    judge; `Row.measures` holds the figures of both, as means over the samples for which they are defined.

    Raises `UserError` if fewer than two samples can be read or a method returns non-finite images.
    """
    chosen: list[Method] = list(methods) if isinstance(methods, (list, tuple)) else [pipeline_method(methods, steps)]
    runs = [(method, n) for method in [*baselines(task), *chosen] for n in method.steps]
    features = features or default_features()
    reader = _Reader(source, size)
    tallies = [_Tally() for _ in runs]
    truths: list[Tensor] = []
    pictures: dict[str, list[Tensor]] = {}
    first_group: tuple[Tensor, Tensor, list[str]] | None = None
    count = min(count, len(source))
    done = 0
    samples = islice(reader, count)
    while group := list(islice(samples, batch)):
        positions = range(done, done + len(group))
        inputs = torch.cat([task.given(collate([s]), _stream(seed, k)) for s, k in zip(group, positions, strict=True)])
        collated = collate(group)
        prompts, truth = task.prompts(collated), task.truth(collated)
        first_group = first_group or (inputs, truth, prompts)
        truth_maps = features(truth)
        truths.append(truth_maps.pooled.cpu())
        _collect(pictures, "given", _input_image(task, inputs), keep)
        for number, ((method, n), tally) in enumerate(zip(runs, tallies, strict=True)):
            method_input = truth if method.sees_truth else inputs
            output = _run(method, n, method_input, prompts, sample_seeds(seed, positions), truth)
            maps = features(output)
            tally.pooled.append(maps.pooled.cpu())
            tally.add(
                {"psnr": psnr(output, truth), "ssim": ssim(output, truth), "distance": maps_distance(maps, truth_maps)},
                (judge(output, inputs, collated) if judge else {}) | task.obedience(output, inputs, collated),
            )
            _collect(pictures, f"{method.name} · {n}" if n else method.name, output, keep)
            if progress:
                progress(done * len(runs) + (number + 1) * len(group), count * len(runs))
        _collect(pictures, "truth", truth, keep)
        done += len(group)
    if first_group is None or done < 2:
        raise UserError(f"{source.describe()}: has {done} readable samples: evaluation needs at least 2")
    latencies = _latencies(runs, *first_group, seed=seed, calls=calls)
    headline = next(iter(tallies[0].measures), None) if tallies else None
    rows = []
    for (method, n), tally, ms in zip(runs, tallies, latencies, strict=True):
        measures, fd = means(tally.measures), frechet_distance(torch.cat(tally.pooled), torch.cat(truths))
        obedience = measures.get(headline) if headline else None
        rows.append(
            Row(method.name, n, **means(tally.figures), fd=fd, obedience=obedience, latency_ms=ms, measures=measures)
        )
    # "truth" is the last column for any number of batches.
    pictures["truth"] = pictures.pop("truth")
    return Results(
        task=task.name,
        count=done,
        seed=seed,
        rows=rows,
        obedience_unit=f"{headline}, by a judge" if judge and headline else task.obedience_unit,
        skipped=reader.skipped,
        machine=describe_machine(),
        command=command,
        pictures={name: torch.cat(parts) for name, parts in pictures.items()},
    )


def describe_machine() -> dict[str, Any]:
    """Describe what latency depends on: processor, cores, threads, torch, accelerator."""
    machine: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


class _Tally:
    """Per-sample figures of one method at one step count, in order of first appearance."""

    def __init__(self) -> None:
        self.figures: dict[str, Tensor] = {}
        self.measures: dict[str, Tensor] = {}
        self.pooled: list[Tensor] = []

    def add(self, figures: dict[str, Tensor], measures: dict[str, Tensor]) -> None:
        for total, values in ((self.figures, figures), (self.measures, measures)):
            for name, value in values.items():
                value = value.double().cpu().clamp_max(MAX_PSNR)
                total[name] = torch.cat([total[name], value]) if name in total else value


class _Reader:
    """Iterator over the readable samples of a source, in order; `skipped` counts the others."""

    def __init__(self, source: Source, size: int):
        self.source, self.size, self.skipped = source, size, 0

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self.source), READ_AT_ONCE):
            for sample in self.source.read(range(start, min(start + READ_AT_ONCE, len(self.source))), self.size):
                if isinstance(sample, CorruptSample):
                    self.skipped += 1
                else:
                    yield sample


def _input_image(task: Task, inputs: Tensor) -> Tensor:
    """Return `inputs` if they can be displayed (1 or 3 channels), else the first 3 channels of their condition."""
    return inputs if inputs.shape[1] in (1, 3) else task.condition(inputs)[:, :3]


def _stream(seed: int, position: int) -> torch.Generator:
    """Return the generator that degrades sample `position`; its stream differs from that of the sampler's noise."""
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _run(method: Method, steps: int, inputs: Tensor, prompts: list[str], seeds: list[int], truth: Tensor) -> Tensor:
    output = method.run(inputs, prompts, steps, seeds).detach().float().cpu()
    if output.shape != truth.shape:
        raise ValueError(f"{method.name}: returned shape {tuple(output.shape)}, the truth has {tuple(truth.shape)}")
    if not output.isfinite().all():
        raise UserError(f"{method.name}: returned non-finite values at {steps} steps: check its weights")
    return output.clamp(0, 1)


def _latencies(
    runs: list[tuple[Method, int]], inputs: Tensor, truth: Tensor, prompts: list[str], *, seed: int, calls: int
) -> list[float]:
    """Return the median milliseconds per image of each run; every round times each run once, round 0 is the warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(calls + 1):
        k = turn % len(inputs)
        for (method, steps), run_times in zip(runs, times, strict=True):
            method_input = truth if method.sees_truth else inputs
            start = time.perf_counter()
            method.run(
                method_input[k : k + 1], prompts[k : k + 1], steps, sample_seeds(seed, [k])
            ).cpu()  # .cpu() waits for the device
            run_times.append((time.perf_counter() - start) * 1000)
    return [statistics.median(run_times[1:]) for run_times in times]


def _collect(pictures: dict[str, list[Tensor]], name: str, images: Tensor, limit: int) -> None:
    """Append `images` to column `name` until it holds `limit` of them."""
    count = sum(len(part) for part in pictures.setdefault(name, []))
    if count < limit:
        pictures[name].append(images[: limit - count].cpu())
