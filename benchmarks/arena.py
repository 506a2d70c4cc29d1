r"""Few-step objectives in two exact worlds, at equal network passes.

    python benchmarks/arena.py --out benchmarks/results/arena.json        about two hours of one core

Worlds: `ring`, eight blobs of which the condition allows four; `pictures`, two gray boxes of 8 x 8 pixels whose
condition is their 2 x 2 average: upscaling four times. Each objective adapts the same unconditional backbone. Reported
is the energy distance between held-out (x, c) and samples with their conditions, at 1 to 32 steps, beside the floor:
that of two sets of true samples. A pass is one image through the network once, backward two more; an update of
fine-tuning costs 3 an image. Rows that are there already are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import central, tuning
from command import command_line
from torch import Tensor, nn

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models.guidance import TargetTimeEmbedding, jump_between
from codi.objectives import OBJECTIVES
from codi.objectives.batch import LatentBatch
from codi.objectives.codi import codi
from codi.objectives.consistency import consistency
from codi.objectives.decoupled import decoupled
from codi.objectives.finetune import finetune
from codi.objectives.flow_map import flow_map
from codi.objectives.guided import guided
from codi.schedule import CosineSchedule

SCHEDULE = CosineSchedule()
LEVEL = SCHEDULE.horizon / 1000
STEPS = (1, 2, 4, 8, 32)
BATCH, HELD_OUT, RATE = 256, 8000, 1e-3


def ring(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points (count, 2) of eight blobs and which half of the ring is meant, one-hot (count, 2)."""
    mode = torch.randint(8, (count,), generator=generator)
    angle = (mode + 0.5) * 2 * math.pi / 8 - math.pi / 2
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * torch.randn(count, 2, generator=generator)
    half = (mode >= 4).float()[:, None]
    return x * math.sqrt(2), torch.cat([half, 1 - half], 1)


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normalized pictures (count, 64) of two boxes, and their 2 x 2 averages (count, 4)."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    made = torch.rand(count, 1, 1, generator=generator).expand(count, 8, 8) * 0.3
    for _ in range(2):
        u = torch.rand(5, count, 1, 1, generator=generator)
        top, left = (u[0] * 6).floor(), (u[1] * 6).floor()
        bottom, right = top + 2 + (u[2] * 3).floor(), left + 2 + (u[3] * 3).floor()
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        made = torch.where(inside, 0.4 + 0.6 * u[4], made)
    made = (made - 0.37) / 0.27 + 0.02 * torch.randn(made.shape, generator=generator)
    return made.flatten(1), nn.functional.avg_pool2d(made[:, None], 4).flatten(1)


@dataclass(frozen=True)
class World:
    """`draw(count, generator)` gives (x, c) of `size` and `conditions` numbers; networks are `width` x `depth`."""

    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    size: int
    conditions: int
    width: int
    depth: int


WORLDS = {"ring": World(ring, 2, 2, 128, 3), "pictures": World(pictures, 64, 4, 256, 4)}


@dataclass
class Inputs:
    """What a network gets besides z and t: the condition and the target time (codi.models.guidance.jump_between)."""

    c: Tensor
    jump: Tensor | None = None


class Net(nn.Module):
    """Residual perceptron whose blocks are modulated by time, condition and target time; the last two start at zero."""

    def __init__(self, world: World) -> None:
        super().__init__()
        width = world.width
        self.enter, self.time = nn.Linear(world.size, width), nn.Linear(16, width)
        self.condition, self.jump = nn.Linear(world.conditions, width, bias=False), TargetTimeEmbedding(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(world.depth)
        )
        self.modulations = nn.ModuleList(nn.Linear(width, width) for _ in range(world.depth))
        self.leave = nn.Linear(width, world.size)
        nn.init.zeros_(self.condition.weight)

    def forward(self, z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        angles = t.to(z).expand(len(z))[:, None] * torch.arange(1, 9)
        features = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.condition(inputs.c)
        if inputs.jump is not None:
            features = features + self.jump(inputs.jump)
        h = self.enter(z) + features
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            h = h + block(h + modulation(nn.functional.silu(features)))
        return self.leave(nn.functional.silu(h))


def adam(net: Net) -> torch.optim.Optimizer:
    """Return the optimizer of all comparisons."""
    return torch.optim.AdamW(net.parameters(), RATE, weight_decay=0, betas=(0.9, 0.99))


def train(
    net: Net,
    world: World,
    objective: Callable[..., Any],
    updates: int,
    seed: int,
    blind: bool = False,
    optimizer: Callable[[Net], torch.optim.Optimizer] = adam,
    averaged: float = 9,
) -> Net:
    """Return the average network of `updates` updates from `net`, over about the last 1 / `averaged` of them; `blind`:
    without the condition. The objective gets an average over the last ninth."""
    online, average = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net).requires_grad_(False)
    result = copy.deepcopy(average)
    stepper = optimizer(online)
    peaks = [group["lr"] for group in stepper.param_groups]
    generator = torch.Generator().manual_seed(1000 + seed)
    for k in range(updates):
        x, c = world.draw(BATCH, generator)
        batch = LatentBatch(x, Inputs(0 * c if blind else c), progress=k / updates)
        loss = torch.stack(list(objective(online, average, batch, SCHEDULE, generator).values())).sum()
        rate = min(1, (k + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * k / updates))
        for group, peak in zip(stepper.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        stepper.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        stepper.step()
        with torch.no_grad():
            for net, length in ((average, 9), (result, averaged)):
                share = 1 - min(0.998, (1 + k) / (1 + length + k))
                torch._foreach_lerp_(list(net.parameters()), list(online.parameters()), share)
    return result


@torch.no_grad()
def sample(net: Net, c: Tensor, size: int, steps: int, how: str) -> Tensor:
    """Return samples (len(c), size) by `how`: "ddim"; "map", steps with a target time; "jump", to the end and back
    with fresh noise; "consistency", the same for a network without a target time."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(len(c), size, generator=generator)
    grid = torch.linspace(SCHEDULE.horizon, 0, steps + 1)
    for t, s in zip(grid, grid[1:], strict=False):
        end = {"map": s, "jump": 0 * t}.get(how, t)
        inputs = Inputs(c, jump_between(t[None], end[None], SCHEDULE.horizon).expand(len(c), 2))
        x, eps = SCHEDULE.signal_noise(net(z, t[None], inputs), z, t[None])
        noise = eps if how in ("ddim", "map") else torch.randn(z.shape, generator=generator)
        z = SCHEDULE.mix(x, noise, s[None])
    return z


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'|: 0 for equal distributions (Szekely & Rizzo 2013)."""

    def within(u: Tensor) -> Tensor:
        return torch.cdist(u, u).sum() / (len(u) * (len(u) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def floor(world: World) -> float:
    """Return the distance of two independent sets of true samples."""
    generator = torch.Generator().manual_seed(78)
    return energy_distance(*(torch.cat(world.draw(HELD_OUT, generator), 1) for _ in range(2)))


def distances(net: Net, world: World, how: str) -> dict[int, float]:
    """Return {steps: energy distance to held-out data}."""
    generator = torch.Generator().manual_seed(77)
    _, c = world.draw(HELD_OUT, generator)
    truth = torch.cat(world.draw(HELD_OUT, generator), 1)
    return {n: energy_distance(torch.cat([sample(net, c, world.size, n, how), c], 1), truth) for n in STEPS}


Trained = tuple[Net, str]  # a network and how it is sampled
Method = Callable[[Net, World, int, int], Trained]  # (backbone, world, passes an image of a batch, seed)


def one_stage(objective: Callable[..., Any], cost: float, how: str = "ddim") -> Method:
    """Return the method that spends all passes on one objective of `cost` passes an image."""
    return lambda backbone, world, passes, seed: (
        train(backbone, world, objective, int(passes / cost), seed), how
    )  # fmt: skip


def release(backbone: Net, world: World, passes: int, seed: int) -> Trained:
    """The algorithm of the authors' code, whose ODE is the frozen backbone's without the condition."""

    def without(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return backbone(z, t, Inputs(0 * inputs.c))

    objective = partial(
        codi, dt=50 * LEVEL, shared_t=False, on_grid=True, consistency="signal", ode="teacher", teacher=without
    )
    return train(backbone, world, objective, int(passes / 5), seed), "ddim"


def two_stage_consistency(backbone: Net, world: World, passes: int, seed: int) -> Trained:
    """CM-II: fine-tuning, then consistency distillation of the result, half of the passes each."""
    early = train(backbone, world, finetune, int(passes / 2 / 3), seed)
    distilled = partial(consistency, teacher=early, dt=250 * LEVEL, dt_end=2.5 * LEVEL)
    return train(early, world, distilled, int(passes / 2 / 5), seed + 50), "consistency"


def two_stage_progressive(backbone: Net, world: World, passes: int, seed: int) -> Trained:
    """GD-II: fine-tuning, then progressive distillation in five phases of equal length."""
    net = train(backbone, world, finetune, int(passes / 2 / 3), seed)
    for steps in (16, 8, 4, 2, 1):
        net = train(net, world, partial(guided, teacher=net, steps=steps), int(passes / 2 / 5 / 5), seed + steps)
    return net, "ddim"


def methods() -> dict[str, Method]:
    """Return the methods by name, with their passes an image and how each is sampled."""
    decoupling: dict[str, Any] = {"dt": 250 * LEVEL, "dt_end": 25 * LEVEL}
    one_step: dict[str, Any] = {"consistency_weight": 5, "consistency_weighting": "signal", "averaged": True}
    return {
        "finetune": one_stage(finetune, 3),
        "codi": one_stage(partial(codi, dt=LEVEL), 4),
        "codi-tuned": one_stage(partial(codi, dt=50 * LEVEL, shared_t=False, signal_weighting="velocity"), 4),
        "codi-release": release,
        "decoupled": one_stage(partial(decoupled, **decoupling), 7, "jump"),
        "decoupled, one-step": one_stage(partial(decoupled, **decoupling, **one_step), 7, "jump"),
        "GD-II": two_stage_progressive,
        "CM-II": two_stage_consistency,
        "tuning on data": one_stage(partial(tuning, dt=250 * LEVEL, dt_end=2.5 * LEVEL), 4, "consistency"),
        "central difference": one_stage(central, 4, "map"),
        "flow-map": one_stage(flow_map, OBJECTIVES["flow-map"].cost({}, 0, 0), "map"),
        "flow-map, re-noised": one_stage(flow_map, OBJECTIVES["flow-map"].cost({}, 0, 0), "jump"),
    }


def main() -> None:
    """Run what is missing of worlds x budgets x seeds x methods, and write rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/arena.json"))
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--passes", nargs="+", type=int, default=[6000, 24000], help="of one batch of 256")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backbone", type=int, default=2000, help="updates of the unconditional backbone")
    parser.add_argument("--only", nargs="+", default=list(methods()), help="methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    there = {(row["world"], row["passes"], row["seed"], row["method"]) for row in rows}
    wanted = [(w, p, s, m) for p in args.passes for w in args.worlds for s in range(args.seeds) for m in args.only]
    backbones: dict[str, Net] = {}
    for name, passes, seed, method in wanted:
        if (name, passes * BATCH, seed, method) in there:
            continue
        world = WORLDS[name]
        if name not in backbones:
            torch.manual_seed(0)
            backbones[name] = train(Net(world), world, finetune, args.backbone, 0, blind=True)
        began = time.process_time()
        found = distances(*_ordered(methods()[method](backbones[name], world, passes, seed), world))
        key = {"world": name, "method": method, "passes": passes * BATCH, "seed": seed}
        rows += [{**key, "steps": n, "distance": d, "floor": floor(world)} for n, d in found.items()]
        print(
            f"{key} {time.process_time() - began:.0f} s  " + " / ".join(f"{d:.4f}" for d in found.values()), flush=True
        )
        write_json({"rows": rows, "command": command_line(), "machine": describe_machine()}, args.out)


def _ordered(trained: Trained, world: World) -> tuple[Net, World, str]:
    return trained[0], world, trained[1]


if __name__ == "__main__":
    main()
