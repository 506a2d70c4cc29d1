"""Measure time and memory of one optimizer step at full size: CoDi against LCM distillation of diffusers' example.

    python benchmarks/train_step.py --kind sd15 --size 256 --batch 1 --steps 3 --out benchmarks/results/train_step.json

Each contestant runs in its own process, so that peak memory is measured separately; the processes take turns, step by
step, so that varying load affects all equally, unless `--alone` runs one after the other, where memory is short.
Peak memory is the process's largest resident set on a CPU and the allocator's peak on a GPU. Latents and text features
are computed once, so no step encodes. The reference follows diffusers' train_lcm_distill_sd_wds.py: teacher with and
without the prompt, online network forward and backward with all weights trained, target network at the teacher's solver
step, moving average. `pe-codi-guided` distills guidance in every update; with `guidance_share: 0.5`, as in the recipes
for Stable Diffusion, every other update does.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from command import command_line
from fullsize import PROMPTS, build
from torch import Tensor

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models.adapter import FORMS
from codi.models.backbones import Backbone
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.objectives import OBJECTIVES
from codi.objectives.batch import Guidance, LatentBatch
from codi.training import ema

Step = Callable[[Tensor, dict[str, Any], Tensor], None]
DECAY, RATE = 0.95, 1e-6


def make_optimizer(parameters: Any) -> torch.optim.AdamW:
    """Return the optimizer that all contestants use."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=RATE)


def lcm(backbone: Backbone, checkpointing: bool) -> Step:
    """Return the reference's step. As in diffusers, its U-Net gets the guidance scale as an embedding
    (`time_cond_proj_dim` 256)."""
    teacher = backbone.unet
    online: Any = type(teacher).from_config(teacher.config, time_cond_proj_dim=256)
    online.load_state_dict(teacher.state_dict(), strict=False)
    online = online.to(device=teacher.device, dtype=teacher.dtype).train()
    target = copy.deepcopy(online).requires_grad_(False)
    if checkpointing:
        online.enable_gradient_checkpointing()
    optimizer, schedule = make_optimizer(online.parameters()), backbone.schedule
    skip = int(schedule.horizon) // 50

    def step(x: Tensor, text: dict[str, Any], blank: Tensor) -> None:
        start = torch.randint(1, 50, (len(x),)) * skip
        end = start - skip
        z = schedule.mix(x, torch.randn_like(x), start)
        scale = torch.rand(len(x), 1, 1, 1).to(x) * 10 + 5
        scale_embedding = scale[:, 0, 0] * torch.ones(1, 256).to(x)
        level = schedule.timestep(start).to(x.device)
        added = {"added_cond_kwargs": text["added"]}
        output = online(z, level, text["text"], timestep_cond=scale_embedding, **added).sample
        x_t, _ = schedule.signal_noise(output, z, start)
        with torch.no_grad():
            conditional, unconditional = (
                schedule.signal_noise(teacher(z, level, words, **added).sample, z, start)
                for words in (text["text"], blank)
            )
            signal, noise = (a + scale * (a - b) for a, b in zip(conditional, unconditional, strict=True))
            z_s = schedule.mix(signal, noise, end)
            level = schedule.timestep(end).to(x.device)
            x_s, _ = schedule.signal_noise(
                target(z_s, level, text["text"], timestep_cond=scale_embedding, **added).sample, z_s, end
            )
        loss = ((x_t.float() - x_s.float()) ** 2 + 0.001**2).sqrt().mean() - 0.001
        loss.backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(target, online, DECAY)

    return step


def ours(backbone: Backbone, checkpointing: bool, full: bool = False, rank: int = 0, guided: bool = False) -> Step:
    """Return CoDi's step, with a condition; `full` trains the backbone too, `rank` low-rank updates of it; `guided`
    distills text guidance."""
    adapter_class: Any = FORMS["fused"]
    adapter = adapter_class.from_backbone(backbone.unet, backbone.vae, guidance_scales=int(guided)).to(
        backbone.unet.dtype
    )
    unet = add_lora(backbone.unet, rank, "task") if rank else backbone.unet
    student = Student(unet, adapter).train()
    adapter.requires_grad_(True)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name if rank else full)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        adapter.encoder.enable_gradient_checkpointing()
    average = ema.average_copy(student)
    optimizer, schedule = make_optimizer(student.parameters()), backbone.schedule

    def step(x: Tensor, text: dict[str, Any], blank: Tensor) -> None:
        conditioning = Conditioning(text["text"], torch.randn_like(x), added=text["added"])
        guidance = None
        if guided:
            scales = 1 + 7 * torch.rand(len(x), 1).to(x)
            guidance = Guidance(scales, [conditioning, replace(conditioning, text=blank)])
            conditioning = replace(conditioning, guidance=scales)
        losses = OBJECTIVES["codi-tuned"].loss(
            student, average, LatentBatch(x, conditioning, guidance=guidance), schedule
        )
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(average, student, DECAY)

    return step


CONTESTANTS: dict[str, Callable[[Backbone, bool], Step]] = {
    "lcm": lcm,
    "pe-codi": ours,
    "pe-codi-guided": lambda backbone, checkpointing: ours(backbone, checkpointing, guided=True),
    "pe-codi-lora": lambda backbone, checkpointing: ours(backbone, checkpointing, rank=16),
    "codi": lambda backbone, checkpointing: ours(backbone, checkpointing, full=True),
}


def work(name: str, args: argparse.Namespace, pipe: Any) -> None:
    """Run one contestant's process: for each True from `pipe` take a step and send (seconds, peak bytes)."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    backbone = build(args.kind, dtype)
    text, added = embed_prompts(backbone.text, [PROMPTS[0]] * args.batch, (args.size, args.size))
    blank, _ = embed_prompts(backbone.text, [""] * args.batch, (args.size, args.size))
    prompt_features = {
        "text": text.to(args.device),
        "added": added and {k: v.to(args.device) for k, v in added.items()},
    }
    backbone.unet.to(args.device)
    step = CONTESTANTS[name](backbone, args.checkpointing)
    backbone.vae, backbone.text_encoder, backbone.text_encoder_2 = None, None, None  # type: ignore[assignment]
    x = torch.randn(args.batch, 4, args.size // 8, args.size // 8).to(device=args.device, dtype=dtype)
    cuda = args.device == "cuda"
    while pipe.recv():
        started = time.perf_counter()
        step(x, prompt_features, blank.to(args.device))
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sd15")
    parser.add_argument("--contestants", nargs="+", default=["lcm", "pe-codi"], choices=list(CONTESTANTS))
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one warm-up step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--alone", action="store_true", help="one contestant after the other, where memory is short")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    measurements: dict[str, list[tuple[float, int]]] = {name: [] for name in args.contestants}
    for group in [[name] for name in args.contestants] if args.alone else [args.contestants]:
        pipes = {name: context.Pipe() for name in group}
        workers = [context.Process(target=work, args=(name, args, pipes[name][1]), daemon=True) for name in group]
        for name, worker in zip(group, workers, strict=True):
            worker.start()
            pipes[name][
                1
            ].close()  # keep only the worker's copy open, so that recv fails instead of waiting if the worker dies
        for _ in range(args.steps + 1):
            for name in group:
                pipes[name][0].send(True)
                measurements[name].append(pipes[name][0].recv())
        for name in group:
            pipes[name][0].send(False)
        for worker in workers:
            worker.join()
    rows = {
        name: {"seconds": statistics.median(t for t, _ in steps[1:]), "peak_bytes": max(peak for _, peak in steps)}
        for name, steps in measurements.items()
    }
    first = rows[args.contestants[0]]
    for row in rows.values():
        row |= {f"{key}_ratio": row[key] / first[key] for key in ("seconds", "peak_bytes")}
    setting = {
        key: getattr(args, key) for key in ("kind", "size", "batch", "steps", "dtype", "device", "checkpointing")
    }
    write_json({"command": command_line(), **setting, "rows": rows, "machine": describe_machine()}, args.out)
    print(rows, file=sys.stderr)


if __name__ == "__main__":
    main()
