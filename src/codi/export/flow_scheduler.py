"""Stock schedulers for adapters of flow-matching transformers, with the adapter's steps in the configuration.

Programs that serve models pass a number of steps and no sigmas, so scheduler_config.json must define the schedule.
"""

from __future__ import annotations

import math
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ..errors import UserError
from ..schedule import FlowSchedule
from .source import Source

LEVELS = 1000  # num_train_timesteps


def make_flow_scheduler(source: Source, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler with which the stock pipeline, called with `steps` and no sigmas, uses the adapter's times.

    The "renoise" sampler is the scheduler's stochastic sampling. If the pipeline computes a shift from the image size,
    so does codi, and the configuration keeps it; otherwise the shift is that of the backbone's training size.
    """
    schedule = source.schedule(steps)
    assert isinstance(schedule, FlowSchedule)
    config = {"num_train_timesteps": LEVELS, "stochastic_sampling": source.renoises}
    by_size = _shift_by_size(source) if source.kind.passes_sigmas else None
    if by_size is not None:
        return FlowMatchEulerDiscreteScheduler(**config, **by_size)
    last = source.timesteps(steps)[-1] / LEVELS
    shift: float = schedule.shift * source.shift
    terminal: Any = None
    if not source.kind.passes_sigmas:
        shift, terminal = (_shift_for_own_sigmas(shift, steps), last) if steps > 1 else (1.0, None)
    return FlowMatchEulerDiscreteScheduler(**config, shift=shift, shift_terminal=terminal)


def _shift_by_size(source: Source) -> dict[str, Any] | None:
    """Return the settings of dynamic shifting, multiplied by the adapter's own shift; None if it cannot be set so."""
    stored = source.backbone.scheduler.config
    if not stored.get("use_dynamic_shifting"):
        return None
    linear = stored.get("time_shift_type") == "linear"
    settings = {"use_dynamic_shifting": True, "time_shift_type": "linear" if linear else "exponential"}
    # Without `shift_terminal`, which adapters do not use.
    names = ["base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"]
    settings |= {name: stored[name] for name in names if name in stored}
    if source.shift == 1:
        return settings
    if not source.kind.dynamic_by_config:
        return None
    for name, default in (("base_shift", 0.5), ("max_shift", 1.15)):  # shifts multiply, and mu is their logarithm
        mu = stored.get(name, default)
        settings[name] = mu * source.shift if linear else mu + math.log(source.shift)
    return settings


def _shift_for_own_sigmas(shift: float, steps: int) -> float:
    """Return the shift of a scheduler that computes its own sigmas and ends, by `shift_terminal`, at our last sigma.

    It spaces n sigmas evenly from 1 to m = s / (N + s - 1), shifts them by s a second time (diffusers #13243) and
    stretches them. With j = i / (n - 1), 1 - sigma_i is then proportional to j / (1 - (1 - 1/s) (1 - m) j); ours,
    evenly spaced with a single shift S, to j / (1 - (1 - 1/S) (n - 1)/n j). Equal factors of j give a quadratic
    equation in s.
    """
    factor = (1 - 1 / shift) * (steps - 1) / steps
    half = (1 - factor) * (LEVELS - 1) / 2
    root = half**2 - factor * (LEVELS - 1)
    if root < 0:
        raise UserError(f"steps {steps}, shift {shift:g}: no scheduler_config.json can express so many steps so close "
                        "to noise without sigmas: use fewer steps")  # fmt: skip
    return (LEVELS - 1) / (half + math.sqrt(root))
