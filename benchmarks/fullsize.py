"""Full-size Stable Diffusion of the published configurations with random weights: speed, memory, shapes and file
layouts do not depend on the weights' values.

    python benchmarks/fullsize.py --kinds sd15 sd21 sdxl --out benchmarks/results/fullsize.json

checks for each kind: diffusers' own pipeline and ours sample the same latent from the same noise; an untrained adapter
of each form leaves the U-Net's output unchanged, bit for bit; the family is recognized; a saved folder loads to equal
weights.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from command import command_line
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models.adapter import FORMS
from codi.models.backbones import Backbone, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.sampler import initial_noise
from codi.training.tokenizer import train_tokenizer

PROMPTS = ["a red ball on a plain floor", "a blue box and a green cone at dusk"]
WORDS = 49408  # size of CLIP's vocabulary
_DOWN, _UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
        "attention_head_dim": 8, "down_block_types": _DOWN, "up_block_types": _UP,
    },
    "sd21": {
        "sample_size": 96, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True, "down_block_types": _DOWN,
        "up_block_types": _UP,
    },
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ["DownBlock2D", *_DOWN[:2]], "up_block_types": [*_UP[1:3], "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXTS = {"sd15": [_L], "sd21": [_H | {"hidden_act": "gelu"}], "sdxl": [_L, _G | {"hidden_act": "gelu"}]}
PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}


def vae(kind: str) -> AutoencoderKL:
    """Return the autoencoder that all kinds share, f = 8 with 4 channels."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215, force_upcast=kind == "sdxl",
    )  # fmt: skip


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, to build modules in it directly: XL may fit in bfloat16 where it does not in
    float32."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Backbone:
    """Return the whole checkpoint, frozen. Its tokenizer knows few words; the text encoders have CLIP's full size."""
    torch.manual_seed(seed)
    with default_dtype(dtype):
        encoders = []
        for number, config in enumerate(TEXTS[kind]):
            cls: Any = CLIPTextModelWithProjection if number else CLIPTextModel
            text_config = CLIPTextConfig(
                vocab_size=WORDS, projection_dim=config["hidden_size"], bos_token_id=0, eos_token_id=1, **config
            )
            encoders.append(cls(text_config))
        parts = vae(kind), UNet2DConditionModel(**UNETS[kind])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer: Any = train_tokenizer(PROMPTS, Path(folder), vocabulary=900)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=True, prediction_type=PREDICTIONS[kind], timestep_spacing="leading",
    )  # fmt: skip
    second_encoder = (encoders[1], tokenizer) if len(encoders) > 1 else (None, None)
    return Backbone(*parts, encoders[0], tokenizer, scheduler, *second_encoder).freeze()


@torch.no_grad()
def check(kind: str, dtype: torch.dtype, size: int, forms: list[str]) -> dict[str, Any]:
    """Run the module's checks for one kind at `size` pixels and return its row of results."""
    started = time.perf_counter()
    backbone = build(kind, dtype)
    row: dict[str, Any] = {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "family": backbone.family}
    row["parameters"] = {
        name: count(part) for name, part in vars(backbone).items() if isinstance(part, torch.nn.Module)
    }
    noise = initial_noise((4, size // 8, size // 8), [0])
    stock: Any = backbone.pipeline()
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        PROMPTS[0], height=size, width=size, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        latents=noise.to(dtype),
    ).images.float()  # fmt: skip
    ours: Any = CoDiPipeline(**vars(backbone))
    ours.set_progress_bar_config(disable=True)
    output = ours(prompt=PROMPTS[0], steps=2, guidance_scale=3.0, height=size, width=size, seed=0, output_type="latent")
    row["latent_difference_to_diffusers"] = float((output.images.float() - expected).norm() / expected.norm())
    text, added = embed_prompts(backbone.text, PROMPTS[:1], (size, size))
    z, timestep = noise.to(dtype), torch.tensor([500])
    unet_output = backbone.unet(z, timestep, text, added_cond_kwargs=added).sample
    row["adapters"] = {}
    for form in forms:
        with default_dtype(dtype):
            adapter: Any = FORMS[form].from_backbone(backbone.unet, backbone.vae)
        condition = adapter.read(torch.rand(1, 3, size, size).to(dtype), backbone.vae)
        adapted_output = Student(backbone.unet, adapter)(z, timestep, Conditioning(text, condition, added=added))
        row["adapters"][form] = {
            "parameters": count(adapter),
            "equals_backbone": bool(torch.equal(adapted_output, unet_output)),
        }
        del adapter, condition, adapted_output
    row["folder_survives"] = reloads_equal(backbone, dtype)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def reloads_equal(backbone: Backbone, dtype: torch.dtype) -> bool:
    """Return whether saved folders, without a variant and as variant fp16, load to weights equal bit for bit."""
    equal = True
    for variant in (None, "fp16"):
        with tempfile.TemporaryDirectory() as folder:
            backbone.pipeline().save_pretrained(folder, variant=variant)
            reloaded = load_backbone(folder, dtype)
            for module, reloaded_module in zip(backbone.modules, reloaded.modules, strict=True):
                state = reloaded_module.state_dict()
                equal &= all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(UNETS), choices=list(UNETS))
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        rows.append(check(kind, torch.bfloat16 if kind == "sdxl" else torch.float32, args.size, args.forms))
        print(rows[-1])
        write_json(
            {"command": command_line(), "size": args.size, "rows": rows, "machine": describe_machine()}, args.out
        )


if __name__ == "__main__":
    main()
