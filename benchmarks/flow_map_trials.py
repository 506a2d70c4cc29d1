r"""Variants of `flow-map`, one change each, in the exact world of pictures at equal network passes.

    python benchmarks/flow_map_trials.py --out benchmarks/results/flow-map-trials.json     about 4 minutes a seed

Everything else is as in arena.py. What is kept of these is in codi.objectives.flow_map.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arena import BATCH, RATE, WORLDS, Net, distances, train
from command import command_line
from torch import Tensor

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.objectives import OBJECTIVES
from codi.objectives.batch import LatentBatch, Network
from codi.objectives.finetune import finetune
from codi.objectives.flow_map import flow_map
from codi.schedule import CosineSchedule, Schedule
from codi.training.muon import Muon, muon_groups

Losses = dict[str, Tensor]
COST = OBJECTIVES["flow-map"].cost({}, 0, 0)  # network passes of an image


class LogitNormal(CosineSchedule):
    """Times whose logit is normal (Esser et al. 2024): more at the middle, fewer at both ends."""

    def draw(self, count: int, dt: float, shared: bool, generator: torch.Generator | None) -> Tensor:
        share = torch.randn(count, generator=generator, dtype=torch.float64).sigmoid()
        return (share * self.horizon).clamp_min(dt)


def logit_normal(student: Network, target: Network, batch: LatentBatch, _: Schedule, generator: Any) -> Losses:
    """Return the losses at logit-normal times."""
    return flow_map(student, target, batch, LogitNormal(), generator)


def rescaled(student: Network, target: Network, batch: LatentBatch, schedule: Schedule, generator: Any) -> Losses:
    """Return the losses with that of rows r < t as large as that of rows r = t."""
    losses = flow_map(student, target, batch, schedule, generator, weight=1, weight_end=1)
    if "consistency" in losses:
        ratio = losses["signal"] / losses["consistency"].clamp_min(1e-12)
        losses["consistency"] = ratio.detach() * losses["consistency"]
    return losses


def online(student: Network, target: Network, batch: LatentBatch, schedule: Schedule, generator: Any) -> Losses:
    """Return the losses with targets of the trained network itself, without gradient, not of its average."""
    return flow_map(student, student, batch, schedule, generator)


def long_warmup(student: Network, target: Network, batch: LatentBatch, schedule: Schedule, generator: Any) -> Losses:
    """Return the losses of half a training of fine-tuning, then half of flow maps."""
    return flow_map(student, target, batch, schedule, generator, warmup=0.5)


def few_noisiest(student: Network, target: Network, batch: LatentBatch, schedule: Schedule, generator: Any) -> Losses:
    """Return the losses without extra rows at t = T."""
    return flow_map(student, target, batch, schedule, generator, noisiest=0.0)


def muon(net: Net, rate: float) -> torch.optim.Optimizer:
    """Return Muon at `rate` times the learning rate of the others."""
    return Muon(muon_groups(net, rate * RATE))


VARIANTS: dict[str, tuple[Callable[..., Losses], dict[str, Any]]] = {
    "flow-map": (flow_map, {}),
    "loss of rows r < t rescaled": (rescaled, {}),
    "logit-normal t": (logit_normal, {}),
    "Muon": (flow_map, {"optimizer": partial(muon, rate=1)}),
    "Muon, rate x 4": (flow_map, {"optimizer": partial(muon, rate=4)}),
    "average of the last 5 %": (flow_map, {"averaged": 20}),
    "average of the last 25 %": (flow_map, {"averaged": 4}),
    "targets of the online network": (online, {}),
    "half of the training r = t": (long_warmup, {}),
    "no extra rows at t = T": (few_noisiest, {}),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/flow-map-trials.json"))
    parser.add_argument("--passes", type=int, default=6000, help="of one batch of 256")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    there = {(row["variant"], row["seed"]) for row in rows}
    world = WORLDS["pictures"]
    torch.manual_seed(0)
    backbone = train(Net(world), world, finetune, 2000, 0, blind=True)
    for seed in range(args.seeds):
        for name, (objective, options) in VARIANTS.items():
            if (name, seed) in there:
                continue
            net = train(backbone, world, objective, int(args.passes / COST), seed, **options)
            found = distances(net, world, "map")
            print(name, seed, " / ".join(f"{d:.4f}" for d in found.values()), flush=True)
            key = {"variant": name, "seed": seed, "passes": args.passes * BATCH}
            rows += [{**key, "steps": n, "distance": d} for n, d in found.items()]
            write_json({"rows": rows, "command": command_line(), "machine": describe_machine()}, args.out)


if __name__ == "__main__":
    main()
