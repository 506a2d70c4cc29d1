"""Stable Diffusion 3's specifics: the third text encoder, sizes, its ControlNet, and files in the authors' layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models.adapter import ControlNetAdapter
from codi.models.backbones import family_of_index, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from family_sd3 import tiny_sd3, tiny_sd35
from tiny import influence, rand, randn

PARTS = {
    "pos_embed.proj": "x_embedder.proj", "pos_embed.pos_embed": "pos_embed", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "ff.net.0.proj": "x_block.mlp.fc1",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "ff.net.2": "x_block.mlp.fc2",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2", "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv", "attn2.to_q": "x_block.attn2.qkv", "attn.add_q_proj": "context_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
}  # fmt: skip


def authors_layout(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the weights under the keys of Stability AI's own files, which diffusers converts.

    Queries, keys and values are joined, and shift comes before scale in the last norms.
    """
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        if any(f".{name}." in key for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            continue
        for first in ("to_q", "add_q_proj"):
            if f".{first}." in key:
                value = torch.cat([value, *(weights[key.replace("q", c, 1)] for c in "kv")])
        if key.startswith(("norm_out", f"transformer_blocks.{blocks - 1}.norm1_context")):
            value = torch.cat(value.chunk(2)[::-1])
        start, end = "", key
        if key.startswith("transformer_blocks."):
            _, number, end = key.split(".", 2)
            start = f"joint_blocks.{number}."
        name = next(old for old in sorted(PARTS, key=len, reverse=True) if f"{end}.".startswith(f"{old}."))
        out[f"model.diffusion_model.{start}{PARTS[name]}{end[len(name) :]}"] = value.contiguous()
    return out


@pytest.mark.parametrize("build", [tiny_sd3, tiny_sd35])
def test_a_file_in_the_authors_layout_loads(build, tmp_path):
    backbone = build()
    backbone.pipeline().save_pretrained(tmp_path / "model")
    expected = build(seed=1).network.state_dict()
    save_file(authors_layout(expected, 3), tmp_path / "sd3.safetensors")
    loaded = load_backbone(tmp_path / "sd3.safetensors", config=tmp_path / "model")
    weights = loaded.network.state_dict()
    assert loaded.family == backbone.family and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match="has a network of Stable Diffusion 3 alone: pass config"):
        load_backbone(tmp_path / "sd3.safetensors")


def test_sd_3_and_35_do_not_share_adapters():
    assert tiny_sd3().family == "Stable Diffusion 3-16ch-f2-16x3-flow"
    assert tiny_sd35().family == "Stable Diffusion 3-16ch-f2-16x3-flow-qknorm-dual2"


def test_a_folder_without_the_third_text_encoder_loads(tmp_path):
    """Its features are then zeros; the other two encoders are required."""
    backbone = tiny_sd3(t5=False)
    backbone.pipeline().save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.text_encoder_3 is None and len(loaded.text.encoders) == 2
    features, added = embed_prompts(loaded.text, ["a red ball"])
    clip = loaded.tokenizer.model_max_length
    assert features.shape == (1, clip + 256, 20) and not features[:, clip:].any() and added["pooled"].shape == (1, 14)
    loaded.text_encoder_2 = None
    with pytest.raises(UserError, match="has no text_encoder_2"):
        loaded.kind.require_text(loaded, "here")


def test_prompts_are_cut_at_the_limit_of_the_longest_encoder():
    long = "a red ball " * 100
    with pytest.warns(UserWarning, match="prompt of 301 tokens: the text encoder reads 256"):
        tiny_sd3().text.encode([long])
    clip = tiny_sd35()
    with pytest.warns(UserWarning, match=f"the text encoder reads {clip.tokenizer.model_max_length}"):
        clip.text.encode([long])


def test_an_image_larger_than_the_positions_is_refused():
    pipe: Any = CoDiPipeline(**vars(tiny_sd3(pos_embed_max_size=6)))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="size of 7 x 4 tokens: this Stable Diffusion 3 has positions for 6 a side"):
        pipe(prompt="a red ball", height=16, width=28, steps=1)
    assert pipe(prompt="a red ball", height=24, width=20, steps=1, output_type="pt").images.shape == (1, 3, 24, 20)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_sd35])
@pytest.mark.parametrize("blocks", [3, 6, 7])
def test_its_controlnet_equals_the_stock_one(build, blocks, tmp_path):
    """Outputs agree, mask included; it starts as a copy, and leaves the network's configuration unchanged."""
    backbone = build(num_layers=blocks).freeze()
    before = dict(backbone.network.config)
    adapter = ControlNetAdapter.from_backbone(backbone.network, backbone.vae, 4)
    assert dict(backbone.network.config) == before and len(adapter.net.transformer_blocks) == blocks // 2
    for name in ("pos_embed.pos_embed", "transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"):
        assert torch.equal(adapter.net.state_dict()[name], backbone.network.state_dict()[name])
    student = influence(Student(backbone.network, adapter))
    with torch.no_grad():
        adapter.net.pos_embed_input.proj.weight.copy_(randn(*adapter.net.pos_embed_input.proj.weight.shape))
    adapter.net.save_pretrained(tmp_path)
    stock = SD3ControlNetModel.from_pretrained(tmp_path)
    assert stock.config["extra_conditioning_channels"] == 1 and not stock.config["force_zeros_for_pooled_projection"]
    z, time, condition = (
        randn(2, 16, 8, 8),
        torch.tensor([300.0, 800.0]),
        adapter.read(rand(2, 4, 16, 16), backbone.vae),
    )
    text, added = embed_prompts(backbone.text, ["a red ball", "blue box"])
    inputs = {"encoder_hidden_states": text, "pooled_projections": added["pooled"], "timestep": time}
    samples = stock(z, condition, **inputs).controlnet_block_samples
    expected = backbone.network(z, block_controlnet_hidden_states=samples, **inputs).sample
    output = student(z, time, Conditioning(text, condition, added=added))
    assert torch.equal(output, expected) and not torch.equal(output, backbone.network(z, **inputs).sample)


@pytest.mark.parametrize("pipeline", ["StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline"])
def test_variants_are_refused(pipeline):
    index = {"_class_name": pipeline, "transformer": ["diffusers", "SD3Transformer2DModel"]}
    with pytest.raises(UserError, match=f"a {pipeline} takes more than noise and a prompt"):
        family_of_index(index, "here")


def test_channels_of_other_variants_are_refused():
    backbone = tiny_sd3(in_channels=33)
    with pytest.raises(UserError, match="its network takes 33 channels where latents have 16"):
        backbone.kind.require_usable(backbone, "here")
