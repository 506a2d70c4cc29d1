r"""The method in two dimensions: every objective, two minutes on a CPU, one figure. Read it from top to bottom.

    python examples/toy.py --out toy.png

The data: eight blobs on a ring. A "backbone" has learned to sample all eight from noise. Now a condition c selects four
of them, and the model must follow it in as few steps as possible: image-conditioned few-step sampling, small enough to
plot everything.

Noise z_t = alpha_t x + sigma_t eps with alpha = cos t, sigma = sin t, t from 0 (clean) to pi / 2 (noise). The network
predicts the velocity v = alpha eps - sigma x, which implies the signal x_hat = alpha z - sigma v.

Why few steps are hard. Trained with the data term |x - x_hat|^2 the best x_hat is the conditional MEAN E[x | z_t, c]:
at t = pi / 2, where z carries no information, that is the center of all allowed blobs, where there are no data, and a
one-step sampler returns exactly that point. A few-step sampler needs x_hat to be a SAMPLE: the end of the path through
z_t. One output cannot be both: that is the conflict in CoDi's loss, data term plus consistency. A flow map resolves it:
the network also gets the time r to step to, and predicts the mean for r = t, the point on the path for r < t.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from codi.models.guidance import jump_between
from codi.objectives.batch import LatentBatch
from codi.objectives.codi import codi
from codi.objectives.consistency import consistency
from codi.objectives.decoupled import decoupled
from codi.objectives.finetune import finetune
from codi.objectives.flow_map import flow_map
from codi.objectives.guided import guided
from codi.schedule import CosineSchedule

SCHEDULE = CosineSchedule()
MODES, SPREAD = 8, 0.08
STEPS = (1, 2, 4, 8, 50)


# ---- data: x is in one of eight blobs; condition 0 allows the four on the right, 1 the four on the left


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return samples x (count, 2) and their conditions c (count,)."""
    mode = torch.randint(MODES, (count,), generator=generator)
    angle = (mode + 0.5) * 2 * math.pi / MODES - math.pi / 2
    x = torch.stack([angle.cos(), angle.sin()], 1) + SPREAD * torch.randn(count, 2, generator=generator)
    return x * math.sqrt(2), (mode >= MODES // 2).long()


@dataclass
class Conditioning:
    """The network's inputs besides z and t: the condition `c` (-1: none) and the target time `jump`."""

    c: Tensor
    jump: Tensor | None = None


class Net(nn.Module):
    """A velocity network. Condition and target time enter through zero-initialized layers: the adapted model starts
    exactly as the backbone."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.input, self.time = nn.Linear(2, width), nn.Linear(16, width)
        self.condition, self.jump = nn.Embedding(2, width), nn.Linear(2, width, bias=False)
        self.hidden = nn.Sequential(*[m for _ in range(3) for m in (nn.SiLU(), nn.Linear(width, width))], nn.SiLU())
        self.output = nn.Linear(width, 2)
        for layer in (self.condition, self.jump):
            nn.init.zeros_(layer.weight)

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        u = t.to(z).expand(len(z))[:, None] * torch.arange(1, 9)
        h = self.input(z) + self.time(torch.cat([u.sin(), u.cos()], 1))
        h = h + self.condition(conditioning.c.clamp_min(0)) * (conditioning.c >= 0)[:, None]
        h = h if conditioning.jump is None else h + self.jump(conditioning.jump.to(z))
        return self.output(self.hidden(h))


# ---- training: one loop for every objective


def train(net: Net, objective: Callable[..., dict[str, Tensor]], updates: int, conditioned: bool = True) -> Net:
    """Return a trained copy of `net`: the moving average of its weights, which is also the objectives' target
    network."""
    online = copy.deepcopy(net).requires_grad_(True)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(online.parameters(), 1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for update in range(updates):
        x, c = draw(256, generator)
        batch = LatentBatch(x, Conditioning(c if conditioned else torch.full_like(c, -1)), progress=update / updates)
        loss = torch.stack(list(objective(online, average, batch, SCHEDULE, generator).values())).sum()
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.998, (1 + update) / (10 + update))
        with torch.no_grad():
            for a, b in zip(average.parameters(), online.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
    return average


# ---- sampling


@torch.no_grad()
def ddim(net: Net, c: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Sample along the network's own ODE: z_s = alpha_s x_hat + sigma_s eps_hat."""
    z = torch.randn(len(c), 2, generator=generator)
    grid = torch.linspace(SCHEDULE.horizon, 0, steps + 1)
    for t, s in zip(grid, grid[1:], strict=False):
        x, eps = SCHEDULE.signal_noise(net(z, t[None], Conditioning(c)), z, t[None])
        z = SCHEDULE.mix(x, eps, s[None])
    return z


@torch.no_grad()
def flow_map_sampling(net: Net, c: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Sample by a flow map: as `ddim`, but the network also gets the time of the next point."""
    z = torch.randn(len(c), 2, generator=generator)
    grid = torch.linspace(SCHEDULE.horizon, 0, steps + 1)
    for t, s in zip(grid, grid[1:], strict=False):
        x, eps = SCHEDULE.signal_noise(net(z, t[None], Conditioning(c, target(t, s, len(c)))), z, t[None])
        z = SCHEDULE.mix(x, eps, s[None])
    return z


def target(t: Tensor, s: Tensor, count: int) -> Tensor:
    """Return the target-time input of a network for steps from t to s, (count, 2)."""
    return jump_between(t[None], s[None], SCHEDULE.horizon).expand(count, 2)


@torch.no_grad()
def jump(net: Net, c: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Predict the end of the path, go part of the way back with fresh noise, and repeat (multistep consistency
    sampling)."""
    z = torch.randn(len(c), 2, generator=generator)
    grid = torch.linspace(SCHEDULE.horizon, 0, steps + 1)
    for t, s in zip(grid, grid[1:], strict=False):
        x, _ = SCHEDULE.signal_noise(net(z, t[None], Conditioning(c, target(t, 0 * t, len(c)))), z, t[None])
        z = SCHEDULE.mix(x, torch.randn(z.shape, generator=generator), s[None])
    return z


@torch.no_grad()
def consistency_sampling(net: Net, c: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Multistep consistency sampling of a network without a target time, which always predicts the end."""
    return jump(WithoutTargetTime(net), c, steps, generator)  # type: ignore[arg-type]


class WithoutTargetTime(nn.Module):
    """A wrapper that hides the target time from a network."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.net(z, t, replace(conditioning, jump=None))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'|: 0 for equal distributions (Szekely & Rizzo 2013)."""

    def within(u: Tensor) -> Tensor:
        return torch.cdist(u, u).sum() / (len(u) * (len(u) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


# ---- the methods


def methods(updates: int) -> dict[str, tuple[Net, Callable[..., Tensor]]]:
    """Return {name: (trained network, its sampler)}, all from one backbone with the same number of updates."""
    torch.manual_seed(0)
    backbone = train(Net(), finetune, updates, conditioned=False)
    half = updates // 2
    tuned = train(backbone, finetune, updates)
    early = train(backbone, finetune, half)  # two stages share the updates of one
    dt = SCHEDULE.horizon / 100

    def halved(net: Net) -> Net:
        for steps in (16, 8, 4, 2, 1):
            net = train(net, lambda *a, n=net, s=steps: guided(*a, teacher=n, steps=s), half // 5)
        return net

    return {
        "fine-tuned (DDIM)": (tuned, ddim),
        "GD-II": (halved(early), ddim),
        "CM-II": (
            train(early, lambda *a: consistency(*a, teacher=early, dt=10 * dt, dt_end=dt / 5), half),
            consistency_sampling,
        ),
        "CoDi (paper)": (train(backbone, lambda *a: codi(*a, dt=dt, shared_t=True), updates), ddim),
        "CoDi, signal space": (
            train(backbone, lambda *a: codi(*a, dt=dt, consistency="signal", signal_weight=0.1), updates),
            ddim,
        ),
        "decoupled": (
            train(backbone, lambda *a: decoupled(*a, dt=10 * dt, dt_end=dt / 5), updates),
            jump,
        ),
        "flow map": (train(backbone, flow_map, updates), flow_map_sampling),
    }


# ---- fixed points: where each consistency loss is zero, for data with a closed-form denoiser


def fixed_points(dt: float = 1e-4) -> list[tuple[str, list[float]]]:
    r"""Return the consistency error of two candidates for x_hat, for one-dimensional data N(m, s^2):

        straight coupling   x = m + s eps, so that z = alpha x + sigma (x - m) / s:
                            x = m + s (z - alpha m) / (alpha s + sigma)
        end of the ODE      (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2) never changes along the flow:
                            x = m + s (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2)

    Each takes the student's place, and the consistency error is measured after one small step, where z_s is made by the
    student's own step or by the true denoiser's, in noise or in signal space. An error of 0 is a fixed point of the
    loss:

        own ODE: along z = alpha (m + s eps) + sigma eps with eps held fixed, the straight coupling's prediction is
        constant in either space; so CoDi's loss favors straight noise-to-data lines, not the data's ODE.
        denoiser's ODE, signal: the flow's end is constant along the flow by definition: a consistency model.
        denoiser's ODE, noise: neither. eps = (z - alpha x) / sigma varies along a curved path even where x does not.
    """
    m, s = 0.7, 0.5
    nodes = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoiser(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return m + a * s**2 * (z - a * m) / (a**2 * s**2 + b**2)

    def straight(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return m + s * (z - a * m) / (a * s + b)

    def flow(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return m + s * (z - a * m) / (a**2 * s**2 + b**2).sqrt()

    def network(x_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(z: Tensor, t: Tensor, _: object) -> Tensor:
            a, b = SCHEDULE.alpha_sigma(t, z)
            x = x_of(z, a, b)
            return SCHEDULE.output(x, (z - a * x) / b, t)

        return forward

    table = []
    for name, function in (("straight coupling", straight), ("end of the ODE", flow)):
        row = []
        for ode in ("own", "teacher"):
            for space in ("noise", "signal"):
                losses = codi(
                    network(function), network(function), LatentBatch(m + s * nodes, None), SCHEDULE,
                    torch.Generator().manual_seed(1), teacher=network(denoiser), ode=ode, consistency=space,
                    dt=dt, signal_weight=0, t=torch.ones(1, dtype=torch.float64),
                )  # fmt: skip
                row.append(float(losses["consistency"]) / dt**2)
        table.append((name, row))
    return table


# ---- report


def picture(samples: dict[str, dict[int, Tensor]], truth: Tensor, out: Path) -> None:
    """Plot samples of each method at 1, 2 and 4 steps over true data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step_counts = STEPS[:3]
    figure, axes = plt.subplots(
        len(samples), len(step_counts), figsize=(2.2 * len(step_counts), 2.2 * len(samples)), layout="constrained"
    )
    for row, (name, by_steps) in zip(axes, samples.items(), strict=True):
        for axis, steps in zip(row, step_counts, strict=True):
            axis.plot(*truth[:800].T, ".", color="0.85", markersize=2)
            axis.plot(*by_steps[steps][:800].T, ".", color="tab:blue", markersize=2)
            axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{steps} step{'s' * (steps > 1)}", fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train, measure and plot all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    parser.add_argument("--updates", type=int, default=3000)
    args = parser.parse_args()
    started = time.monotonic()

    print("consistency error / dt^2 at t = 1     own, noise  own, signal  denoiser's, noise  denoiser's, signal")
    for name, row in fixed_points():
        print(f"  {name:34}" + "".join(f"{value:{w}.3f}" for value, w in zip(row, (12, 13, 19, 20), strict=True)))

    truth, c = draw(4000, torch.Generator().manual_seed(1))
    is_condition_0 = c == 0
    print("\nenergy distance to held-out data, condition 0, by steps")
    print(f"  {'':20}" + "".join(f"{steps:9}" for steps in STEPS))
    samples: dict[str, dict[int, Tensor]] = {}
    for name, (net, sampler) in methods(args.updates).items():
        samples[name] = {n: sampler(net, torch.zeros(2000).long(), n, torch.Generator().manual_seed(3)) for n in STEPS}
        print(
            f"  {name:20}"
            + "".join(f"{energy_distance(s, truth[is_condition_0]):9.4f}" for s in samples[name].values())
        )
    picture(samples, truth[is_condition_0], args.out)
    print(f"\n{args.out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
