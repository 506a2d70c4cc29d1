r"""Few-step sampling, as plain functions.

A sampler goes through a decreasing grid of times t_0 = T > t_1 > ... > t_n = 0. At each t the student predicts signal
and noise (x, eps), from which the next latent is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.student import Conditioning, Student, cat_conditionings
from ..schedule import Schedule

# Called after each step with (step index, t, current latent, predicted x); may return a latent to continue from.
StepCallback = Callable[[int, int, Tensor, Tensor], Tensor | None]

SAMPLERS = ("ddim", "map", "renoise")


class StepControl(Protocol):
    """Settings that may change between steps, as callbacks of diffusers change attributes of the pipeline."""

    def interrupted(self) -> bool:
        """Return whether to stop and return the current latent."""
        ...

    def guidance_scale(self, timestep: int) -> float:
        """Return the scale for the step at this time."""
        ...


def time_grid(horizon: float, steps: int, shift: float = 1.0, whole: bool | None = None) -> Tensor:
    """Return `steps` + 1 times from `horizon` to 0 ("trailing": the first is always the noisiest).

    u = s v / (s v + 1 - v) of evenly spaced v: a `shift` s above 1 puts more steps at high noise (Esser et al., 2024),
    1 spaces them evenly. `whole`: times are integers, the checkpoint's noise levels; by default if `horizon` is an
    integer. They decrease strictly as long as there are enough levels.
    """
    v = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    grid = float(horizon) * (shift * v / (shift * v + (1 - v)))  # at v = 1 exactly the horizon
    if not (float(horizon).is_integer() if whole is None else whole):
        return grid
    # Rounding could make neighbours equal in a dense grid: bound each time so that those before and after it fit.
    least = torch.arange(steps, -1, -1)
    most = int(horizon) - torch.arange(steps + 1)
    return torch.minimum(torch.maximum(grid.round().long(), least), most) if steps <= horizon else grid.round().long()


def initial_noise(shape: Sequence[int], seeds: Sequence[int], fields: int = 1) -> Tensor:
    """Return N(0, I) of (len(seeds), fields C, h, w) for `shape` (C, h, w); a seed's noise never depends on the batch.

    Samplers that need fresh noise at every step use several `fields`; the first does not depend on their number.
    """
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    return torch.stack([torch.cat([torch.randn(tuple(shape), generator=g) for _ in range(fields)]) for g in generators])


def guided(
    student: Student,
    z: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Return the network's output with classifier-free guidance, for most families
    out_uncond + g (out_cond - out_uncond).

    g = 1, or no `unconditional`, costs one forward pass; otherwise both run as one batch.
    """
    if guidance_scale == 1.0 or unconditional is None:
        return student(z, timestep, conditioning, strength)
    timestep = timestep.expand(z.shape[0]).repeat(2)
    both = student(torch.cat([z, z]), timestep, cat_conditionings(unconditional, conditioning), strength)
    without, with_ = both.chunk(2)
    kind = getattr(student, "kind", None)  # None for toy networks and closed forms
    return kind.guide(with_, without, guidance_scale) if kind else without + guidance_scale * (with_ - without)


def predict(
    student: Student,
    schedule: Schedule,
    z: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    strength: float = 1.0,
    boundary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (x, eps) at z_t from the `guided` output."""
    timestep = schedule.timestep(t).to(z.device)
    output = guided(student, z, timestep, conditioning, guidance_scale, unconditional, strength)
    prediction = schedule.signal_noise(output, z, t)
    return schedule.boundary_scaling(prediction[0], z, t) if boundary else prediction


def sampler_of(info: Mapping[str, Any]) -> str:
    """Return the sampler, one of SAMPLERS, that an adapter with this info was trained for."""
    legacy = "renoise" if info.get("jumps") else "ddim"  # files without the key "sampler"
    return info.get("sampler") or legacy


def with_target_time(conditioning: Any, sampler: str, t: float, s: float, horizon: float) -> Any:
    """Return the conditioning (or None) with the target time of a sampling step from `t` to `s`.

    `jump` is the step's length as fractions of `t` and of `horizon`, (B, 2); "renoise" always jumps to 0.
    """
    if conditioning is None or sampler == "ddim":
        return conditioning
    length = t - s if sampler == "map" else t
    parts = [conditioning.text.new_full((conditioning.text.shape[0],), u, dtype=torch.float32)
             for u in (length / t, length / horizon)]  # fmt: skip
    return replace(conditioning, jump=torch.stack(parts, dim=1))


@torch.no_grad()
def sample(
    student: Student,
    schedule: Schedule,
    noise: Tensor,
    conditioning: Conditioning,
    steps: int = 4,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    strength: float = 1.0,
    callback: StepCallback | None = None,
    grid: Tensor | None = None,
    sampler: str = "ddim",
    boundary: bool = False,
    control: StepControl | None = None,
) -> Tensor:
    """Return the last x, (B, C, h, w) in the noise's dtype, after `steps` predictions (x, eps) at times t_i, each
    followed by z_t_i+1 = alpha x + sigma e.

    `sampler`, one of SAMPLERS: "ddim" (Song et al., ICLR 2021, eta = 0), e = eps of the instantaneous prediction;
    "map", for flow maps (objectives.flow_map), the same with the network given t_i+1 as its target time; "renoise",
    multistep consistency sampling (Song et al., ICML 2023), for networks that predict the end of the ODE, where e is
    fresh noise. `noise` (B, C, h, w) ~ N(0, I), for "renoise" (B, steps C, h, w), a field per step; the condition's
    features are computed once. `grid`: `steps` + 1 times, by default those of `time_grid`. `boundary`: for adapters
    trained with CoDi's boundary scaling. `control` may stop before a step or change its guidance scale.
    """
    renoise = sampler == "renoise"
    conditioning = student.prepare(conditioning)
    if unconditional is not None:
        # Prepare both: the condition's features attend to the text, which differs.
        unconditional = student.prepare(unconditional) if guidance_scale != 1.0 else None
    grid = time_grid(schedule.horizon, steps, whole=schedule.whole) if grid is None else grid
    times, horizon = grid.tolist(), float(schedule.horizon)
    if noise.is_cuda:
        schedule, grid = schedule.to(noise.device), grid.to(noise.device)
    fields = noise.chunk(steps, dim=1) if renoise else [noise]
    z = x = fields[0]
    for i in range(steps):
        if control is not None:
            if control.interrupted():
                break
            guidance_scale = control.guidance_scale(int(times[i]))
        t, s = grid[i : i + 1], grid[i + 1 : i + 2]
        positive, negative = (
            with_target_time(c, sampler, times[i], times[i + 1], horizon) for c in (conditioning, unconditional)
        )
        x, eps = predict(student, schedule, z, t, positive, guidance_scale, negative, strength, boundary)
        z = schedule.mix(x, fields[i + 1] if renoise and i + 1 < steps else eps, s)
        if callback is not None:
            replaced = callback(i, int(times[i]), z, x)
            z = z if replaced is None else replaced
    return z
