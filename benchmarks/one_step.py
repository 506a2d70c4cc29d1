"""Writes docs/one-step.md and docs/arena.png, why one step is hard: python benchmarks/one_step.py

Closed forms of a Gaussian world, by the library's own objectives, and the results of arena.py.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from readme import RESULTS, ROOT, table
from torch import Tensor

from codi.models.guidance import jump_between
from codi.objectives.batch import LatentBatch, mean_square
from codi.objectives.codi import codi
from codi.objectives.finetune import finetune
from codi.objectives.flow_map import two_steps, velocity
from codi.schedule import CosineSchedule

MEAN, DEVIATION = 0.7, 0.5
SCHEDULE = CosineSchedule()
TIME, STEP = 1.0, 1e-3  # where errors are measured; of the consistency terms
STEPS = (1, 2, 4, 8, 32)
PAGE = (Path(__file__).parent / "one_step.md").read_text()
Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z, t, r) -> x, of which with eps z_r = alpha_r x + sigma_r eps


@dataclass
class Inputs:
    """What networks look at besides z and t."""

    jump: Tensor


def spread(a: Tensor, b: Tensor) -> Tensor:
    """Return the standard deviation of z where alpha = a and sigma = b."""
    return (a**2 * DEVIATION**2 + b**2).sqrt()


def denoiser(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return E[x | z_t]."""
    a, b = SCHEDULE.alpha_sigma(t, z)
    return MEAN + a * DEVIATION**2 * (z - a * MEAN) / spread(a, b) ** 2


def straight(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return x where noise and data are joined by straight lines, x = m + d eps."""
    a, b = SCHEDULE.alpha_sigma(t, z)
    return MEAN + DEVIATION * (z - a * MEAN) / (a * DEVIATION + b)


def ode_end(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return where the probability-flow ODE through z_t ends."""
    a, b = SCHEDULE.alpha_sigma(t, z)
    return MEAN + DEVIATION * (z - a * MEAN) / spread(a, b)


def ode_map(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return the x with which a step to r ends on the probability-flow ODE; E[x | z_t] at r = t."""
    (a, b), (c, e) = SCHEDULE.alpha_sigma(t, z), SCHEDULE.alpha_sigma(r, z)
    end = c * MEAN + spread(c, e) / spread(a, b) * (z - a * MEAN)
    way = torch.where(r == t, torch.ones_like(t), (t - r).sin()).reshape(-1, *[1] * (z.ndim - 1))
    here = (r == t).reshape(way.shape)
    return torch.where(here, denoiser(z, t, r), (b * end - e * z) / way)


SHOWN = ("finetune", "codi", "codi-release", "decoupled", "GD-II", "CM-II", "tuning on data", "flow-map")
FUNCTIONS: dict[str, tuple[Function, str]] = {
    "conditional mean E[x given z]": (denoiser, "ddim"),
    "straight coupling": (straight, "ddim"),
    "end of the ODE": (ode_end, "renoise"),
    "flow map": (ode_map, "map"),
}


def network(function: Function) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """Return the network that stands for a function, perfectly trained."""

    def forward(z: Tensor, t: Tensor, inputs: Inputs | None) -> Tensor:
        share = torch.zeros(1, dtype=torch.float64) if inputs is None else inputs.jump[:, 0].double()
        a, b = SCHEDULE.alpha_sigma(t, z)
        x = function(z, t, t * (1 - share))
        return SCHEDULE.output(x, (z - a * x) / b.clamp_min(1e-12), t)

    return forward


def errors(function: Function, count: int = 400_000) -> list[float]:
    """Return how far a function is from being a fixed point at t = 1: of the data term (above its minimum), of
    consistency in noise and in signal with steps of its own and of the true ODE, all by dt^2, and of the semigroup to
    r = 0 and r = t / 2."""
    generator = torch.Generator().manual_seed(0)
    x = MEAN + DEVIATION * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    batch, t = LatentBatch(x, None), torch.full((1,), TIME, dtype=torch.float64)
    net, best = network(function), network(denoiser)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    found = [float(sum(finetune(net, net, batch, SCHEDULE, seeded(), t=t).values())
                   - sum(finetune(best, best, batch, SCHEDULE, seeded(), t=t).values()))]  # fmt: skip
    for ode in ("own", "teacher"):
        for consistency in ("noise", "signal"):
            options: Any = {"dt": STEP, "ode": ode, "teacher": best, "consistency": consistency, "signal_weight": 0.0}
            loss = codi(net, net, batch, SCHEDULE, seeded(), t=t, **options)["consistency"]
            found.append(float(loss) / STEP**2)
    z = SCHEDULE.mix(x, torch.randn(x.shape, generator=generator, dtype=torch.float64), t)
    for r in (0 * t, t / 2):
        goal = two_steps(net, z, (t, (t + r) / 2, r), Inputs(torch.zeros(1, 2)), SCHEDULE)
        inputs = Inputs(jump_between(t, r, SCHEDULE.horizon))
        found.append(float(mean_square(velocity(net, z, t, inputs, SCHEDULE), goal)))
    return found


def deviation(function: Function, sampler: str, steps: int) -> float:
    """Return the standard deviation of samples in `steps` steps, exactly: every step is affine in z."""
    grid = torch.linspace(SCHEDULE.horizon, 0, steps + 1, dtype=torch.float64)
    variance = 1.0
    for t, s in zip(grid[:, None], grid[1:, None], strict=False):
        z = torch.tensor([0.0, 1.0], dtype=torch.float64)
        x = function(z, t, s if sampler == "map" else t)
        a, b = SCHEDULE.alpha_sigma(t, z)
        c, e = SCHEDULE.alpha_sigma(s, z)
        noise = (z - a * x) / b
        slope = c * (x[1] - x[0]) + (0 if sampler == "renoise" else e * (noise[1] - noise[0]))
        variance = float(slope**2 * variance + (e**2 if sampler == "renoise" else 0))
    return math.sqrt(variance)


def closed_forms() -> tuple[list[str], list[str]]:
    """Return both tables of the Gaussian world."""
    names = ["data term", "own ODE, noise", "own ODE, signal", "true ODE, noise", "true ODE, signal",
             "semigroup, r = 0", "semigroup, r = t / 2"]  # fmt: skip
    rows = [[name, *(_number(v) for v in errors(function))] for name, (function, _) in FUNCTIONS.items()]
    first = table(["a network that predicts", *names], rows)
    rows = [[f"{name}, by {sampler}", *(f"{deviation(function, sampler, n):.3f}" for n in STEPS)]
            for name, (function, sampler) in FUNCTIONS.items()]  # fmt: skip
    return first, table(["standard deviation in steps", *map(str, STEPS)], rows)


def _number(value: float) -> str:
    return "**0**" if abs(value) < 1e-6 else f"{value:.3f}"


Key = tuple[str, int, str, int]  # world, passes, method, steps


def by_method(rows: list[dict[str, Any]]) -> dict[Key, list[float]]:
    """Return the distances of all seeds."""
    found: dict[Key, list[float]] = {}
    for row in rows:
        found.setdefault((row["world"], row["passes"], row["method"], row["steps"]), []).append(row["distance"])
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of the 95 % confidence interval by Student's t; 0 for one value."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return mean, 0.0
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[n]
    return mean, quantile * statistics.stdev(values) / math.sqrt(n)


def arena_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each world and budget."""
    found, lines = by_method(rows), []
    for world, passes in dict.fromkeys((row["world"], row["passes"]) for row in rows):
        mine = [row for row in rows if (row["world"], row["passes"]) == (world, passes)]
        floors = [row["floor"] for row in mine]
        body = []
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = [interval(found[world, passes, method, n]) for n in STEPS]
            count = len(found[world, passes, method, 1])
            body.append([method, str(count), *(f"{m:.4f} ± {h:.4f}" if count > 1 else f"{m:.4f}" for m, h in cells)])
        lines += [f"\n`{world}`, {passes:,} passes a training; floor {statistics.median(floors):.4f}:\n"]
        lines += table(["objective", "seeds", *(f"{n} steps" if n > 1 else "1 step" for n in STEPS)], body)
    return lines


def picture_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return FD by task, form and objective over steps; means over the seeds."""
    found: dict[tuple[str, str, str, int], dict[int, list[float]]] = {}
    for row in rows:
        key = row["task"], row["form"], row["method"].removesuffix("-36k"), row["images"]
        found.setdefault(key, {}).setdefault(row["steps"], []).append(row["fd"])
    counts = sorted({row["steps"] for row in rows})
    body = []
    for (task, form, method, images), steps in sorted(found.items(), key=lambda item: (item[0][3], item[0][:2])):
        cells = [f"{statistics.fmean(steps[n]):.1f}" if n in steps else "-" for n in counts]
        body.append([f"{task}, {form}: {method}", f"{images:,}", str(len(steps[1])), *cells])
    names = [f"{n} steps" if n > 1 else "1 step" for n in counts]
    return table(["task, form: objective", "images", "seeds", *names], body)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the figure: distance over steps, a panel for each world and budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = by_method(rows)
    panels = list(dict.fromkeys((row["world"], row["passes"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False)
    for axis, (world, passes) in zip(axes[0], panels, strict=True):
        for method in SHOWN:
            means = [interval(found[world, passes, method, n])[0] for n in STEPS if (world, passes, method, n) in found]
            if means:
                axis.plot(STEPS, [max(m, 3e-4) for m in means], marker="o", label=method)
        axis.set(xscale="log", yscale="log", xticks=STEPS, xlabel="steps", title=f"{world}, {passes / 1e6:.1f}M passes")
        axis.set_xticklabels([str(n) for n in STEPS])
    axes[0][0].set_ylabel("energy distance to the data")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    """Write the page and its figure."""
    rows = json.loads((RESULTS / "arena.json").read_text())["rows"]
    first, second = closed_forms()
    pictures = picture_table(json.loads((RESULTS / "flow-maps.json").read_text())["rows"])
    parts = {"losses": first, "deviations": second, "arena": arena_tables(rows), "pictures": pictures}
    page = PAGE.format(**{name: "\n".join(lines) for name, lines in parts.items()})
    (ROOT / "docs" / "one-step.md").write_text(page)
    draw(rows, ROOT / "docs" / "arena.png")


if __name__ == "__main__":
    main()
