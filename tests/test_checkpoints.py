"""Stable Diffusion 1, 2 and XL checkpoints in diffusers' layouts, sampled as in diffusers."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from codi.apps.common import parse_loras
from codi.errors import UserError
from codi.models import codec
from codi.models.adapter import FORMS, FusedAdapter
from codi.models.adapter_files import load_adapter
from codi.models.backbones import load_backbone
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.sampler import initial_noise
from codi.training.distill import DistillRecipe, distill
from originals import save_original
from tiny import (
    CAPTIONS,
    LATENT_CHANNELS,
    influence,
    rand,
    randn,
    tiny_backbone,
    tiny_checkpoint,
    tiny_lora,
    tiny_scheduler,
    tiny_xl,
)

XL = tiny_xl().freeze()


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    XL.pipeline().save_pretrained(folder)
    return folder


def theirs(backbone: Any, noise: torch.Tensor, steps: int, guidance: float, prompts: Any) -> torch.Tensor:
    """Return the latent that the diffusers pipeline makes from the same noise."""
    pipe: Any = backbone.pipeline()
    pipe.set_progress_bar_config(disable=True)
    side = 4 * noise.shape[-1]
    return pipe(
        prompts, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance, latents=noise,
        output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_text_to_image_equals_diffusers(kind, spacing, prediction, to_one):
    """For each spacing, final alpha and prediction type of the scheduler, with and without guidance."""
    changes = {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
    backbone = dataclasses.replace(
        tiny_xl() if kind == "xl" else tiny_backbone(), scheduler=tiny_scheduler(prediction, **changes)
    )
    noise, prompts = initial_noise((LATENT_CHANNELS, 8, 8), [3, 4]), list(CAPTIONS)
    for guidance in (1.0, 3.0):
        expected = theirs(backbone, noise, 4, guidance, prompts)
        pipe: Any = CoDiPipeline(**vars(backbone))
        latent = pipe(prompt=prompts, steps=4, guidance_scale=guidance, seed=[3, 4], output_type="latent").images
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_is_honoured():
    scheduler = tiny_scheduler("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    schedule = dataclasses.replace(tiny_backbone(), scheduler=scheduler).schedule
    alpha, sigma = schedule.alpha_sigma(torch.tensor([1000]), torch.zeros(1, dtype=torch.float64))
    assert alpha == 0 and sigma == 1


def test_empty_prompt_is_zeros_for_xl_by_default():
    features, added = embed_prompts(XL.text, ["", CAPTIONS[0]], (32, 64))
    assert added is not None and added["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert not features[0].any() and not added["text_embeds"][0].any() and features[1].any()
    encoded = dataclasses.replace(XL, force_zeros_for_empty_prompt=False)
    assert embed_prompts(encoded.text, [""])[0].any()


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_scheduler_without_betas_is_refused(kind, tmp_path):
    """As a DDIM scheduler it would silently get default betas."""
    pipeline = tiny_backbone().pipeline()
    pipeline.scheduler = kind()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"its {kind.__name__} has no betas"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_single_file_equals_its_folder_exactly(kind, tmp_path):
    """Weights have the original names; configurations and tokenizers come from a folder, as the hub is offline."""
    backbone = {"sd1": tiny_backbone("epsilon"), "sd2": tiny_backbone("v_prediction"), "xl": XL}[kind]
    backbone.pipeline().save_pretrained(tmp_path / kind)
    file = save_original(backbone, tmp_path / f"{kind}.safetensors", open_clip=kind == "sd2")
    loaded = load_backbone(file, config=tmp_path / kind)
    assert loaded.family == backbone.family
    for ours, theirs in zip(loaded.modules, backbone.modules, strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_xl_vae_computes_in_float32(xl_folder):
    vae, z, picture = (
        load_backbone(xl_folder, torch.float16).vae,
        randn(1, LATENT_CHANNELS, 8, 8).half(),
        rand(1, 3, 32, 32),
    )
    decoded, encoded = codec.decode(vae, z), codec.encode(vae, picture)
    assert vae.dtype == decoded.dtype == encoded.dtype == torch.float16
    wide = copy.deepcopy(vae).float()
    assert torch.equal(decoded, codec.decode(wide, z).half()) and torch.equal(
        encoded, codec.encode(wide, picture).half()
    )


def test_other_vaes_stay_in_float16(tmp_path):
    vae = load_backbone(tiny_checkpoint(tmp_path), torch.float16).vae
    assert not vae.config["force_upcast"]


def test_xl_loads_from_its_folder_with_its_own_family(xl_folder):
    loaded = load_backbone(xl_folder)
    assert loaded.family == XL.family != tiny_backbone("epsilon").family
    assert loaded.force_zeros_for_empty_prompt and len(loaded.text.encoders) == 2
    for ours, expected in zip(loaded.modules, XL.modules, strict=True):
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_of_adapter_works_on_xl(form):
    adapter = FORMS[form].from_backbone(XL.unet, XL.vae)
    text, added = embed_prompts(XL.text, CAPTIONS, (32, 32))
    conditioning = Conditioning(text, adapter.read(rand(2, 3, 32, 32), XL.vae), added=added)
    z, level = randn(2, LATENT_CHANNELS, 8, 8), torch.tensor([500])
    expected = XL.unet(z, level, text, added_cond_kwargs=added).sample
    assert torch.equal(Student(XL.unet, adapter)(z, level, conditioning), expected)
    assert not torch.equal(influence(Student(XL.unet, adapter))(z, level, conditioning), expected)


@torch.no_grad()
def test_fused_adapter_reads_pixels(tmp_path):
    backbone = tiny_backbone().freeze()
    adapter = FusedAdapter.from_backbone(backbone.unet, backbone.vae, 4, reads="pixels")
    picture, (text, _) = rand(2, 4, 32, 32), embed_prompts(backbone.text, CAPTIONS)
    assert torch.equal(adapter.read(picture, backbone.vae), picture)
    z, level, conditioning = randn(2, LATENT_CHANNELS, 8, 8), torch.tensor([500]), Conditioning(text, picture)
    assert torch.equal(Student(backbone.unet, adapter)(z, level, conditioning), backbone.unet(z, level, text).sample)
    trained = influence(Student(backbone.unet, adapter))
    assert not torch.equal(trained(z, level, conditioning), trained(z, level, Conditioning(text, picture.flip(-1))))
    adapter.save_pretrained(tmp_path)
    reloaded, _ = load_adapter(tmp_path, None, None, backbone.unet)
    assert torch.equal(Student(backbone.unet, reloaded)(z, level, conditioning), trained(z, level, conditioning))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "sound"}, "reads 'sound': not known"),
        ({"reads": "pixels", "adapter": "controlnet"}, "controlnet reads in its own way"),
    ],
)
def test_invalid_reads_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DistillRecipe(out="", **changes).validate()


def test_xl_trains_and_samples_and_is_saved(xl_folder, tmp_path):
    recipe = DistillRecipe(
        out=str(tmp_path / "run"), model=str(xl_folder), task="depth", data="scenes:train:8",
        held_out="scenes:held-out:4", size=32, images=4, batch_size=2, train_backbone=False, lora_rank=2,
        guidance={"text": [1, 4]}, guidance_share=1.0, preview_every=1000, reads="pixels",
    )  # fmt: skip
    distill(recipe, quiet=True)
    pipe: Any = CoDiPipeline.from_pretrained(xl_folder, adapter=tmp_path / "run")
    picture, prompts = rand(2, 1, 32, 32), list(CAPTIONS)
    images = pipe(image=picture, prompt=prompts, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    pipe.save_pretrained(tmp_path / "saved")
    reloaded: Any = CoDiPipeline.from_pretrained(tmp_path / "saved", task="depth")
    assert torch.equal(reloaded(image=picture, prompt=prompts, guidance_scale=2.0, output_type="pt").images, images)
    with pytest.raises(UserError, match="was trained for backbone"):
        CoDiPipeline(**vars(tiny_backbone("epsilon"))).load_adapter(tmp_path / "run")


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_lora_is_merged_into_the_backbone(weight, tmp_path):
    backbone = tiny_backbone()
    backbone.pipeline().save_pretrained(tmp_path / "model")
    adapted: Any = tiny_lora(backbone.unet, "style")
    updates: Any = get_peft_model_state_dict(adapted, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=updates, weight_name="style.safetensors")
    fused = load_backbone(tmp_path / "model", loras={str(tmp_path / "style.safetensors"): weight})
    adapted.set_adapters(["style"], [weight])
    z, level, text = randn(1, LATENT_CHANNELS, 8, 8), torch.tensor([300]), embed_prompts(backbone.text, ["a"])[0]
    torch.testing.assert_close(fused.unet(z, level, text).sample, adapted(z, level, text).sample)
    assert fused.unet.state_dict().keys() == backbone.unet.state_dict().keys()  # no LoRA weights remain
    assert not torch.equal(fused.unet(z, level, text).sample, backbone.unet(z, level, text).sample)


def test_unsupported_models_and_invalid_loras_are_refused(xl_folder, tmp_path):
    backbone = tiny_backbone()
    wide = dataclasses.replace(backbone, unet=tiny_backbone(in_channels=9).unet)
    wide.pipeline().save_pretrained(tmp_path / "inpainting")
    with pytest.raises(UserError, match="takes 9 channels where latents have 4"):
        load_backbone(tmp_path / "inpainting")
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["a", "b"]}))
    refusal = r"a FluxPipeline \(b\) is not supported: use a text-to-image model of Stable Diffusion, FLUX"
    with pytest.raises(UserError, match=refusal):
        load_backbone(flux)
    save_file({"other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for name in ("no", "other"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors: not a LoRA"):
            load_backbone(xl_folder, loras={str(tmp_path / f"{name}.safetensors"): 1.0})


def test_lora_options_are_parsed():
    assert parse_loras(["a.safetensors", "b=c.safetensors=0.5", "d=-1"]) == {
        "a.safetensors": 1.0, "b=c.safetensors": 0.5, "d": -1.0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--lora a=much: 'much' is not a number: write FILE=0\.8"):
        parse_loras(["a=much"])
