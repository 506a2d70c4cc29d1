"""Sampling by diffusers' schedulers: the paper's baselines, and any scheduler that a user sets on the pipeline."""

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
    """Return the latent sampled from noise (B, C, h, w) ~ N(0, I) by a diffusers scheduler.

    `generator`: for schedulers that draw noise at each step; the other arguments are those of `sampler.sample`. The
    callback receives the scheduler's last estimate as x, or the latent if it has none.
    """
    conditioning = student.prepare(conditioning)
    unconditional = None if unconditional is None else student.prepare(unconditional)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma
    step_options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        if control is not None:
            if control.interrupted():
                break
            guidance_scale = control.guidance_scale(int(t))
        scaled = scheduler.scale_model_input(z, t)
        output = guided(student, scaled, t[None], conditioning, guidance_scale, unconditional, strength)
        step = scheduler.step(output, t, z, **step_options)
        z = step.prev_sample
        if callback is not None:
            estimate = getattr(step, "pred_original_sample", None)
            if estimate is None:
                estimate = (getattr(scheduler, "model_outputs", None) or [z])[-1]
            replaced = callback(i, int(t), z, estimate)
            z = z if replaced is None else replaced
    return z


def scheduler_of(pipe: Any, strength: float) -> Any:
    """Return the diffusers scheduler that a CoDiPipeline samples with; None for our own sampler, which also replaces
    the checkpoint's default scheduler. Raises UserError for a `solver` that does not fit the backbone."""
    flow, unmodified = isinstance(pipe.schedule, FlowSchedule), not pipe.infos(strength) and not pipe.shift
    if pipe.solver is not None:
        if flow:
            raise UserError("solver: only supports Stable Diffusion's noise levels: leave it out for flow matching")
        return pipe.solver
    if unmodified and (own := pipe.kind.solver(pipe.scheduler)) is not None:
        return own
    replaced_by_user = type(pipe.scheduler).__name__ not in pipe.kind.samplers
    return pipe.scheduler if replaced_by_user and _why_ignored(pipe, strength, flow) is None else None


def _why_ignored(pipe: Any, strength: float, flow: bool) -> str | None:
    """Return why a scheduler that a user has set has no effect; None if it has one."""
    if flow:
        return "flow-matching models use their own sampler"
    if pipe.shift or any(sampler_of(info) != "ddim" or info.get("boundary") for info in pipe.infos(strength)):
        return "the adapter or shift in use has its own sampler"
    return None


def warn_of_scheduler(pipe: Any, strength: float) -> None:
    """Warn if the user has replaced the checkpoint's scheduler without effect."""
    name, kind = type(pipe.scheduler).__name__, pipe.kind
    why = _why_ignored(pipe, strength, isinstance(pipe.schedule, FlowSchedule))
    if why and pipe.solver is None and name not in kind.samplers and kind.solver(pipe.scheduler) is None:
        warnings.warn(f"scheduler {name}: has no effect: {why}", stacklevel=5)
