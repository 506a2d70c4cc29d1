"""FLUX.2's specifics: the latent space, klein's flag, the shift, refused variants, and files in the authors' layout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import save_file
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models import codec
from codi.models.backbones import family_of_index, load_backbone
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from families import stock_sigmas
from family_flux2 import tiny_flux2, tiny_flux2_vae
from tiny import rand, randn

PARTS = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "time_guidance_embed.timestep_embedder.linear_1":
    "time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "_modulation_img.linear": "_modulation_img.lin", "_modulation_txt.linear": "_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin", "proj_out": "final_layer.linear",
    "single_transformer_blocks": "single_blocks", "transformer_blocks": "double_blocks", "attn.to_qkv_mlp_proj":
    "linear1", "attn.to_out.0": "img_attn.proj", "attn.to_out": "linear2", "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2", "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}  # fmt: skip


def authors_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the keys of black-forest-labs' own files, which diffusers converts."""
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key == "norm_out.linear.weight":
            out["final_layer.adaLN_modulation.1.weight"] = torch.cat(value.chunk(2)[::-1])
            continue
        if any(f"attn.{name}." in key for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            continue
        for first, joined, stream in (("to_q", ("to_k", "to_v"), "img"), ("add_q_proj", ("add_k_proj", "add_v_proj"),
                                                                            "txt")):  # fmt: skip
            if f"attn.{first}." in key:
                value = torch.cat([value, *(weights[key.replace(first, projection)] for projection in joined)])
                key = key.replace(f"attn.{first}", f"{stream}_attn.qkv")
        norm = "norm" if key.startswith("single") else "img_attn.norm"
        for old, new in {**PARTS, "attn.norm_q.weight": f"{norm}.query_norm.scale",
                         "attn.norm_k.weight": f"{norm}.key_norm.scale"}.items():  # fmt: skip
            key = key.replace(old, new)
        out[key] = value.contiguous()
    return out


def generate(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red ball", height=16, width=16, output_type="pt", **options).images


def test_latents_equal_those_of_the_stock_pipeline():
    backbone, image = tiny_flux2().freeze(), rand(2, 3, 16, 24)
    stock = backbone.pipeline()
    latent = codec.encode(backbone.vae, image)
    assert latent.shape == (2, 16, 4, 6)
    assert torch.equal(latent, stock._encode_vae_image(image * 2 - 1, None))
    moments = codec.moments(backbone.vae, image)
    samples = torch.stack([codec.draw(backbone.vae, moments, torch.Generator().manual_seed(i)) for i in range(300)])
    scale = (backbone.vae.bn.running_var + backbone.vae.config["batch_norm_eps"]).sqrt().view(1, -1, 1, 1)
    deviation = (0.5 * moments.chunk(2, dim=1)[1]).exp() / scale
    torch.testing.assert_close(samples.std(0), deviation, rtol=0.3, atol=0)
    assert (samples.mean(0) - latent).abs().mean() < 0.2 * deviation.mean()


def test_predictions_equal_those_of_the_network():
    """Bit for bit, also with guidance as an input."""
    for dev in (False, True):
        backbone = tiny_flux2(dev=dev).freeze()
        network, z, time = backbone.network, randn(2, 16, 4, 6), torch.tensor([300.0, 800.0])
        text, added = embed_prompts(backbone.text, ["a red ball", ""])
        added = backbone.kind.with_embedded_guidance(network, added, 3.0 if dev else None, 2)
        ids = [backbone.pipeline()._prepare_text_ids(text), backbone.pipeline()._prepare_latent_ids(z)]
        tokens = network(
            z.flatten(2).transpose(1, 2), text, time / 1000, ids[1], ids[0], torch.full((2,), 3.0) if dev else None
        ).sample
        output = Student(network)(z, time, Conditioning(text, added=added))
        assert torch.equal(output.flatten(2).transpose(1, 2), tokens)


def test_distilled_klein_keeps_its_flag(tmp_path):
    """From a folder to the stock pipeline, and through saving a pipeline."""
    tiny_flux2(distilled=True).pipeline().save_pretrained(tmp_path / "model")
    backbone = load_backbone(tmp_path / "model")
    assert backbone.is_distilled and backbone.pipeline().config["is_distilled"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = CoDiPipeline.from_pretrained(tmp_path / "model")
        assert pipe.config["is_distilled"] and pipe.kind.build_pipeline(pipe).config["is_distilled"]
    pipe.save_pretrained(tmp_path / "saved")
    assert Flux2KleinPipeline.from_pretrained(tmp_path / "saved").config["is_distilled"]
    assert CoDiPipeline.from_pretrained(tmp_path / "saved").config["is_distilled"]
    with pytest.raises(UserError, match="guidance_scale 4: this FLUX.2 is distilled"):
        generate(pipe, guidance_scale=4.0)
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = generate(backbone.pipeline(), num_inference_steps=4, latents=latents, sigmas=stock_sigmas(4))
    torch.testing.assert_close(generate(pipe, steps=4), stock, rtol=0, atol=1e-5)


def test_a_base_model_saves_no_distilled_flag(tmp_path):
    CoDiPipeline(**vars(tiny_flux2())).save_pretrained(tmp_path)
    assert "is_distilled" not in json.loads((tmp_path / "model_index.json").read_text())
    assert not load_backbone(tmp_path).is_distilled


def test_the_shift_depends_on_the_step_count():
    """Without a step count, the default of the stock pipeline applies."""
    for distilled, steps in ((True, 4), (False, 50)):
        backbone: Any = tiny_flux2(distilled=distilled)
        shifts = {n: backbone.schedule_for((64, 64), n).shift for n in (None, 4, 50)}
        assert shifts[None] == shifts[steps] and shifts[4] != shifts[50]
        pipe: Any = CoDiPipeline(**vars(backbone))
        assert pipe.schedule_for((64, 64)).shift == shifts[steps]


@pytest.mark.parametrize("pipeline", ["Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"])
def test_variants_are_refused(pipeline):
    index = {"_class_name": pipeline, "transformer": ["diffusers", "Flux2Transformer2DModel"]}
    with pytest.raises(UserError, match=f"a {pipeline} takes more than noise and a prompt"):
        family_of_index(index, "here")


def test_a_dev_folder_opens_as_dev(tmp_path):
    tiny_flux2(dev=True).pipeline().save_pretrained(tmp_path)
    assert isinstance(load_backbone(tmp_path).pipeline(), Flux2Pipeline)
    assert isinstance(load_backbone(tmp_path, text=False).pipeline(), Flux2Pipeline)


def test_a_file_in_the_authors_layout_loads(tmp_path):
    backbone = tiny_flux2(distilled=True)
    backbone.pipeline().save_pretrained(tmp_path / "model")
    expected = tiny_flux2(seed=1).network.state_dict()
    save_file(authors_layout(expected), tmp_path / "klein.safetensors")
    loaded = load_backbone(tmp_path / "klein.safetensors", config=tmp_path / "model")
    weights = loaded.network.state_dict()
    assert loaded.kind.name == "FLUX.2" and loaded.is_distilled and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_every_block_gets_low_rank_updates():
    network = add_lora(tiny_flux2().network, 2, "generate")
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(network, name):
            layers = {key.partition(".lora_B")[0] for key, _ in block.named_parameters() if "lora_B" in key}
            assert len(layers) == (12 if name == "transformer_blocks" else 2), layers


def test_long_prompts_are_a_warning():
    backbone = tiny_flux2()
    with pytest.warns(UserWarning, match="prompt of 512 tokens: the text encoder reads 509, so this is cut: 'end'"):
        backbone.text.encode(["a" * 509 + "end"])


def test_channels_of_other_variants_are_refused(tmp_path: Path):
    backbone = tiny_flux2(in_channels=20)
    with pytest.raises(UserError, match="its network takes 20 channels where latents have 16"):
        backbone.kind.require_usable(backbone, "here")
    assert tiny_flux2_vae().config["latent_channels"] == 4
