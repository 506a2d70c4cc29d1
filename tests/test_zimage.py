"""Z-Image's specifics: prompts of different lengths, its ControlNet, refused variants, and the authors' files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models.adapter import ControlNetAdapter
from codi.models.backbones import Backbone, load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.sampler import initial_noise
from families import stock_sigmas
from family_zimage import tiny_zimage
from tiny import rand, randn

PROMPT = "a red ball on a plain floor"
PROMPTS = [PROMPT, "blue box", PROMPT * 8, ""]  # of 64, 32, 256 and 32 tokens with their padding
TIMES = torch.tensor([300.0, 800.0, 10.0, 999.0])
RENAMED = {
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "to_out.0": "out", "norm_k": "k_norm",
    "norm_q": "q_norm", "to_q": "qkv",
}  # fmt: skip


def stock_output(backbone: Backbone, z: Tensor, text: Tensor, mask: Tensor | None, **more) -> Tensor:
    """Return the output of the network's own forward pass, in our sign."""
    rows = list(text) if mask is None else [row[real] for row, real in zip(text, mask, strict=True)]
    times = (1000 - TIMES[: len(z)]) / 1000
    outputs = backbone.transformer(list(z.unsqueeze(2)), times, rows, return_dict=False, **more)[0]
    return -torch.stack(outputs).squeeze(2)


@pytest.mark.parametrize(("high", "wide"), [(8, 8), (8, 16), (10, 14)])  # 16, 32 and 35 image tokens
def test_a_batch_of_different_prompts_equals_the_stock_network(high, wide):
    backbone, z = tiny_zimage().freeze(), randn(4, 16, high, wide)
    text, added = embed_prompts(backbone.text, PROMPTS)
    assert added["mask"].sum(1).tolist() == [46, 27, 235, 19]
    output = Student(backbone.network)(z, TIMES, Conditioning(text, added=added))
    torch.testing.assert_close(output, stock_output(backbone, z, text, added["mask"]), rtol=0, atol=1e-6)
    cached = Conditioning(text, added={"mask": added["mask"].half()})  # as a cache stores it
    assert torch.equal(Student(backbone.network)(z, TIMES, cached), output)


def test_without_a_mask_all_features_are_read():
    backbone, z, text = tiny_zimage().freeze(), randn(2, 16, 8, 8), randn(2, 40, 12)
    output = Student(backbone.network)(z, TIMES[:2], Conditioning(text))
    torch.testing.assert_close(output, stock_output(backbone, z, text, None), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", [PROMPT * 6, PROMPT * 30])  # the second prompt is truncated
def test_the_pipeline_equals_the_stock_one_at_other_sizes_and_long_prompts(prompt):
    backbone = tiny_zimage(dynamic=True).freeze()
    stock, pipe = backbone.pipeline(), CoDiPipeline(**vars(backbone))
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    expected = stock(
        prompt, height=24, width=32, num_inference_steps=4, sigmas=stock_sigmas(4), guidance_scale=1.5,
        latents=initial_noise((16, 12, 16), [3]), output_type="pt",
    ).images  # fmt: skip
    arguments = {"prompt": prompt, "height": 24, "width": 32, "seed": 3, "guidance_scale": 2.5, "output_type": "pt"}
    if len(prompt) > 512:
        with pytest.warns(UserWarning, match="the text encoder reads 509, so this is cut: .*floor'"):
            images = pipe(**arguments).images
    else:
        images = pipe(**arguments).images
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_the_controlnet_works_in_the_stock_network():
    """With the ControlNet's samples for image tokens only it gives our output, also for a condition with a mask."""
    backbone = tiny_zimage(n_layers=7).freeze()
    adapter = ControlNetAdapter.from_backbone(backbone.network, backbone.vae, 4).requires_grad_(False)
    for parameter in adapter.parameters():
        if not parameter.any():
            parameter.add_(0.2 * randn(*parameter.shape))
    z, (text, added) = randn(4, 16, 8, 8), embed_prompts(backbone.text, PROMPTS)
    condition = adapter.read(rand(4, 4, 16, 16), backbone.vae)
    output = Student(backbone.network, adapter)(z, TIMES, Conditioning(text, condition, added=added))
    rows = [row[real] for row, real in zip(text, added["mask"], strict=True)]
    samples = adapter.net(list(z.unsqueeze(2)), (1000 - TIMES) / 1000, rows, list(condition.unsqueeze(2)))
    assert sorted(samples) == [0, 5]
    for sample in samples.values():
        sample[:, 16:] = 0
    expected = stock_output(backbone, z, text, added["mask"], controlnet_block_samples=samples)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert (output - stock_output(backbone, z, text, added["mask"])).abs().max() > 0.1


def test_the_controlnet_trains_separately_from_the_backbone():
    """It starts as a copy, shares no weight, and trains every weight, also in bfloat16 with checkpointing."""
    backbone = tiny_zimage().freeze()
    adapter = ControlNetAdapter.from_backbone(backbone.network, backbone.vae)
    own, weights = adapter.net.state_dict(), backbone.network.state_dict()
    assert torch.equal(own["control_layers.0.attention.to_q.weight"], weights["layers.0.attention.to_q.weight"])
    assert torch.equal(
        own["control_noise_refiner.0.feed_forward.w1.weight"], own["noise_refiner.0.feed_forward.w1.weight"]
    )
    assert not {p.data_ptr() for p in adapter.parameters()} & {p.data_ptr() for p in backbone.network.parameters()}
    text, added = embed_prompts(backbone.text, [PROMPT, "blue box"])
    condition = adapter.read(rand(2, 3, 16, 16), backbone.vae)
    adapter.net.enable_gradient_checkpointing()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "_proj." in name:
                parameter.add_(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        conditioning = Conditioning(text, condition, added=added)
        Student(backbone.network, adapter)(
            randn(2, 16, 8, 8), TIMES[:2], conditioning
        ).float().square().mean().backward()
    untrained = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


def test_variants_are_refused(tmp_path):
    tiny_zimage().pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("ZImageControlNetPipeline", "ZImageImg2ImgPipeline", "ZImageOmniPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(UserError, match=f"a {name} takes more than noise and a prompt"):
            load_backbone(tmp_path)
    omni = tiny_zimage(siglip_feat_dim=4)
    with pytest.raises(UserError, match="x: its network also reads reference pictures"):
        omni.kind.require_usable(omni, "x")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_the_authors_layout_loads(tmp_path, prefix):
    backbone = tiny_zimage()
    backbone.pipeline().save_pretrained(tmp_path / "model")
    weights, stored = backbone.network.state_dict(), {}
    for key, value in weights.items():
        if ".to_q." in key:
            value = torch.cat([weights[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")])
        for ours, theirs in RENAMED.items():
            key = key.replace(ours, theirs)
        if ".to_" not in key:
            stored[prefix + key] = value.contiguous()
    save_file(stored, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="has a network of Z-Image alone: pass config"):
        load_backbone(tmp_path / "z.safetensors")
    loaded = load_backbone(tmp_path / "z.safetensors", config=str(tmp_path / "model"))
    assert all(torch.equal(value, weights[key]) for key, value in loaded.network.state_dict().items())
