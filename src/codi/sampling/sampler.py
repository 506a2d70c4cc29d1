r"""Few-step sampling, as plain functions.

A sampler walks a decreasing grid of times t_0 = T > t_1 > ... > t_n = 0. At each t the student gives a signal and a
noise prediction (x, eps); the next point is made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.student import Conditioning, Student, cat_conditionings
from ..schedule import Schedule

# Called after each step with (step index, t, current latent, predicted x); may return a latent to go on from.
StepCallback = Callable[[int, int, Tensor, Tensor], Tensor | None]

SAMPLERS = ("ddim", "map", "renoise")


class StepControl(Protocol):
    """What may change between two steps, as a callback of diffusers changes attributes of its pipeline."""

    def interrupted(self) -> bool:
        """Whether to stop and return the latent as it is."""
        ...

    def guidance_scale(self, timestep: int) -> float:
        """Return the scale for the step at this time."""
        ...


def time_grid(horizon: float, steps: int, shift: float = 1.0, whole: bool | None = None) -> Tensor:
    """`steps` + 1 times from `horizon` to 0 ("trailing": the first is always the noisiest).

    u = s v / (s v + 1 - v) of evenly spaced v: a `shift` s above 1 spends more of the steps on noise (Esser et al.,
    2024), 1 spaces them evenly. `whole`: times are whole numbers, a checkpoint's levels; by default for a whole
    `horizon`. They fall strictly as long as there are enough levels.
    """
    v = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    grid = float(horizon) * (shift * v / (shift * v + (1 - v)))  # at v = 1 exactly the horizon
    if not (float(horizon).is_integer() if whole is None else whole):
        return grid
    # Rounding may make two neighbours equal where the grid is dense: each time leaves room for those below and above.
    least = torch.arange(steps, -1, -1)
    most = int(horizon) - torch.arange(steps + 1)
    return torch.minimum(torch.maximum(grid.round().long(), least), most) if steps <= horizon else grid.round().long()


def initial_noise(shape: Sequence[int], seeds: Sequence[int], fields: int = 1) -> Tensor:
    """N(0, I) of `shape` (C, h, w) a seed, (len(seeds), fields C, h, w): a picture never depends on its batch.

    Samplers that want fresh noise at every step take more `fields`, one after the other; the first is always the same.
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
    """The network's output with classifier-free guidance, out_uncond + g (out_cond - out_uncond) for most families.

    g = 1, or no `unconditional`, costs one forward pass; otherwise both run as one batch.
    """
    if guidance_scale == 1.0 or unconditional is None:
        return student(z, timestep, conditioning, strength)
    timestep = timestep.expand(z.shape[0]).repeat(2)
    both = student(torch.cat([z, z]), timestep, cat_conditionings(unconditional, conditioning), strength)
    without, with_ = both.chunk(2)
    kind = getattr(student, "kind", None)  # networks of toys and closed forms have none
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
    """(x, eps) at z_t, of the `guided` output."""
    timestep = schedule.timestep(t).to(z.device)
    output = guided(student, z, timestep, conditioning, guidance_scale, unconditional, strength)
    prediction = schedule.signal_noise(output, z, t)
    return schedule.boundary_scaling(prediction[0], z, t) if boundary else prediction


def sampler_of(info: Mapping[str, Any]) -> str:
    """Return which of SAMPLERS an adapter with this info was trained for."""
    old = "renoise" if info.get("jumps") else "ddim"  # files from before there was "map"
    return info.get("sampler") or old


def aimed(conditioning: Any, sampler: str, t: float, s: float, horizon: float) -> Any:
    """Return the conditioning (or None) with the target time of a step from `t` to `s` of the walk down from
    `horizon`."""
    if conditioning is None or sampler == "ddim":
        return conditioning
    way = t - s if sampler == "map" else t
    parts = [conditioning.text.new_full((conditioning.text.shape[0],), u, dtype=torch.float32)
             for u in (way / t, way / horizon)]  # fmt: skip
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
    """Return the last x, (B, C, h, w) in noise's dtype, of `steps` predictions (x, eps) at times t_i, each followed by
    z_t_i+1 = alpha x + sigma e.

    `sampler`, one of SAMPLERS: "ddim" (Song et al., ICLR 2021, eta = 0), e = eps of the instantaneous prediction;
    "map", for flow maps (objectives.flow_map), the same with the network given t_i+1 as its target time; "renoise",
    multistep consistency sampling (Song et al., ICML 2023), for networks that predict the end of the ODE, where e is
    fresh noise. `noise` (B, C, h, w) ~ N(0, I), for "renoise" (B, steps C, h, w), a field a step; the condition's
    features are computed once. `grid`: `steps` + 1 times, by default those of `time_grid`. `boundary`: for adapters
    trained with CoDi's boundary scaling. `control` decides before each step whether it is made, and its guidance.
    """
    renoise = sampler == "renoise"
    conditioning = student.prepare(conditioning)
    if unconditional is not None:
        # The condition is the same with and without the prompt; its features differ only through the text they attend.
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
        given, blank = (aimed(c, sampler, times[i], times[i + 1], horizon) for c in (conditioning, unconditional))
        x, eps = predict(student, schedule, z, t, given, guidance_scale, blank, strength, boundary)
        z = schedule.mix(x, fields[i + 1] if renoise and i + 1 < steps else eps, s)
        if callback is not None:
            replaced = callback(i, int(times[i]), z, x)
            z = z if replaced is None else replaced
    return z
