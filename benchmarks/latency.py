"""Seconds a picture at full size, random weights: diffusers' ControlNet pipeline and ours, in turns in one process.

    python benchmarks/latency.py --kind sd15 --size 256 --repeats 3 --out benchmarks/results/latency-cpu.json
    python benchmarks/latency.py --device cuda --dtype bfloat16 --size 512 --repeats 20 --out latency-cuda.json

`lcm`: StableDiffusionControlNetPipeline with the LCM scheduler, 4 steps, no second pass. `ddim`: the same with 50 DDIM
steps and guidance in two passes. `codi`: ours in 4 steps, an adapter that reads pixels (`--reads latent`: latents, by
the VAE's encoder). `...-loop`: up to the latent, prompt and condition included. `codi-tiny`: decoded by a tiny decoder
(AutoencoderTiny as it stands in diffusers, TAESD's). `bare`: the bare modules of `codi` in a row, nothing around them.

A round runs every one of them once, in an order of its own; the first round is not measured. Ratios are medians of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import command_line
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, LCMScheduler, StableDiffusionControlNetPipeline
from fullsize import PROMPTS, build
from torch import Tensor

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.adapter import FORMS
from codi.models.backbone import Backbone
from codi.models.student import Conditioning, Student
from codi.models.text import tokenize
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.sampler import initial_noise, time_grid
from codi.sampling.shelf import Shelved
from codi.tasks import get_task

STEPS = 4
# (faster, slower, what is owed)
GOALS = (
    ("codi-loop", "lcm-loop", 1.22), ("codi", "lcm", 1.12), ("codi-tiny", "lcm", 1.8), ("codi", "ddim", 18),
    ("codi-tiny", "ddim", 30), ("bare", "codi", 1.02),
)  # fmt: skip


def theirs(backbone: Backbone, size: int, picture: Tensor) -> dict[str, Callable[[], Any]]:
    """diffusers' ControlNet pipeline on the backbone's parts."""
    parts = {key: getattr(backbone, key) for key in ("vae", "unet", "text_encoder", "tokenizer")}
    net = ControlNetModel.from_unet(backbone.unet).to(backbone.unet.device, backbone.unet.dtype).eval()
    runs: dict[str, Callable[[], Any]] = {}
    for name, scheduler, steps, guidance in (("lcm", LCMScheduler, STEPS, 1.0), ("ddim", DDIMScheduler, 50, 7.5)):
        pipe: Any = StableDiffusionControlNetPipeline(
            **parts, controlnet=net, scheduler=scheduler.from_config(backbone.scheduler.config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)

        def run(output: str = "pt", pipe: Any = pipe, steps: int = steps, guidance: float = guidance) -> Any:
            return pipe(
                PROMPTS[0], image=picture, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                output_type=output,
            )  # fmt: skip

        runs[name] = run
        runs[f"{name}-loop"] = lambda run=run: run("latent")
    return runs


def ours(backbone: Backbone, size: int, picture: Tensor, reads: str) -> dict[str, Callable[[], Any]]:
    """Our pipeline with an adapter of CoDi's form, with the VAE's decoder and with a tiny one; and its bare modules."""
    form: Any = FORMS["fused"]
    adapter = form.from_backbone(backbone.unet, backbone.vae, reads=reads).to(backbone.unet.dtype).eval()
    adapter.requires_grad_(False)
    tiny = AutoencoderTiny().to(backbone.unet.device, backbone.unet.dtype).eval()
    runs: dict[str, Callable[[], Any]] = {}
    for name, decoder in (("codi", None), ("codi-tiny", tiny)):
        pipe: Any = CoDiPipeline(**vars(backbone), tiny_vae=decoder)
        pipe.set_progress_bar_config(disable=True)
        pipe._shelf.loaded["canny"] = Shelved(adapter, backbone.unet, get_task("canny"), Path())
        pipe.set_adapters("canny")

        def run(output: str = "pt", pipe: Any = pipe) -> Any:
            return pipe(image=picture[:, :1], prompt=PROMPTS[0], steps=STEPS, output_type=output)

        runs[name] = run
    runs["codi-loop"] = lambda: runs["codi"]("latent")  # type: ignore[call-arg]
    runs["bare"] = bare(backbone, adapter, size, picture)
    return runs


def bare(backbone: Backbone, adapter: Any, size: int, picture: Tensor) -> Callable[[], Any]:
    """What cannot be left out: text encoder, condition once, U-Net and fusion at each step, decoder."""
    student = Student(backbone.unet, adapter).eval()
    noise = initial_noise((4, size // 8, size // 8), [0]).to(backbone.unet.device, backbone.unet.dtype)
    tokens = tokenize(backbone.tokenizer, PROMPTS[:1]).to(backbone.unet.device)
    levels = (time_grid(1000, STEPS)[:-1] - 1).to(backbone.unet.device)

    @torch.no_grad()
    def run() -> Any:
        text = backbone.text_encoder(tokens)[0]
        told = student.prepare(Conditioning(text, adapter.read(picture, backbone.vae)))
        for level in levels:
            made = student(noise, level[None], told)
        return codec.decode(backbone.vae, made)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sd15", choices=["sd15", "sd21"])
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reads", default="pixels", choices=["pixels", "latent"])
    parser.add_argument("--skip", nargs="*", default=[], help="contestants to leave out, e.g. ddim ddim-loop")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    backbone = build(args.kind, getattr(torch, args.dtype)).to(args.device)
    if args.channels_last:
        for part in (backbone.unet, backbone.vae):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    picture = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)).round()
    picture = picture[:, :1].expand(-1, 3, -1, -1).to(args.device, getattr(torch, args.dtype))
    runs = {**theirs(backbone, args.size, picture), **ours(backbone, args.size, picture, args.reads)}
    runs = {name: run for name, run in runs.items() if name not in args.skip}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.repeats + 1):
        for name in random.Random(number).sample(list(runs), len(runs)):
            started = time.perf_counter()
            runs[name]()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    ratios = [
        {
            "faster": fast, "slower": slow, "goal": goal,
            "ratio": statistics.median(s / f for f, s in zip(seconds[fast], seconds[slow], strict=True)),
        }
        for fast, slow, goal in GOALS
        if fast in runs and slow in runs
    ]  # fmt: skip
    told = {key: value for key, value in vars(args).items() if key not in ("out", "skip")}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {"command": command_line(), **told, "seconds": medians, "ratios": ratios, "machine": describe_machine()}
    write_json(result, args.out)
    print(medians, ratios, sep="\n")


if __name__ == "__main__":
    main()
