"""The training loop of all jobs. A job defines the losses; this file runs, stops and resumes it."""

from __future__ import annotations

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from ..errors import UserError, one_line
from . import checkpoint, ema, processes
from .checkpoint import Progress
from .events import Events
from .muon import Muon
from .sharding import Sharded, full_tensor


@dataclass(kw_only=True)
class SharedSettings:
    """Settings that all stages of a run share. Counts are in training images, so that they hold for any batch size."""

    accumulate: int = 1
    """Batches whose gradients one update averages. Several processes divide them among themselves: use a multiple of
    the number of processes; the result is the same for any number."""
    warmup: int = 1_000
    """Images over which the learning rate rises from 0."""
    decay_to: float = 0.1
    """The learning rate falls along a cosine to this share of its peak at the last image; 1 keeps it constant."""
    ema: float = 0.999
    """Decay of the moving average of the weights, per update; lower in the first updates."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "no"
    """no (float32), bf16 or fp16 autocast."""
    log_every: int = 800
    preview_every: int = 5_000
    checkpoint_every: int = 2_000
    keep: int = 2
    """Newest checkpoints kept, of each stage."""

    def validate(self) -> None:
        """Raises UserError for a value that no run can have."""
        self._at_least_1("accumulate", "log_every", "preview_every", "checkpoint_every", "keep")
        self._within(0, 1, "decay_to")
        self._within(0, 2**53, "warmup", "seed")
        for name, allowed in (("device", ("auto", "cpu", "cuda")), ("precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r}: not known: use one of {', '.join(allowed)}")
        if self.precision == "fp16" and (self.device == "cpu" or not torch.cuda.is_available()):
            raise UserError("precision 'fp16': needs a CUDA device to scale its loss: use bf16 or no")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device 'cuda': there is no CUDA device here: use --device cpu")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema {self.ema}: must lie in [0, 1): use for example 0.999")

    def _at_least_1(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1: raise it")
        self._within(1, 2**53, *names)

    def _within(self, low: float, high: float, *names: str) -> None:
        for name in names:
            if not low <= getattr(self, name) <= high:  # false for NaN
                value = one_line(getattr(self, name), 80)
                raise UserError(f"{name} {value}: must lie between {low:g} and {high:g}: change it")


@dataclass(kw_only=True)
class RunSettings(SharedSettings):
    """Length, batch size and optimizer of a run."""

    images: int = 20_000
    """Training images in total (an image used twice counts twice)."""
    batch_size: int = 16
    """Images in a batch; each process works on one batch at a time."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm."""
    optimizer: str = "adamw"
    """adamw; adamw8bit: both moments in 8 bits, a quarter of the memory (bitsandbytes, extra `8bit`); or muon, for jobs
    that list their matrices (see muon.py)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shard: bool = False
    """Split the trained weights, their gradients and the optimizer's state over the processes (FSDP): less memory on
    each, more communication. Results stay the same; no effect with one process."""

    def validate(self) -> None:
        """Raises UserError for a value that no run can have."""
        super().validate()
        self._at_least_1("images", "batch_size")
        self._within(0, 1_000, "learning_rate", "weight_decay")
        if not self.clip > 0:
            raise UserError(f"clip {self.clip}: must be above 0: 1 is usual, inf clips nothing")
        if self.optimizer not in ("adamw", "adamw8bit", "muon"):
            raise UserError(f"optimizer {self.optimizer!r}: not known: use one of adamw, adamw8bit, muon")
        if self.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
            raise UserError("optimizer adamw8bit: needs bitsandbytes: pip install 'codi[8bit]', or use adamw")
        if self.shard and self.optimizer != "adamw":
            raise UserError(f"shard: does not go with optimizer {self.optimizer}: use adamw, whose state it splits")
        if self.shard and self.precision == "fp16":
            raise UserError("shard: does not go with precision fp16, whose loss scale needs whole gradients: use bf16")


class Job(nn.Module, ABC):
    """A model with its losses and data. `online` holds the trained weights, `average` their moving average (see
    ema.average_copy)."""

    online: nn.Module
    average: nn.Module
    progress: float = 0.0
    """Share of the training that is done, in [0, 1], for schedules that depend on it."""

    @abstractmethod
    def batches(self, start: int, stride: int) -> Iterator[Any]:
        """Yield batches without end, the first from training image number `start` on, each `stride` images after the
        one before it: a pure function of the position."""

    @abstractmethod
    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return named scalar losses, whose sum is minimized. All randomness comes from `generator`."""

    @abstractmethod
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        """Write images that the averaged weights make below `out`; return figures for the log."""

    def finish(self, out: Path, progress: Progress) -> None:  # noqa: B027 - some jobs write nothing
        """Write the finished model to `out`, atomically. Called after the last image."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer."""
        return [{"params": [p for p in self.online.parameters() if p.requires_grad], "lr": learning_rate}]


def learning_rate_factor(settings: RunSettings, images: int) -> float:
    """Return the share of the peak learning rate at training image `images`: linear warm-up, then a cosine."""
    rise = min(1.0, (images + settings.batch_size) / max(settings.warmup, 1))
    fall = 0.5 + 0.5 * math.cos(math.pi * min(images / settings.images, 1.0))
    return rise * (settings.decay_to + (1 - settings.decay_to) * fall)


def step_generator(seed: int, update: int, part: int) -> torch.Generator:
    """Return the random generator of batch `part` of an update. Its seed depends on the position only, so a resumed run
    and any number of processes draw the same numbers as one uninterrupted process."""
    key = np.random.SeedSequence([seed, update, part, 0]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key >> 1))


class Stop:
    """Context manager that turns SIGINT and SIGTERM into the flag `requested`, so that a run ends after the current
    update, with a checkpoint. A second signal raises KeyboardInterrupt."""

    def __enter__(self) -> Stop:
        self.requested = False
        self.handlers: dict[int, Any] = {}  # the previous ones
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def make_accelerator(settings: RunSettings) -> Accelerator:
    """Return an Accelerator for the device and precision of the settings; connect the processes if a launcher started
    several. Raises UserError if their number does not divide `accumulate`."""
    # accelerate keeps the first run's device and precision for the whole process; a second run may need others.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    count = PartialState(cpu=on_cpu).num_processes
    with processes.sharing_errors():  # else the first could end while the others have not connected yet
        if settings.accumulate % count:
            raise UserError(
                f"accumulate {settings.accumulate}: cannot be shared by {count} processes: set it to a multiple of "
                f"{count}"
            )
    # A batch without guidance gives the parameters of the guidance input no gradient.
    parallel = DistributedDataParallelKwargs(
        find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate // count,
        kwargs_handlers=[parallel],
    )


def make_optimizer(settings: RunSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, for these parameter groups."""
    if settings.optimizer == "muon":
        return Muon(groups, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as kind  # type: ignore[no-redef] # an extra
    return kind(groups, betas=(0.9, 0.99), weight_decay=settings.weight_decay)


def _not_finite(losses: dict[str, Tensor], progress: Progress, root: Path) -> str:
    checkpoints = checkpoint.complete(root)
    where = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint had been written yet"
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    return (
        f"loss at image {progress.images}: not finite ({values}); {where}: "
        "lower learning_rate or use precision bf16 or no, and run the same command again"
    )


def train(
    job: Job,
    settings: RunSettings,
    out: Path,
    recipe: dict[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
    deadline: float | None = None,
) -> Progress:
    """Train `job` until `settings.images`, from the newest checkpoint below `out/checkpoints` if there is one.

    `deadline`: time.monotonic() after which the run stops with a checkpoint, as it does on SIGTERM or Ctrl-C.
    Several processes divide the batches of each update; an error, signal or deadline of one ends all of them.
    Raises UserError when a loss is not finite; the last checkpoint is older and stays.
    """
    settings.validate()
    accelerator = accelerator or make_accelerator(settings)
    rank, count = accelerator.process_index, accelerator.num_processes
    job.to(accelerator.device)
    sharded = Sharded(job, job.online, accelerator.device) if settings.shard and count > 1 else None
    groups = job.groups(settings.learning_rate)
    optimizer: Any = make_optimizer(settings, groups)
    peaks = [g["lr"] for g in optimizer.param_groups]
    root, progress = out / checkpoint.CHECKPOINTS, Progress()
    with processes.sharing_errors():
        if accelerator.is_main_process:
            checkpoint.clean(out)
    with processes.sharing_errors():
        if checkpoints := checkpoint.complete(root):
            progress, state = checkpoint.load(checkpoints[-1], job.online, job.average, optimizer)
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
        elif checkpoint.trainable(job.online) == {}:
            raise UserError("this run has nothing to train: let the backbone or the adapter train")
    # FSDP averages the gradients itself: a sharded job needs accelerate's autocast, but not its DDP wrapper.
    prepared = accelerator.prepare_model(job, device_placement=False, evaluation_mode=sharded is not None)
    optimizer = accelerator.prepare_optimizer(optimizer)
    events = Events(out, settings.images, progress, quiet) if accelerator.is_main_process else None
    per_update = settings.batch_size * settings.accumulate
    totals: dict[str, float] = {}
    updates = 0  # that `totals` sums over
    # Process r of n computes the batches r, r + n, r + 2n, ... of each update.
    batches = job.batches(progress.images + rank * settings.batch_size, count * settings.batch_size)

    def save() -> None:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        stored = recipe or asdict(settings)
        with processes.sharing_errors():
            checkpoint.save(root, progress, job.online, job.average, optimizer.optimizer, stored, scaler, settings.keep)

    def is_due(every: int) -> bool:
        return progress.images // every != (progress.images - per_update) // every

    try:
        with Stop() as stop:
            while progress.images < settings.images:
                if processes.any_true(stop.requested or bool(deadline and time.monotonic() > deadline)):
                    break
                began = time.monotonic()
                factor = learning_rate_factor(settings, progress.images)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor

                job.progress = progress.images / settings.images

                # ---- one update ----
                for part in range(rank, settings.accumulate, count):
                    generator = step_generator(settings.seed, progress.updates, part)
                    with processes.sharing_errors():
                        batch = next(batches)
                    with accelerator.accumulate(prepared):
                        with processes.local_errors():
                            losses = prepared(batch, generator)
                        loss = torch.stack(list(losses.values())).sum()
                        with processes.sharing_errors():
                            if not torch.isfinite(loss):
                                raise UserError(_not_finite(losses, progress, root))
                        accelerator.backward(sharded.add_zero_gradients(loss) if sharded else loss)
                        if accelerator.sync_gradients:
                            if sharded:
                                sharded.drop_zero_gradients()
                            trained: Any = checkpoint.trainable(job.online).values()
                            norm: Any = full_tensor(accelerator.clip_grad_norm_(trained, settings.clip))  # type: ignore[arg-type]
                            if math.isfinite(float(norm)):
                                totals["gradient_norm"] = totals.get("gradient_norm", 0.0) + float(norm) / count
                            elif accelerator.scaler is None:  # a loss scaler skips such updates and lowers its scale
                                raise UserError(_not_finite({**losses, "gradient norm": norm}, progress, root))
                        optimizer.step()
                        optimizer.zero_grad()
                    for name, value in losses.items():
                        totals[name] = totals.get(name, 0.0) + value.item() / settings.accumulate
                ema.update(job.average, job.online, ema.warmed_decay(settings.ema, progress.updates))
                # --------------------

                progress.updates += 1
                progress.images += per_update
                progress.seconds += time.monotonic() - began
                updates += 1
                if is_due(settings.log_every):
                    values = {k: v / updates for k, v in processes.total(totals).items()}
                    if events:
                        events.scalars(progress, {**values, "learning_rate": peaks[0] * factor})
                    totals, updates = {}, 0
                if is_due(settings.checkpoint_every):
                    save()
                if is_due(settings.preview_every):
                    with processes.sharing_errors():
                        if events and (figures := job.preview(out, progress)):
                            events.scalars(progress, figures)
            save()
        with processes.sharing_errors():
            if accelerator.is_main_process and progress.images >= settings.images:
                job.finish(out, progress)
    finally:
        close = getattr(batches, "close", None)
        if close:
            close()
        if events:
            events.close()
    return progress
