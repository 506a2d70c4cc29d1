"""Sampling by diffusers' solvers, the paper's baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..models.student import Conditioning, Student
from .sampler import StepCallback, guided

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
) -> Tensor:
    """From noise (B, C, h, w) ~ N(0, I) to the latent, by a diffusers scheduler of the checkpoint's noise levels; the
    further arguments as of `sampler.sample`. A callback is given the solver's own last estimate in place of x."""
    conditioning = student.prepare(conditioning)
    unconditional = None if unconditional is None else student.prepare(unconditional)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(z, t)
        output = guided(student, given, t[None], conditioning, guidance_scale, unconditional, strength)
        z = scheduler.step(output, t, z, return_dict=False)[0]
        if callback is not None:
            replaced = callback(i, int(t), z, scheduler.model_outputs[-1])
            z = z if replaced is None else replaced
    return z
