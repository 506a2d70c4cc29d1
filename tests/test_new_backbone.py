"""The guide to a new backbone in CONTRIBUTING, AuraFlow: its code is run here, word for word."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from codi import CoDiPipeline
from codi.models import backbones
from codi.models.adapter import FORMS
from codi.models.backbones import Backbone, registry
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import initial_noise
from families import stock_sigmas, tiny_kl, tiny_t5_tokenizer
from tiny import initialized, rand, randn

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text().split("## A new backbone is one file\n")[1].split("\n## ")[0]
CODE = re.findall(r"```python\n(.*?)```", GUIDE, re.S)[0]


@pytest.fixture
def auraflow(monkeypatch) -> Any:
    """Follow steps 1 and 2."""
    name = "codi.models.backbones.auraflow"
    module = types.ModuleType(name)
    module.__package__ = backbones.__name__
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(CODE, "auraflow.py", "exec"), vars(module))
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, module.AuraFlow()))
    return module


def tiny_auraflow() -> Backbone:
    network = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    }  # fmt: skip
    text = UMT5Config(vocab_size=32, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return Backbone(
        vae=tiny_kl(4, shift_factor=None),
        transformer=initialized(lambda: AuraFlowTransformer2DModel(**network), 0),
        text_encoder=initialized(lambda: UMT5EncoderModel(text), 0), tokenizer=tiny_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_without_an_adapter_it_equals_the_stock_pipeline(auraflow, scale):
    backbone = tiny_auraflow().freeze()
    assert backbone.kind.name == "AuraFlow"
    stock, pipe = backbone.pipeline(), CoDiPipeline(**vars(backbone))
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    expected = stock(
        prompt="a red ball", height=16, width=16, num_inference_steps=4, sigmas=stock_sigmas(4), guidance_scale=scale,
        latents=initial_noise((4, 8, 8), [3]), output_type="pt",
    ).images  # fmt: skip
    images = pipe(
        prompt="a red ball", height=16, width=16, steps=4, seed=3, guidance_scale=scale, output_type="pt"
    ).images
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["fused", "hint", "lora"])
def test_adapters_work_through_the_protocol(auraflow, form):
    backbone = tiny_auraflow().freeze()
    text, added = embed_prompts(backbone.text, ["a red ball"], (16, 16))
    z, time = randn(1, 4, 8, 8), torch.tensor([600.0])
    adapter = FORMS[form].from_backbone(backbone.network, backbone.vae, 3, guidance_scales=1)
    conditioning = Conditioning(text, adapter.read(rand(1, 3, 16, 16), backbone.vae), added=added)
    conditioning.guidance = torch.tensor([[3.0]])
    plain = Student(backbone.network)(z, time, Conditioning(text, added=added))
    assert torch.equal(Student(backbone.network, adapter)(z, time, conditioning), plain)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * (parameter == 0))
    assert not torch.equal(Student(backbone.network, adapter)(z, time, conditioning), plain)
