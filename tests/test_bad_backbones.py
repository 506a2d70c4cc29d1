"""Invalid backbones raise one-line errors that name the file or value, the fault and its fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models.adapter import FORMS
from codi.models.adapter_files import load_adapter
from codi.models.backbones import load_backbone, load_vae, with_network
from codi.models.tiny import new_tiny, open_decoder
from codi.training.distill import DistillRecipe, distill
from codi.training.dry_run import dry_run
from codi.training.saving import save_adapter
from families import FAMILIES, tiny_flux, tiny_kl
from folders import refused
from tiny import rand, tiny_backbone, tiny_checkpoint, tiny_scheduler


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny_flux().pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def model(flux, tmp_path) -> Path:
    return Path(shutil.copytree(flux, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_nan_weights_are_refused(model):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    refused(lambda: load_backbone(model), "model/transformer: weight 'proj_out.weight' is NaN", "fetch")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_missing_text_encoder_is_refused(model, part):
    edit(model / "model_index.json", **{part: [None, None]})
    refused(lambda: load_backbone(model), f"has no {part}", "fetch the whole model")
    assert load_backbone(model, text=False).transformer is not None  # a cache replaces it


def test_vae_with_other_latent_channels_is_refused(model):
    tiny_kl(channels=4).save_pretrained(model / "vae")
    refused(lambda: load_backbone(model), "takes 16 channels where latents have 4", "text-to-image model")


def test_scheduler_without_flow_shift_is_refused(model):
    shutil.rmtree(model / "scheduler")
    tiny_scheduler().save_pretrained(model / "scheduler")
    edit(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(lambda: load_backbone(model), "model/scheduler: a DDIMScheduler has no flow shift", "FlowMatchEuler")


def test_scheduler_not_set_to_flow_matching_is_refused(model):
    """It has a default flow shift of 1, which is unused."""
    shutil.rmtree(model / "scheduler")
    DPMSolverMultistepScheduler().save_pretrained(model / "scheduler")
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    refused(lambda: load_backbone(model), "a DPMSolverMultistepScheduler that is not for flow matching", "set use_flow")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "FluxKontextPipeline"}, "a FluxKontextPipeline takes more than noise and a prompt"),
        ({"_class_name": "FluxFillPipeline"}, "a FluxFillPipeline takes more than noise and a prompt"),
        ({"_class_name": "FluxControlPipeline"}, "train the task as an adapter"),
        (
            {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
            "a video model is not supported: use a text-to-image model of Stable Diffusion, FLUX.1",
        ),
        (
            {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]},
            r"a PixArtSigmaPipeline \(PixArtTransformer2DModel\) is not supported: .* SANA",
        ),
    ],
)
def test_unsupported_families_and_variants_are_refused(model, index, message):
    edit(model / "model_index.json", **index)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(model)
    assert "\n" not in str(caught.value)


def test_network_with_extra_input_channels_is_refused(tmp_path):
    """Fill and control checkpoints have them, even if model_index.json names a text-to-image pipeline."""
    backbone = tiny_flux(in_channels=128, out_channels=64)
    backbone.pipeline().save_pretrained(tmp_path)
    refused(lambda: load_backbone(tmp_path), "takes 32 channels where latents have 16")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_image_size_must_be_a_multiple_of_the_token(name):
    backbone = FAMILIES[name]()
    pipe = CoDiPipeline(**vars(backbone))
    cell = pipe.cell
    with pytest.raises(
        UserError, match=rf"size {4 * cell} x {4 * cell + 1}: not multiples of {cell} px: use {4 * cell}"
    ):
        pipe(prompt="a red ball", height=4 * cell + 1, width=4 * cell)


def test_invalid_recipe_values_are_refused(flux, tmp_path):
    recipe = {"out": str(tmp_path / "out"), "task": "depth", "model": str(flux), "data": "scenes:train:4",
              "held_out": "scenes:held-out:2", "train_backbone": False, "device": "cpu"}  # fmt: skip
    for changes, message in [
        ({"size": 34}, "size 34: not a multiple of 4, the model's token: use 32"),
        ({"size": 32, "embedded_guidance": 3.0, "model": str(flux.parent / "schnell")}, "has no such input"),
        ({"size": 32, "backbone_precision": "bf16"}, "set train_backbone: false and precision: bf16"),
        ({"size": 32, "backbone_precision": "fp8"}, "not known: use one of no, bf16"),
    ]:
        if "schnell" in str(changes.get("model")):
            tiny_flux(guidance=False).pipeline().save_pretrained(changes["model"])
        with pytest.raises(UserError, match=message):
            distill(DistillRecipe(**{**recipe, **changes}), quiet=True)
    with pytest.raises(UserError, match="size 34: not a multiple of 4, the model's token"):
        dry_run(DistillRecipe(**{**recipe, "size": 34}))


def test_adapter_of_another_family_is_refused(flux, tmp_path):
    recipe = DistillRecipe(
        out=str(tmp_path / "adapter"), task="depth", model=str(flux), data="scenes:train:4", adapter="hint", size=32,
        held_out="scenes:held-out:2", train_backbone=False, images=1, batch_size=1, device="cpu", preview_every=9,
    )  # fmt: skip
    adapter = distill(recipe, quiet=True)
    sd3 = tmp_path / "sd3"
    FAMILIES["sd3"]().pipeline().save_pretrained(sd3)
    refused(
        lambda: CoDiPipeline.from_pretrained(sd3, task="depth", adapter=adapter),
        "was trained for backbone FLUX.1", "Stable Diffusion 3", "train an adapter for this one",
    )  # fmt: skip


def test_embedded_guidance_is_refused_by_networks_without_it():
    pipe = CoDiPipeline(**vars(tiny_flux(guidance=False)))
    refused(lambda: pipe(prompt="a", embedded_guidance=3.0), "embedded_guidance 3", "leave it out")


def test_adapter_of_dev_works_on_schnell(tmp_path):
    """Only dev has the guidance input that the adapter was trained with."""
    dev, schnell = tiny_flux().freeze(), tiny_flux(guidance=False).freeze()
    adapter = FORMS["hint"].from_backbone(dev.network, dev.vae)
    adapter.register_to_config(info={"task": "depth", "family": dev.family, "embedded_guidance": 3.5})
    save_adapter(tmp_path, adapter, dev.network, full=False, half=False)
    pipe = CoDiPipeline(**vars(schnell))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(tmp_path)
    assert pipe(image=rand(1, 1, 16, 16), steps=1, output_type="pt").images.isfinite().all()
    pipe.solver = DPMSolverMultistepScheduler()
    refused(lambda: pipe(image=rand(1, 1, 16, 16), steps=1), "solver", "flow matching")


def test_truncated_prompts_are_warned_about():
    backbone = tiny_flux().freeze()
    pipe = CoDiPipeline(**vars(backbone))
    pipe.set_progress_bar_config(disable=True)
    prompt = " ".join(["ball"] * 520)
    with pytest.warns(UserWarning, match=r"prompt of 5\d\d tokens: the text encoder reads 512, so this is cut: 'ball"):
        image = pipe(prompt=prompt, height=16, width=16, steps=1, output_type="pt").images
    assert torch.equal(
        image, pipe(prompt=prompt.rsplit(" ", 4)[0], height=16, width=16, steps=1, output_type="pt").images
    )


def test_single_file_of_a_network_alone_needs_config(tmp_path):
    save_file({"double_blocks.0.img_mod.lin.weight": rand(2, 2)}, tmp_path / "flux.safetensors")
    refused(lambda: load_backbone(tmp_path / "flux.safetensors"), "has a network of FLUX.1 alone", "--config")


@pytest.mark.parametrize("value", [True, 7, "text", [1]])
def test_configuration_that_is_not_an_object_is_refused(model, value):
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="scheduler_config.json: holds .*, not a JSON object"):
        load_backbone(model)


@pytest.mark.parametrize(("part", "key"), [("vae", "layers_per_block"), ("transformer", "num_layers")])
@pytest.mark.parametrize("count", [10**40, 10**6])
def test_absurd_layer_counts_are_refused(model, part, key, count):
    edit(model / part / "config.json", **{key: count})
    with pytest.raises(UserError, match=f"{part}/config.json: {key} is above 1,000"):
        load_backbone(model)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vae", "scaling_factor", "x", "'x' is not a number"),
        ("vae", "shift_factor", [0.1], r"\[0.1\] is not a number"),
        ("vae", "scaling_factor", float("nan"), "is NaN"),
        ("transformer", "axes_dims_rope", [4, float("nan")], "is NaN"),
        ("scheduler", "shift", float("nan"), "is NaN"),
    ],
)
def test_invalid_numbers_in_configurations_are_refused(model, part, key, value, message):
    file = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    edit(file, **{key: value})
    with pytest.raises(UserError, match=f"{file.name}: {key} {message}"):
        load_backbone(model)


@pytest.mark.parametrize("loras", ["style.safetensors", ["style.safetensors"], 3])
def test_loras_must_be_a_dict_of_weights(model, loras):
    refused(lambda: load_backbone(model, loras=loras), "not a dict: give {file: weight}")


ABSURD = {"layers_per_block": [1, [10**9]], "in_channels": 10**12, "mid": {"num_blocks": [[2, 10**6]]}}


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_numbers_are_refused_before_any_part_is_built(model, key, tmp_path):
    """At any depth of the JSON, in every loader: backbone, VAE, single file, dry run, decoder, adapter, network."""
    absurd = {key: ABSURD[key]}
    save_file({"double_blocks.0.img_mod.lin.weight": rand(2, 2)}, file := tmp_path / "flux.safetensors")
    backbone, network = tiny_backbone("epsilon"), tmp_path / "adapter" / "unet"
    FORMS["hint"].from_backbone(backbone.network, backbone.vae).save_pretrained(tmp_path / "adapter")
    backbone.network.save_pretrained(network)
    new_tiny(backbone.vae, 8, (1,) * 3).save_pretrained(tmp_path / "decoder")
    for folder in (model / "vae", network, tmp_path / "decoder"):
        edit(folder / "config.json", **absurd)
    recipe = DistillRecipe(task="canny", model=str(model), data="scenes:train:4", size=32, out=str(tmp_path / "run"))
    for attempt, place in (
        (lambda: load_backbone(model), "vae"),
        (lambda: load_vae(model), "vae"),
        (lambda: load_backbone(file, config=model), "vae"),
        (lambda: dry_run(recipe), "vae"),
        (lambda: open_decoder(tmp_path / "decoder", model, backbone.vae), "decoder"),
        (lambda: load_adapter(tmp_path / "adapter", None, None, backbone.network), "unet"),
        (lambda: with_network(tiny_checkpoint(tmp_path / "base"), network, tmp_path / "whole"), "unet"),
    ):
        refused(attempt, f"{place}/config.json: ", " is above 1")
    edit(tmp_path / "adapter" / "config.json", network=absurd)
    refused(
        lambda: load_adapter(tmp_path / "adapter", None, None, backbone.network), "adapter/config.json: ", "above 1"
    )


def test_absurd_timestep_counts_are_refused(model):
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=10**9)
    refused(lambda: load_backbone(model), "scheduler_config.json: num_train_timesteps is above 100,000")
