"""Qwen-Image's specifics: the latent space, masks, norm-keeping guidance, the ControlNet, and refused variants."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline
from safetensors.torch import save_file

from codi.errors import UserError
from codi.models import codec
from codi.models.adapter import FORMS
from codi.models.backbones import family_of_index, load_backbone
from codi.models.backbones.flux import pack
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from family_qwen_image import tiny_qwen_image
from tiny import rand, randn

TIME = torch.tensor([300.0, 800.0])


def test_latents_equal_those_of_the_stock_pipeline():
    backbone, image = tiny_qwen_image().freeze(), rand(1, 3, 16, 24)
    parts = {name: getattr(backbone, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    stock = QwenImageImg2ImgPipeline(**parts)
    latent = codec.encode(backbone.vae, image)
    assert latent.shape == (1, 4, 8, 12)
    # The stock pipeline treats an image as a frame, and samples the posterior.
    posterior = backbone.vae.encode(image[:, :, None] * 2 - 1).latent_dist
    drawn = stock._encode_vae_image(image[:, :, None] * 2 - 1, torch.Generator().manual_seed(0))[:, :, 0]
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    added = (posterior.std * noise)[:, :, 0] / torch.tensor(backbone.vae.config["latents_std"]).view(1, -1, 1, 1)
    torch.testing.assert_close(latent + added, drawn, rtol=0, atol=1e-5)
    space = codec.space(backbone.vae)
    torch.testing.assert_close(space.denormalize(backbone.vae, latent), posterior.mean[:, :, 0], rtol=0, atol=1e-6)


def test_predictions_equal_those_of_the_network():
    """Bit for bit, with a mask for prompts of two lengths, without one for equal lengths."""
    backbone = tiny_qwen_image().freeze()
    network, z, stock = backbone.network, randn(2, 4, 8, 12), backbone.pipeline()
    for prompts in (["a red ball", "a box"], ["a ball", "my box"]):
        features, mask = stock.encode_prompt(prompts)
        assert (mask is None) == (prompts[0] == "a ball")
        tokens = network(pack(z), features, mask, TIME / 1000, [[(1, 4, 6)]] * 2).sample
        text, added = embed_prompts(backbone.text, prompts)
        assert text.shape == (2, 512, 8) and added is not None and added["mask"].shape == (2, 512)
        output = Student(network)(z, TIME, Conditioning(text, added=added))
        assert torch.equal(pack(output), tokens)
        if mask is None:
            assert torch.equal(pack(Student(network)(z, TIME, Conditioning(features))), tokens)


def test_guidance_keeps_the_norm_of_each_token():
    with_, without = randn(2, 4, 8, 12, seed=1), randn(2, 4, 8, 12, seed=2)
    guided = tiny_qwen_image().kind.guide(with_, without, 4.0)
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(with_).norm(dim=-1))
    combined = pack(without + 4 * (with_ - without))
    torch.testing.assert_close(torch.cosine_similarity(pack(guided), combined, dim=-1), torch.ones(2, 24))


def test_the_last_step_is_at_the_terminal_sigma():
    schedule = tiny_qwen_image().schedule_for((128, 128), 4)
    sigma = schedule.timestep(torch.tensor([1000.0, 250.0, 0.0], dtype=torch.float64)) / 1000
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.02, 0.0], dtype=torch.float64))


def test_its_controlnet_equals_the_stock_one():
    backbone = tiny_qwen_image().freeze()
    network, z = backbone.network, randn(2, 4, 8, 12)
    adapter = FORMS["controlnet"].from_backbone(network, backbone.vae)
    net = adapter.net.eval()
    assert torch.equal(net.txt_norm.weight, network.txt_norm.weight) and len(net.transformer_blocks) == 3
    for name, parameter in net.named_parameters():
        if "controlnet" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    text, added = embed_prompts(backbone.text, ["a red ball", "a box"])
    condition = adapter.read(rand(2, 3, 16, 24), backbone.vae)
    features, mask = backbone.pipeline().encode_prompt(["a red ball", "a box"])
    shapes = [[(1, 4, 6)]] * 2
    with torch.no_grad():
        samples = net(pack(z), pack(condition), 1.0, features, mask, TIME / 1000, shapes, return_dict=False)
        arguments = {"controlnet_block_samples": samples, "img_shapes": shapes, "timestep": TIME / 1000}
        tokens = network(pack(z), features, mask, **arguments).sample
        output = Student(network, adapter)(z, TIME, Conditioning(text, condition, added=added))
    torch.testing.assert_close(pack(output), tokens, rtol=0, atol=1e-6)


def test_its_controlnet_accepts_maps():
    backbone = tiny_qwen_image().freeze()
    adapter = FORMS["controlnet"].from_backbone(backbone.network, backbone.vae, 4)
    condition = adapter.read(rand(2, 4, 16, 24), backbone.vae)
    text, added = embed_prompts(backbone.text, ["a red ball", "a box"])
    conditioning = Conditioning(text, condition, added=added)
    z = randn(2, 4, 8, 12)
    plain = Student(backbone.network)(z, TIME, Conditioning(text, added=added))
    assert torch.equal(Student(backbone.network, adapter)(z, TIME, conditioning), plain)


@pytest.mark.parametrize(
    "pipeline",
    ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline", "QwenImageInpaintPipeline"],
)
def test_variants_are_refused(pipeline):
    index = {"_class_name": pipeline, "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    with pytest.raises(UserError, match=f"a {pipeline} takes more than noise and a prompt"):
        family_of_index(index, "here")


def test_other_networks_are_refused():
    index = {"_class_name": "QwenImage21Pipeline", "transformer": ["diffusers", "QwenImage21Transformer2DModel"]}
    with pytest.raises(UserError, match="QwenImage21Transformer2DModel.* is not supported"):
        family_of_index(index, "here")
    edit = tiny_qwen_image(zero_cond_t=True)
    with pytest.raises(UserError, match="its network has zero_cond_t, as edit and layered variants do"):
        edit.kind.require_usable(edit, "here")
    fill = tiny_qwen_image(in_channels=32)
    with pytest.raises(UserError, match="its network takes 8 channels where latents have 4"):
        fill.kind.require_usable(fill, "here")


def test_a_file_of_the_network_loads(tmp_path):
    tiny_qwen_image().pipeline().save_pretrained(tmp_path / "model")
    expected = tiny_qwen_image(seed=1).network.state_dict()
    save_file(expected, tmp_path / "qwen.safetensors")
    loaded = load_backbone(tmp_path / "qwen.safetensors", config=tmp_path / "model")
    weights = loaded.network.state_dict()
    assert loaded.kind.name == "Qwen-Image" and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_long_prompts_are_a_warning():
    with pytest.warns(UserWarning, match="prompt of 515 tokens: the text encoder reads 512, so this is cut: 'end'"):
        tiny_qwen_image().text.encode(["a" * 512 + "end"])
