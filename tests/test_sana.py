"""SANA's specifics: schedulers, prompt encoding, the latent space, its ControlNet, refused variants, authors' files."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SanaControlNetModel, SanaPipeline
from safetensors.torch import save_file
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models import codec
from codi.models.adapter import ControlNetAdapter
from codi.models.backbones import family_of_index, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import initial_noise
from family_sana import tiny_sana, tiny_sana15
from tiny import influence, rand, randn

SIDE, PROMPT = 32, "a red ball on a plain floor"
SHARED = {
    "patch_embed.proj": "x_embedder.proj", "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm", "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}  # fmt: skip
BLOCKS = {
    "attn1.to_q": "attn.qkv", "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_k": "cross_attn.kv_linear", "attn2.to_out.0": "cross_attn.proj", "scale_shift_table": "scale_shift_table",
    "ff.conv_inverted": "mlp.inverted_conv.conv", "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv", "attn1.norm_q": "attn.q_norm", "attn1.norm_k": "attn.k_norm",
    "attn2.norm_q": "cross_attn.q_norm", "attn2.norm_k": "cross_attn.k_norm",
}  # fmt: skip


def authors_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the keys of NVIDIA's own files, with the two tensors that diffusers drops."""
    out = {"pos_embed": torch.zeros(1, 64, 16), "y_embedder.y_embedding": torch.zeros(300, 12)}
    for key, value in weights.items():
        start, end, names = "", key, SHARED
        if key.startswith("transformer_blocks."):
            _, number, end = key.split(".", 2)
            start, names = f"blocks.{number}.", BLOCKS
        joined = {"attn1.to_q": ("to_k", "to_v"), "attn2.to_k": ("to_v",)}
        for first, more in joined.items():
            if end.startswith(first):
                value = torch.cat([value, *(weights[key.replace(first[-4:], projection)] for projection in more)])
        if end.startswith(("attn1.to_k", "attn1.to_v", "attn2.to_v")):
            continue
        name = next(old for old in names if f"{end}.".startswith(f"{old}."))
        out[f"{start}{names[name]}{end[len(name) :]}"] = value.contiguous()
    return out


def dpm(**changes: Any) -> DPMSolverMultistepScheduler:
    """Return the solver with the settings of the checkpoints."""
    settings: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    return DPMSolverMultistepScheduler(**{**settings, **changes})


def generate(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=PROMPT, height=SIDE, width=SIDE, output_type="pt", **options).images


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 4.5, "negative_prompt": "blue box"}])
def test_with_its_stock_scheduler_it_equals_the_stock_pipeline(guidance, steps):
    backbone = tiny_sana(scheduler=dpm()).freeze()
    latents, denoised = initial_noise((8, 8, 8), [3]), []
    stock: Any = backbone.pipeline()
    expected = generate(stock, num_inference_steps=steps, latents=latents, use_resolution_binning=False, **guidance)

    def record(pipe: Any, index: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        denoised.append(tensors["denoised"])
        return {}

    pipe = CoDiPipeline(**vars(backbone))
    names = ("latents", "denoised")
    images = generate(
        pipe, steps=steps, seed=3, **guidance, callback_on_step_end=record, callback_on_step_end_tensor_inputs=names
    )
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=0, atol=1e-5)
    assert len(denoised) == steps and denoised[-1].shape == latents.shape
    pipe.shift = 1.0  # an explicit shift selects our own grid
    assert steps == 1 or not torch.equal(generate(pipe, steps=steps, seed=3, **guidance), images)


def test_both_schedulers_give_the_same_schedule():
    flow, solver = tiny_sana().schedule, tiny_sana(scheduler=dpm()).schedule
    t = torch.tensor([0.0, 250.0, 500.0, 1000.0])
    assert torch.equal(flow.timestep(t), solver.timestep(t))
    assert solver.timestep(t[2:3]).item() == 750.0


@pytest.mark.parametrize("scheduler", [dpm(use_flow_sigmas=False), dpm(prediction_type="epsilon"), DDIMScheduler()])
def test_schedulers_for_other_paths_are_refused(scheduler, tmp_path):
    tiny_sana(scheduler=scheduler).pipeline().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="scheduler: a DPMSolver.* not for flow matching|scheduler: a DDIM.* has no flow shift"
    ):
        load_backbone(tmp_path)


def test_only_positive_prompts_are_prefixed_with_the_instruction():
    """The empty prompt always counts as a negative one, which guidance leads away from."""
    backbone = tiny_sana().freeze()
    stock: Any = backbone.pipeline()
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    instructed = stock.encode_prompt(["a red ball", "blue box"], False, complex_human_instruction=instruction)[:2]
    plain = stock.encode_prompt(["blue box", ""], False)[:2]
    text = backbone.text
    for encoded, (features, mask), rows in (
        (text.encode(["a red ball", "", "blue box"]), instructed, ([0, 2], [0, 1])),
        (text.encode(["a red ball", "", "blue box"]), plain, ([1], [1])),
        (text.encode(["blue box", ""], negative=True), plain, ([0, 1], [0, 1])),
    ):
        torch.testing.assert_close(encoded["features"][rows[0]], features[rows[1]], rtol=0, atol=1e-5)
        assert torch.equal(encoded["mask"][rows[0]], mask[rows[1]])
    assert not torch.allclose(text.encode(["blue box"])["features"], plain[0][:1], atol=1e-2)
    with pytest.warns(UserWarning, match="prompt of 302 tokens: the text encoder reads 299, so this is cut: 'xyz'"):
        text.encode(["a" * 298 + "xyz"])


def test_latents_equal_those_of_the_stock_pipeline():
    backbone, image = tiny_sana().freeze(), rand(2, 3, 16, 24)
    vae = backbone.vae
    expected = vae.encode(image * 2 - 1).latent * vae.config["scaling_factor"]
    assert expected.shape == (2, 8, 4, 6) and codec.downscale(vae) == 4 == vae.spatial_compression_ratio
    moments = codec.moments(vae, image)
    assert moments.shape == (2, 16, 4, 6) and torch.equal(codec.encode(vae, image), expected)
    torch.testing.assert_close(codec.draw(vae, moments, torch.Generator().manual_seed(0)), expected, rtol=0, atol=1e-5)
    back = vae.decode(expected / vae.config["scaling_factor"]).sample / 2 + 0.5
    torch.testing.assert_close(codec.decode(vae, expected), back.clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_sana, tiny_sana15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [8, 6])  # stored positions, and computed ones
def test_predictions_equal_those_of_the_network(build, dtype, side):
    """Bit for bit, also with another timestep scale."""
    backbone = build(timestep_scale=0.5).freeze()
    text, added = embed_prompts(backbone.text, [PROMPT, ""])
    network, z, time = backbone.network.to(dtype), randn(2, 8, side, side).to(dtype), torch.tensor([300.0, 800.0])
    expected = network(z, text.to(dtype), time * 0.5, encoder_attention_mask=added["mask"]).sample
    assert torch.equal(Student(network)(z, time, Conditioning(text, added=added)), expected)
    unmasked = network(z, text.to(dtype), time * 0.5).sample
    assert torch.equal(Student(network)(z, time, Conditioning(text)), unmasked) and not torch.equal(unmasked, expected)


@pytest.mark.parametrize("blocks", [3, 10])
def test_its_controlnet_equals_the_stock_one(blocks, tmp_path):
    """A stock network gives the same output with it; it starts as a copy."""
    backbone = tiny_sana(num_layers=blocks).freeze()
    adapter = ControlNetAdapter.from_backbone(backbone.network, backbone.vae, 3)
    assert len(adapter.net.transformer_blocks) == min(7, blocks - 1)
    for name in ("patch_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight", "caption_norm.weight"):
        assert torch.equal(adapter.net.state_dict()[name], backbone.network.state_dict()[name])
    student = influence(Student(backbone.network, adapter))
    with torch.no_grad():
        adapter.net.input_block.weight.copy_(randn(16, 16))
    adapter.net.save_pretrained(tmp_path)
    stock = SanaControlNetModel.from_pretrained(tmp_path)
    z, time, condition = randn(2, 8, 8, 8), torch.tensor([300.0, 800.0]), adapter.read(rand(2, 3, 32, 32), backbone.vae)
    text, added = embed_prompts(backbone.text, [PROMPT, "blue box"])
    inputs = {"encoder_hidden_states": text, "encoder_attention_mask": added["mask"], "timestep": time}
    samples = stock(z, controlnet_cond=condition, **inputs).controlnet_block_samples
    expected = backbone.network(z, controlnet_block_samples=tuple(samples), **inputs).sample
    output = student(z, time, Conditioning(text, condition, added=added))
    assert torch.equal(output, expected) and not torch.equal(output, backbone.network(z, **inputs).sample)


@pytest.mark.parametrize(("build", "channels", "why"), [(tiny_sana, 4, "a mask too"), (tiny_sana15, 3, "SANA 1.5")])
def test_unsupported_controlnets_are_refused(build, channels, why):
    backbone = build()
    with pytest.raises(UserError, match=f"adapter controlnet: .*{why}"):
        ControlNetAdapter.from_backbone(backbone.network, backbone.vae, channels)


def test_sprint_and_other_variants_are_refused():
    index: dict[str, Any] = {"transformer": ["diffusers", "SanaTransformer2DModel"]}
    with pytest.raises(UserError, match="here: SANA-Sprint predicts along another path"):
        family_of_index({**index, "_class_name": "SanaSprintPipeline"}, "here")
    with pytest.raises(UserError, match="a SanaControlNetPipeline takes more than noise and a prompt"):
        family_of_index({**index, "_class_name": "SanaControlNetPipeline"}, "here")
    sprint, wide = tiny_sana(guidance_embeds=True), tiny_sana(in_channels=9)
    with pytest.raises(UserError, match="here: SANA-Sprint predicts along another path"):
        sprint.kind.require_usable(sprint, "here")
    with pytest.raises(UserError, match="its network takes 9 channels where latents have 8"):
        wide.kind.require_usable(wide, "here")


def test_sana_10_and_15_do_not_share_adapters():
    assert tiny_sana().family == "SANA-8ch-f4-16x3-flow" != tiny_sana15().family


def test_a_file_in_the_authors_layout_loads(tmp_path):
    tiny_sana().pipeline().save_pretrained(tmp_path / "model")
    expected = tiny_sana(seed=1).network.state_dict()
    save_file(authors_layout(expected), tmp_path / "sana.safetensors")
    loaded = load_backbone(tmp_path / "sana.safetensors", config=tmp_path / "model")
    weights = loaded.network.state_dict()
    assert loaded.kind.name == "SANA" and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_file_of_15_in_the_authors_layout_is_refused(tmp_path):
    """diffusers drops the norms of queries and keys."""
    tiny_sana15().pipeline().save_pretrained(tmp_path / "model")
    save_file(authors_layout(tiny_sana15(seed=1).network.state_dict()), tmp_path / "sana.safetensors")
    with pytest.raises(UserError, match="diffusers cannot read SANA 1.5 in its authors' layout"):
        load_backbone(tmp_path / "sana.safetensors", config=tmp_path / "model")
