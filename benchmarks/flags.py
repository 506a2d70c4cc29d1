"""Time each way to run the same adapter against the plain pipeline: seconds per image, in turns.

    python benchmarks/flags.py --threads 1 --repeats 9 --out benchmarks/results/flags-cpu.json

`plain`: as `CoDiPipeline.from_pretrained` returns it, with torch's scaled_dot_product_attention. Each other way is one
change of it: `fused`, low-rank updates merged into the weights, as the commands do; `channels-last`, `bfloat16`,
`tiny-decoder`, `compiled`; `plain-attention`, diffusers' classic attention as separate matrix products. A round runs
all of them once in random order; the first `--warm` rounds are not measured. Ratios are medians of per-round ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from command import command_line
from diffusers.models.attention_processor import Attention, AttnProcessor

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.sampling.pipeline import CoDiPipeline

WAYS = ("plain", "fused", "channels-last", "bfloat16", "tiny-decoder", "plain-attention", "compiled")


def pipeline(way: str, model: str, adapter: str, device: str) -> CoDiPipeline:
    """Return a pipeline set up for one of WAYS."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    decoder = "tiny" if way == "tiny-decoder" else "full"
    pipe = CoDiPipeline.from_pretrained(model, task="upscale", adapter=adapter, dtype=dtype, decoder=decoder)
    pipe.to(device, memory_format=torch.channels_last if way == "channels-last" else None)
    if way == "fused":
        pipe.fuse_lora()
    elif way == "plain-attention":
        for module in pipe.student.modules():  # the adapter's blocks too
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    elif way == "compiled":
        pipe.compile()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--adapter", default="upscale")
    parser.add_argument("--size", type=int, default=256, help="output pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm", type=int, default=2, help="unmeasured rounds before those")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipes = {way: pipeline(way, args.model, args.adapter, args.device) for way in args.ways}
    side = args.size // pipes["plain"].task.scale  # type: ignore[union-attr]
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {way: [] for way in pipes}
    for number in range(args.warm + args.repeats):
        for way in random.Random(number).sample(list(pipes), len(pipes)):
            started = time.perf_counter()
            pipes[way](
                image=picture, steps=args.steps, tile=0, output_type="pt"
            )  # output on the CPU: waits for the GPU
            if number >= args.warm:
                seconds[way].append(time.perf_counter() - started)
    settings: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in ("out", "ways")}
    plain_seconds = seconds["plain"]
    ratios = {w: statistics.median(s / p for s, p in zip(seconds[w], plain_seconds, strict=True)) for w in pipes}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result = {
        "command": command_line(),
        **settings,
        "seconds": medians,
        "ratios": ratios,
        "machine": describe_machine(),
    }
    write_json(result, args.out)
    print(ratios)


if __name__ == "__main__":
    main()
