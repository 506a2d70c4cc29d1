"""Time a batch at full size with random weights: diffusers' ControlNet pipeline and ours, in turns in one process.

    python benchmarks/latency.py --size 256 --repeats 3 --out benchmarks/results/latency-cpu.json
    python benchmarks/latency.py --device cuda --dtype bfloat16 --size 512 --repeats 20 --variants eager compile graph \
        --out latency-cuda.json

`lcm`: StableDiffusionControlNetPipeline with the LCM scheduler, 4 steps, one pass per step. `ddim`: the same with 50
DDIM steps and guidance in two passes. `codi`: ours in 4 steps, with an adapter that reads pixels (`--reads latent`:
latents from the VAE's encoder). `...-loop`: without decoding; prompt and condition are encoded. `codi-tiny`: with a
tiny decoder (AutoencoderTiny of diffusers, TAESD's architecture). `bare`: only the modules of `codi`, without its
pipeline.

Variants, `NAME/VARIANT`, of both pipelines: `channels-last` memory format, `compile`: torch.compile, `graph`: its mode
"reduce-overhead", which on a GPU uses CUDA graphs.

A round runs each contestant once in random order; the first `--warm` rounds are not measured (compiled networks settle
in the second). --out is written after each round, so an interrupted run keeps its rounds; contestants that fail (out of
memory, a compiler's error) are listed in `failed` and skipped. Ratios are medians of per-round ratios, with the
smallest and the largest. `rates`: the machine's best rates in this precision, for a large matrix product and a large
copy; `share`: the arithmetic rate of each contestant as a share of the former.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from command import command_line
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, LCMScheduler, StableDiffusionControlNetPipeline
from fullsize import PROMPTS, build
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.adapter import FORMS
from codi.models.backbones import Backbone
from codi.models.student import Conditioning, Student
from codi.models.text import tokenize
from codi.sampling.adapter_store import LoadedAdapter
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.sampler import initial_noise, time_grid
from codi.tasks import get_task

STEPS = 4
# (faster, slower, required ratio of their times)
GOALS = (
    ("codi-loop", "lcm-loop", 1.22), ("codi", "lcm", 1.12), ("codi-tiny", "lcm", 1.8), ("codi", "ddim", 18),
    ("codi-tiny", "ddim", 30), ("bare", "codi", 1.02),
)  # fmt: skip
COMPILED: dict[str, dict[str, Any]] = {"compile": {}, "graph": {"mode": "reduce-overhead"}}
VARIANTS = ("eager", "channels-last", *COMPILED)
Run = Callable[..., Any]
Seconds = dict[str, list[float]]  # by contestant, one value per round


def theirs(backbone: Backbone, picture: Tensor, variant: str) -> dict[str, Run]:
    """Return runs of diffusers' ControlNet pipeline on the backbone's parts, by name."""
    parts = {key: getattr(backbone, key) for key in ("vae", "unet", "text_encoder", "tokenizer")}
    net = ControlNetModel.from_unet(backbone.unet).to(backbone.unet.device, backbone.unet.dtype).eval()
    networks: Any = (backbone.unet, net, backbone.vae.decoder)
    for network in networks:
        if variant == "channels-last":
            network.to(memory_format=torch.channels_last)
        elif variant in COMPILED:
            network.compile(**COMPILED[variant])
    prompts, size = PROMPTS[:1] * len(picture), picture.shape[-1]
    runs: dict[str, Run] = {}
    for name, scheduler, steps, guidance in (("lcm", LCMScheduler, STEPS, 1.0), ("ddim", DDIMScheduler, 50, 7.5)):
        pipe: Any = StableDiffusionControlNetPipeline(
            **parts, controlnet=net, scheduler=scheduler.from_config(backbone.scheduler.config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)

        def run(output: str = "pt", pipe: Any = pipe, steps: int = steps, guidance: float = guidance) -> Any:
            return pipe(
                prompts, image=picture, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                output_type=output,
            )  # fmt: skip

        runs[name] = run
        runs[f"{name}-loop"] = lambda run=run: run("latent")
    return runs


def ours(backbone: Backbone, picture: Tensor, reads: str, variant: str) -> dict[str, Run]:
    """Return runs of our pipeline with a `fused` adapter, with the VAE's or a tiny decoder, and of its bare modules."""
    adapter_class: Any = FORMS["fused"]
    adapter = adapter_class.from_backbone(backbone.unet, backbone.vae, reads=reads).to(backbone.unet.dtype).eval()
    adapter.requires_grad_(False)
    tiny = AutoencoderTiny().to(backbone.unet.device, backbone.unet.dtype).eval()
    runs: dict[str, Run] = {}
    for name, decoder in (("codi", None), ("codi-tiny", tiny)):
        pipe: Any = CoDiPipeline(**vars(backbone), tiny_vae=decoder)
        pipe.set_progress_bar_config(disable=True)
        pipe._store.loaded["canny"] = LoadedAdapter(adapter, backbone.unet, get_task("canny"), Path(), full=False)
        pipe.set_adapters("canny")
        if variant == "channels-last":
            pipe.to(memory_format=torch.channels_last)
        elif variant in COMPILED:
            pipe.compile(**COMPILED[variant])

        def run(output: str = "pt", pipe: Any = pipe) -> Any:
            prompts = PROMPTS[:1] * len(picture)
            return pipe(image=picture[:, :1], prompt=prompts, steps=STEPS, output_type=output)

        runs[name] = run
    runs["codi-loop"] = lambda: runs["codi"]("latent")
    if variant == "eager":
        runs["bare"] = bare(backbone, adapter, picture)
    return runs


def bare(backbone: Backbone, adapter: Any, picture: Tensor) -> Run:
    """Return a run of the necessary modules only: text encoder, condition once, U-Net and fusion each step, decoder."""
    student, latent_size = Student(backbone.unet, adapter).eval(), picture.shape[-1] // codec.downscale(backbone.vae)
    noise = initial_noise((4, latent_size, latent_size), range(len(picture))).to(picture)
    tokens = tokenize(backbone.tokenizer, PROMPTS[:1] * len(picture)).to(picture.device)
    timesteps = (time_grid(1000, STEPS)[:-1] - 1).to(picture.device)

    @torch.no_grad()
    def run() -> Any:
        text = backbone.text_encoder(tokens)[0]
        prepared = student.prepare(Conditioning(text, adapter.read(picture, backbone.vae)))
        for timestep in timesteps:
            output = student(noise, timestep[None], prepared)
        return codec.decode(backbone.vae, output)

    return run


def seconds_of(run: Run, device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the machine's best rates: arithmetic of a matrix product, and bytes read and written by a copy."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out, large = torch.empty_like(a), torch.empty(2**28, device=device, dtype=torch.uint8)
    copy = torch.empty_like(large)
    product = min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(10))
    copied = min(seconds_of(lambda: copy.copy_(large), device) for _ in range(10))
    return {"flop_per_second": 2 * side**3 / product, "bytes_per_second": 2 * large.numel() / copied}


def flops(runs: dict[str, Run]) -> dict[str, int]:
    """Return the FLOPs of our runs; compiled variants have the same."""
    counts = {}
    for name in ("codi", "codi-loop", "codi-tiny", "bare"):
        if name in runs:
            with FlopCounterMode(display=False) as counter:
                runs[name]()
            counts[name] = counter.get_total_flops()
    return counts


def shares(seconds: Seconds, flop: dict[str, int], rates: dict[str, float]) -> dict[str, float]:
    """Return each contestant's FLOP rate as a share of the machine's best."""
    counted = {name: flop[base] for name in seconds if (base := name.split("/")[0]) in flop}
    return {name: n / rates["flop_per_second"] / statistics.median(seconds[name]) for name, n in counted.items()}


def contest(runs: dict[str, Run], device: str, warm: int, repeats: int) -> Iterator[tuple[Seconds, dict[str, str]]]:
    """Yield after each measured round the seconds of all rounds so far, and the failed contestants with their errors.
    Raises RuntimeError if all failed."""
    seconds: Seconds = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for number in range(warm + repeats):
        for name in random.Random(number).sample(list(runs), len(runs)):
            if name in failed:
                continue
            try:
                elapsed = seconds_of(runs[name], device)
            except Exception as error:  # compilers raise many types; the others can still be measured
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if number >= warm:
                seconds[name].append(elapsed)
        if len(failed) == len(runs):
            raise RuntimeError(f"no contestant finished a round: {failed}")
        if number >= warm:
            yield {name: values for name, values in seconds.items() if name not in failed}, failed


def summary(seconds: Seconds, failed: dict[str, str]) -> dict[str, Any]:
    """Return medians and ratios of the rounds so far."""

    def ratio(fast: str, slow: str) -> dict[str, float]:
        ratios = [s / f for f, s in zip(seconds[fast], seconds[slow], strict=True)]
        return {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}

    goals = [
        {"faster": fast, "slower": slow, "goal": goal, **ratio(fast, slow)}
        for fast, slow, goal in GOALS
        if fast in seconds and slow in seconds
    ]
    plain = [(name, name.split("/")[0]) for name in seconds if "/" in name]
    return {
        "repeats": len(next(iter(seconds.values()))),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": goals,
        "variants": {name: ratio(name, eager)["ratio"] for name, eager in plain if eager in seconds},
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sd15", choices=["sd15", "sd21"])
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2, help="unmeasured rounds before those")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reads", default="pixels", choices=["pixels", "latent"])
    parser.add_argument("--variants", nargs="+", default=["eager"], choices=VARIANTS)
    parser.add_argument("--skip", nargs="*", default=[], help="contestants to leave out, e.g. ddim ddim-loop")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    picture = torch.rand(args.batch, 1, args.size, args.size, generator=torch.Generator().manual_seed(0)).round()
    picture = picture.expand(-1, 3, -1, -1).to(args.device, dtype)
    runs: dict[str, Run] = {}
    for variant in args.variants:
        backbone = build(args.kind, dtype).to(args.device)
        variant_runs = theirs(backbone, picture, variant)
        if variant != "eager":  # new networks, as variants change them in place
            backbone = build(args.kind, dtype).to(args.device)
        variant_runs |= ours(backbone, picture, args.reads, variant)
        suffix = "" if variant == "eager" else f"/{variant}"
        runs |= {f"{name}{suffix}": run for name, run in variant_runs.items() if name not in args.skip}
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "skip", "variants", "repeats")}
    settings = {"command": command_line(), **settings, "steps": STEPS, "machine": describe_machine()}
    compute = {"flop": flops(runs), "rates": rates(args.device, dtype)}
    for seconds, failed in contest(runs, args.device, args.warm, args.repeats):
        result = {**settings, **summary(seconds, failed), **compute, "share": shares(seconds, **compute)}
        write_json(result, args.out)
    print({key: result[key] for key in ("seconds", "ratios", "variants", "share", "failed")})


if __name__ == "__main__":
    main()
