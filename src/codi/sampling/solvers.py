"""Sampling by diffusers' solvers: the paper's baselines, and whatever scheduler a user gives the pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..errors import UserError
from ..models.student import Conditioning, Student
from ..schedule import FlowSchedule
from .sampler import StepCallback, StepControl, guided, sampler_of

SOLVERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    name: lambda config, name=name: DPMSolverMultistepScheduler.from_config(
        dict(config), algorithm_type=name, final_sigmas_type="sigma_min" if name == "dpmsolver" else "zero"
    )
    for name in ("dpmsolver", "dpmsolver++")
}


@torch.no_grad()
def solve(
    student: Student,
    scheduler: Any,
    noise: Tensor,
    conditioning: Conditioning,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    strength: float = 1.0,
    callback: StepCallback | None = None,
    control: StepControl | None = None,
    generator: Any = None,
) -> Tensor:
    """Sample from noise (B, C, h, w) ~ N(0, I) to the latent, by diffusers' scheduler of the checkpoint's levels.

    `generator`: for schedulers that draw noise at each step; the further arguments are those of `sampler.sample`. A
    callback is given the solver's own last estimate in place of x, or the latent where it has none.
    """
    conditioning = student.prepare(conditioning)
    unconditional = None if unconditional is None else student.prepare(unconditional)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        if control is not None:
            if control.interrupted():
                break
            guidance_scale = control.guidance_scale(int(t))
        given = scheduler.scale_model_input(z, t)
        output = guided(student, given, t[None], conditioning, guidance_scale, unconditional, strength)
        step = scheduler.step(output, t, z, **draws)
        z = step.prev_sample
        if callback is not None:
            estimate = getattr(step, "pred_original_sample", None)
            if estimate is None:
                estimate = (getattr(scheduler, "model_outputs", None) or [z])[-1]
            replaced = callback(i, int(t), z, estimate)
            z = z if replaced is None else replaced
    return z


def scheduler_of(pipe: Any, strength: float) -> Any:
    """Return diffusers' scheduler that a CoDiPipeline samples with; None: the sampler here, which does what the
    checkpoint's own does. Raises UserError for a `solver` that the backbone cannot be sampled by."""
    flow, free = isinstance(pipe.schedule, FlowSchedule), not pipe.infos(strength) and not pipe.shift
    if pipe.solver is not None:
        if flow:
            raise UserError("solver: is for Stable Diffusion's noise levels: leave it out for flow matching")
        return pipe.solver
    if free and (own := pipe.kind.solver(pipe.scheduler)) is not None:
        return own
    swapped = type(pipe.scheduler).__name__ not in pipe.kind.samplers
    return pipe.scheduler if swapped and _ignored(pipe, strength, flow) is None else None


def _ignored(pipe: Any, strength: float, flow: bool) -> str | None:
    """Return why a scheduler that a user has set makes no difference; None where it does."""
    if flow:
        return "flow matching has one sampler here, which takes its sigmas"
    if pipe.shift or any(sampler_of(info) != "ddim" or info.get("boundary") for info in pipe.infos(strength)):
        return "what is set has a sampler of its own, which takes its noise levels"
    return None


def warn_of_scheduler(pipe: Any, strength: float) -> None:
    """Warn of a scheduler in the place of the checkpoint's own that makes no difference."""
    name, kind = type(pipe.scheduler).__name__, pipe.kind
    why = _ignored(pipe, strength, isinstance(pipe.schedule, FlowSchedule))
    if why and pipe.solver is None and name not in kind.samplers and kind.solver(pipe.scheduler) is None:
        warnings.warn(f"scheduler {name}: has no effect: {why}", stacklevel=5)
