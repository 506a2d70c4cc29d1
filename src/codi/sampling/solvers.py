"""What diffusers' schedulers decide: the times of a plain checkpoint, and solvers, the paper's baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..models.student import Conditioning, Student

SOLVERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    name: lambda config, name=name: DPMSolverMultistepScheduler.from_config(
        dict(config), algorithm_type=name, final_sigmas_type="sigma_min" if name == "dpmsolver" else "zero"
    )
    for name in ("dpmsolver", "dpmsolver++")
}


def own_grid(scheduler: Any, steps: int) -> Tensor:
    """The times at which a checkpoint's scheduler looks, as its configuration spaces them, then where it ends:
    `steps` + 1 of them. Not the evenly spaced ones of adapters, which are trained from the noisiest level on. The end
    is 0, or without `set_alpha_to_one`, as Stable Diffusion 1.5 has it, the least noise that the checkpoint knows."""
    scheduler.set_timesteps(steps)
    end = torch.tensor([0 if scheduler.config.get("set_alpha_to_one", True) else 1])
    return torch.cat([scheduler.timesteps.cpu() + 1, end])


@torch.no_grad()
def solve(student: Student, scheduler: Any, noise: Tensor, conditioning: Conditioning, steps: int) -> Tensor:
    """From noise (B, C, h, w) ~ N(0, I) to the latent, by a diffusers scheduler of the checkpoint's noise levels."""
    conditioning = student.prepare(conditioning)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = student(scheduler.scale_model_input(z, t), t[None], conditioning)
        z = scheduler.step(output, t, z, return_dict=False)[0]
    return z
