r"""Noise schedules and the change of variables between noise, signal and velocity. Pure tensor functions.

Variance-preserving path (Stable Diffusion 1, 2, XL):

    z_t = alpha_t x + sigma_t eps,            alpha_t^2 + sigma_t^2 = 1
    v   = alpha_t eps - sigma_t x             (velocity)
    x   = alpha_t z_t - sigma_t v,            eps = alpha_t v + sigma_t z_t

Linear path (flow matching): z_t = (1 - s) x + s eps with s = sigma_t, and the network predicts u = eps - x. An affine
map without singularity relates the two paths: with m = alpha + sigma, s = sigma / m, z_lin = z / m, u = m v +
(sigma - alpha) z. So an objective written for (z_lin, s, u) works for both.

Time `t` runs from 0 (clean: alpha = 1, sigma = 0) to `horizon` (noise). A latent diffusion checkpoint has T discrete
noise levels; level k of the checkpoint (0-based) is t = k + 1 here, so that t = 0 is exactly clean and `s = t - dt` may
reach it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
SIGMA_DATA = 0.5


def to_signal_noise(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Convert a network's output to (x, eps). All tensors broadcast against each other.

    `prediction`, what the network predicts, is one of PREDICTIONS. "epsilon" needs alpha > 0. Where sigma = 0 all give
    x = z / alpha; there a "sample" network does not determine the noise, and eps is 0.
    """
    if prediction == "v_prediction":
        return alpha * z - sigma * output, alpha * output + sigma * z
    if prediction == "epsilon":
        return (z - sigma * output) / alpha, output
    if prediction == "sample":
        x = torch.where(sigma > 0, output, z)
        return x, torch.where(sigma > 0, (z - alpha * x) / sigma.clamp_min(1e-12), torch.zeros_like(z))
    if prediction == "flow_prediction":
        # On the linear path m = 1; elsewhere the output is still u = eps - x.
        m = alpha + sigma
        return (z - sigma * output) / m, (z + alpha * output) / m
    raise UserError(f"prediction type {prediction!r}: not known: use one of {', '.join(PREDICTIONS)}")


def from_signal_noise(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Return the output of a network of this `prediction` type for (x, eps): the inverse of `to_signal_noise`."""
    if prediction == "v_prediction":
        return alpha * eps - sigma * x
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x
    if prediction == "flow_prediction":
        return eps - x
    raise UserError(f"prediction type {prediction!r}: not known: use one of {', '.join(PREDICTIONS)}")


def to_linear(z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Map a point z = alpha x + sigma eps of any path to (z_lin, s) on the linear path, z_lin = (1 - s) x + s eps."""
    m = alpha + sigma
    return z / m, sigma / m


def from_linear(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Map a point z_lin of the linear path at s = sigma / (alpha + sigma) to alpha x + sigma eps."""
    return (alpha + sigma) * z


def flow_from_velocity(v: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Convert v = alpha eps - sigma x at z on a variance-preserving path to u = eps - x = m v + (sigma - alpha) z."""
    return (alpha + sigma) * v + (sigma - alpha) * z


def velocity_from_flow(u: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Convert u at z to v: the inverse of `flow_from_velocity`."""
    return (u - (sigma - alpha) * z) / (alpha + sigma)


class Schedule(ABC):
    """A noise schedule together with the network's prediction type.

    Subclasses define `horizon`, `_alpha_sigma` and `timestep`; everything else is derived. Times are tensors of shape
    (B,) or (1,); results broadcast against (B, C, H, W).
    """

    horizon: float
    least: float  # the smallest time above 0 used in training
    whole: bool = False  # times are integers, the numbers of discrete noise levels
    prediction: str

    @abstractmethod
    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return the timestep passed to the network at time `t`."""

    def to(self, device: torch.device) -> Self:
        """Return this schedule for times on `device`, so that a sampler's steps need no copy between devices."""
        return self

    def unstretched(self) -> Self:
        """Return the schedule that adapters use: without changes that a scheduler makes for one number of steps."""
        return self

    def draw(self, count: int, dt: float, shared: bool, generator: torch.Generator | None) -> Tensor:
        """Draw times uniformly on [dt, horizon]: (count,), or (1,) if `shared` by the whole batch."""
        u = torch.rand(1 if shared else count, generator=generator, dtype=torch.float64)
        return dt + u * (self.horizon - dt)

    def between(self, earlier: Tensor, later: Tensor, share: Tensor) -> Tensor:
        """Interpolate times (B,) from `earlier` (at `share` 0) to `later` (at 1)."""
        return earlier + share * (later - earlier)

    def at(self, share: Tensor) -> Tensor:
        """Return the time that is a fraction `share`, in [0, 1], of the horizon."""
        return share.double() * self.horizon

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), shaped to broadcast against `like`, in its dtype and on its device."""
        alpha, sigma = self._alpha_sigma(t)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.to(like).reshape(shape), sigma.to(like).reshape(shape)

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t = alpha_t x + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t, x)
        return alpha * x + sigma * eps

    def signal_noise(self, output: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the network's `output` at (z_t, t) to (x, eps)."""
        return to_signal_noise(output, z, *self.alpha_sigma(t, z), self.prediction)

    def boundary_scaling(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Apply CoDi's boundary scaling x <- c_skip z_t + c_out x, with c_skip = sd^2 / (u^2 + sd^2),
        c_out = sd u / sqrt(u^2 + sd^2), sd = 0.5. Return (x, eps) with eps = (z_t - alpha_t x) / sigma_t; where
        sigma_t = 0 the signal is z_t and eps is 0.

        The paper does not give the unit of its t; here u = t / T, in [0, 1]. In the authors' release u is 10 times the
        level and c_out = u / sqrt(u^2 + sd^2), as in LCM: nearly the identity at all levels but the first
        (c_skip = 0.0025 at the second), so their code in effect does not scale.
        """
        u = (t.double() / self.horizon).to(z).reshape(-1, *[1] * (z.ndim - 1))
        skip = SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2)
        out = SIGMA_DATA * u / (u**2 + SIGMA_DATA**2).sqrt()
        return to_signal_noise(skip * z + out * x, z, *self.alpha_sigma(t, z), "sample")

    def output(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the network output for (x, eps) at t: the regression target of diffusion training."""
        return from_signal_noise(x, eps, *self.alpha_sigma(t, x), self.prediction)


class DiscreteSchedule(Schedule):
    """The T discrete noise levels of a checkpoint. `t` is an integer tensor in 0..T; the network's input is t - 1."""

    least = 1
    whole = True

    def __init__(self, alphas_cumprod: Tensor, prediction: str) -> None:
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction type {prediction!r}: not known: use one of {', '.join(PREDICTIONS)}")
        signal = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        if prediction == "epsilon" and signal[-1] <= 0:
            raise UserError(
                "scheduler: the last noise level has no signal left, so an 'epsilon' network cannot predict the "
                "picture there: use a v_prediction checkpoint or turn rescale_betas_zero_snr off"
            )
        self.alphas, self.sigmas = signal.sqrt(), (1 - signal).clamp_min(0).sqrt()
        self.horizon = len(signal) - 1
        self.prediction = prediction

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiscreteSchedule:
        """Build a schedule from a diffusers scheduler config: its betas (with any zero-terminal-SNR rescaling) and
        prediction type."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config["prediction_type"])

    def to(self, device: torch.device) -> Self:
        moved = copy.copy(self)
        moved.alphas, moved.sigmas = self.alphas.to(device), self.sigmas.to(device)
        return moved

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.long().to(self.alphas.device)
        return self.alphas[index], self.sigmas[index]

    def draw(self, count: int, dt: float, shared: bool, generator: torch.Generator | None) -> Tensor:
        """Draw integer times uniformly from {dt, ..., T}."""
        u = torch.rand(1 if shared else count, generator=generator, dtype=torch.float64)
        levels = int(self.horizon) - int(dt) + 1
        return int(dt) + (u * levels).long().clamp_max(levels - 1)

    def between(self, earlier: Tensor, later: Tensor, share: Tensor) -> Tensor:
        """Interpolate times and round them to the nearest level."""
        return super().between(earlier, later, share).round().long()

    def at(self, share: Tensor) -> Tensor:
        """Return the level nearest to a fraction `share` of the horizon."""
        return super().at(share).round().long()

    def timestep(self, t: Tensor) -> Tensor:
        """Return the checkpoint's own level number, t - 1."""
        return (t - 1).clamp_min(0)


class FlowSchedule(Schedule):
    """The linear path of flow matching: alpha = 1 - s, sigma = s, with the network predicting u = eps - x.

    `t` in [0, 1000] is continuous. s = shift u / (1 + (shift - 1) u) with u = t / 1000 (Esser et al., 2024), so that
    evenly spaced `t` are the steps of a stock sampler and times drawn uniformly are noisier for a larger `shift`.
    `terminal`: if given, 1 - s is stretched so that a grid of `steps` ends at s = terminal before 0, as
    diffusers' `shift_terminal` does. The network's timestep is 1000 s; each family converts it.
    """

    horizon = 1000.0
    least = 1.0
    prediction = "flow_prediction"

    def __init__(self, shift: float = 1.0, terminal: float | None = None, steps: int | None = None) -> None:
        if not 0 < shift < math.inf:
            raise UserError(f"scheduler: shift {shift}: must be a number above 0: fix scheduler_config.json")
        self.shift, self.stretch = shift, 1.0
        if terminal and steps:
            last = float(self._shifted(torch.tensor(1 / steps, dtype=torch.float64)))
            self.stretch = (1 - terminal) / (1 - last) if last < 1 else 1.0

    def unstretched(self) -> Self:
        """Return this schedule without `terminal`, with which the last of 4 steps would start almost without noise."""
        plain = copy.copy(self)
        plain.stretch = 1.0
        return plain

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = t.double() / self.horizon
        alpha = torch.where(u > 0, self.stretch * (1 - self._shifted(u)), torch.ones_like(u))
        return alpha, 1 - alpha

    def timestep(self, t: Tensor) -> Tensor:
        """Return 1000 s, float64."""
        return self.horizon * self._alpha_sigma(t)[1]


class CosineSchedule(Schedule):
    """Continuous time with alpha = cos t, sigma = sin t on [0, pi / 2], for closed-form tests and toy examples."""

    horizon = math.pi / 2
    least = horizon / 1000

    def __init__(self, prediction: str = "v_prediction") -> None:
        self.prediction = prediction

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t.cos(), t.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """Return `t` unchanged."""
        return t
