"""Conventions of diffusers pipelines: argument names, noise, hooks, folders, LoRAs."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import FirstBlockCacheConfig
from PIL import Image

from codi.errors import UserError
from codi.models.lora import save_lora
from codi.sampling.pipeline import CoDiPipeline
from families import tiny_flux
from pipelines import hole, inputs_for, make_folder, open_pipeline, run
from tiny import rand, randn, seeded, tiny_backbone, tiny_lora, tiny_unet

BLANK = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def shared(folder) -> CoDiPipeline:
    return open_pipeline(folder)


@pytest.fixture
def pipe(shared) -> CoDiPipeline:
    """The shared pipeline with no adapter set."""
    shared.set_adapters([])
    return shared


def open_with_adapter(folder: Path, task: str) -> CoDiPipeline:
    pipe = CoDiPipeline.from_pretrained(folder / "model", task=task, adapter=folder / task)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- names and numbers of arguments


def test_diffusers_argument_names_equal_the_short_names(pipe):
    pipe.set_adapters("inpaint")
    image, mask = rand(1, 3, 16, 24, seed=3), hole(16, 24)
    expected = run(pipe, image=image, mask=mask, steps=3)
    arguments = {"prompt": "a red ball", "image": image, "num_inference_steps": 3, "output_type": "pt"}
    assert torch.equal(pipe(**arguments, mask_image=mask).images, expected)
    assert torch.equal(pipe("a red ball", image, mask, num_inference_steps=3, output_type="pt").images, expected)
    for conflict, message in (
        ({"steps": 2, "num_inference_steps": 3}, "steps 2 and num_inference_steps 3"),
        ({"mask": mask, "mask_image": mask.clone()}, "mask and mask_image"),
        ({"mask": mask.numpy(), "mask_image": mask.numpy()}, "mask and mask_image"),
        ({"mask": [mask.numpy()], "mask_image": [mask]}, "mask and mask_image"),
        ({"generator": seeded(), "seed": 3}, "generator and seed"),
        ({"prompt_embeds": torch.zeros(1, 4, 8)}, "prompt and prompt_embeds"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**{**arguments, "mask_image": mask, **conflict})


def test_images_of_one_prompt_are_adjacent(pipe):
    pipe.set_adapters("depth")
    image, prompts = inputs_for("depth", count=2)["image"], ["a red ball", "a blue box"]
    images = run(pipe, image=image, prompt=prompts, num_images_per_prompt=2, seed=5)
    for row in range(4):
        alone = run(pipe, image=image[row // 2], prompt=prompts[row // 2], seed=5 + row)
        torch.testing.assert_close(images[row : row + 1], alone, rtol=0, atol=1e-5)


def test_generators_draw_the_noise_of_stock_pipelines(pipe):
    stock: Any = StableDiffusionPipeline(**{k: v for k, v in pipe.components.items() if k != "tiny_vae"}, **BLANK)
    stock.set_progress_bar_config(disable=True)
    options = {"prompt": ["a red ball"] * 2, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    reused = [seeded(4), seeded(9)]
    for generators in ([seeded(1), seeded(1)], [reused, [seeded(4), seeded(9)]]):
        ours, theirs = (p(**options, generator=g).images for p, g in zip((pipe, stock), generators, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    noise = randn(1, 4, 8, 8, seed=7)
    assert torch.equal(run(pipe, latents=noise), run(pipe, seed=7))  # the noise of seed 7
    pipe.set_adapters("upscale")
    tiled = [run(pipe, image=rand(1, 3, 9, 21), tile=8, steps=1, generator=seeded(k)) for k in (3, 3, 4)]
    assert torch.equal(tiled[0], tiled[1]) and not torch.equal(tiled[0], tiled[2])


@pytest.mark.parametrize("backbone", [tiny_backbone, tiny_flux])
def test_prompt_embeddings_replace_prompts_and_text_encoders(backbone):
    parts = vars(backbone().freeze())
    full: Any = CoDiPipeline(**parts)
    text = {k: v for k, v in parts.items() if "text" in k or "tokenizer" in k}
    encoder = CoDiPipeline(vae=None, scheduler=None, **text)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = dict(zip(names, encoder.encode_prompt("a red ball", negative_prompt="blue"), strict=False))
    textless: Any = CoDiPipeline(**{**parts, **dict.fromkeys(text)})
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "height": 16, "width": 16}
    for pipe in (full, textless):
        pipe.set_progress_bar_config(disable=True)
    expected = full(prompt="a red ball", negative_prompt="blue", **options).images
    torch.testing.assert_close(textless(**embeddings, **options).images, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="prompt_embeds: missing, and this pipeline has no text encoder"):
        textless(prompt="a red ball", **options)
    with pytest.raises(UserError, match="this model reads"):
        full(**{**embeddings, "prompt_embeds": torch.zeros(1, 4, 5)}, **options)


def test_lists_of_any_image_type_and_8_bit_pixels_are_accepted(pipe):
    pipe.set_adapters("inpaint")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    masks = [Image.fromarray((hole(16, 24)[0, 0].numpy() * 255).astype(np.uint8))] * 2
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = run(pipe, image=tensor.float() / 255, mask=hole(16, 24), prompt=["a", "b"], steps=1)
    for images in (tensor, list(tensor), list(pixels), [Image.fromarray(one) for one in pixels], list(tensor.split(1))):
        output = run(pipe, image=images, mask=masks, prompt=["a", "b"], steps=1)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_each_prompt_may_have_its_negative_prompt(pipe):
    pipe.set_adapters("depth")
    options = {"image": inputs_for("depth")["image"], "guidance_scale": 3.0}
    both = run(pipe, **options, negative_prompt=["blue", "green"], seed=[1, 1])
    for row, negative in enumerate(["blue", "green"]):
        alone = run(pipe, **options, negative_prompt=negative, seed=1)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": []}, "image: an empty list"),
        ({"steps": 1.5}, "steps 1.5: not a whole number"),
        ({"steps": "4"}, "steps '4': not a whole number"),
        ({"steps": True}, "steps True: not a whole number"),
        ({"steps": None, "num_inference_steps": True}, "steps True: not a whole number"),
        ({"seed": 2**64}, r"seed 18446744073709551616: not of 64 bits: use -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": -(2**63) - 1}, "seed -9223372036854775809: not of 64 bits"),
        ({"seed": True}, "seed True: not a whole number"),
        ({"seed": [1, False]}, r"seed \[1, False\]: not a whole number"),
        ({"seed": []}, "seed: an empty list"),
        ({"prompt": "a" * 200_000}, "prompt of 200000 letters"),
        ({"negative_prompt": "a" * 200_000}, "negative_prompt of 200000 letters"),
        ({"prompt": "a \udc80 ball"}, "is half a character"),
        ({"prompt": []}, "prompt: an empty list"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"batch_size": 0.5}, "batch_size 0.5: not a whole number"),
        ({"generator": 3}, "generator: int is no torch.Generator"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "latents of shape"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents: holds NaN"),
        ({"latents": torch.zeros(1, 4, 8, 8, device="meta")}, "latents: a meta tensor"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "latents: a torch.int64 tensor"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 4, 8), torch.inf)}, "prompt_embeds: holds NaN or infinite"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 4, 8)}, r"prompt_embeds: .* of shape \(0, 4, 8\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 8).long()}, "prompt_embeds: a torch.int64 tensor"),
        ({"negative_prompt_embeds": torch.zeros(1, 4, 8).to_sparse()}, "negative_prompt_embeds: .*: pass a dense one"),
        ({"image": torch.rand(1, 3, 8, 8).to_sparse()}, "image: a sparse tensor"),
        ({"image": torch.rand(1, 3, 8, 8, device="meta")}, "image: a meta tensor"),
        ({"strength": "1"}, "strength '1'"),
        ({"guidance_scale": "7"}, "guidance_scale '7'"),
        ({"guidance_scale": True}, "guidance_scale True"),
        ({"embedded_guidance": "7"}, "embedded_guidance '7'"),
        ({"output_type": np.zeros(3)}, "output_type array"),
        ({"colour": torch.zeros(3)}, "colour tensor.*: unknown correction"),
        ({"tile": 1.5}, "tile 1.5: not a whole number"),
        ({"height": 16.0}, "height 16.0: not a whole number"),
        ({"height": 18}, "not multiples of 4 px"),
        ({"width": 2**70}, "width 1180591620717411303424: out of range"),
        ({"pooled_prompt_embeds": torch.zeros(1, 8)}, "without prompt_embeds"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "cross_attention_kwargs 'gligen'"),
        ({"cross_attention_kwargs": {"scale": "a"}}, "cross_attention_kwargs: scale 'a': not a number"),
        ({"joint_attention_kwargs": {"scale": None}}, "joint_attention_kwargs: scale None: not a number"),
        ({"joint_attention_kwargs": "scale"}, "joint_attention_kwargs: str is no dict"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: int is no function"),
        ({"callback_on_step_end": lambda *_: 3}, "callback_on_step_end: returned int: return a dict"),
        ({"callback_on_step_end": lambda *_: {"latents": 3}}, r"no tensor of \(1, 4, 8, 8\)"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"no tensor of \(1, 4, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": 3}, "callback_on_step_end_tensor_inputs 3: not known"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "'prompt_embeds': not known"),
        ({"callback_on_step_end": SDCFGCutoffCallback()}, "'prompt_embeds': not known: pass a list of latents"),
        ({"eta": 0.3}, "eta 0.3: not taken here: leave it out"),
        ({"clip_skip": 1}, "clip_skip 1: not taken here"),
        ({"timesteps": [999, 500]}, r"timesteps \[999, 500\]: not taken here: .* use num_inference_steps"),
        ({"sigmas": torch.ones(2)}, "sigmas: not taken here: .* use num_inference_steps"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale 4.0: not taken here: use guidance_scale"),
        ({"max_sequence_length": 512}, "max_sequence_length 512: not taken here"),
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, "ip_adapter_image: not taken here: .* use image"),
        ({"controlnet_conditioning_scale": 0.5}, "use strength"),
        ({"promt": "a"}, r"promt: no argument of a call \(did you mean 'prompt'\?\)"),
    ],
)  # fmt: skip
def test_invalid_call_arguments_are_refused(pipe, arguments, message):
    pipe.set_adapters("edit" if "image" in arguments else [])
    with pytest.raises(UserError, match=message):
        run(pipe, **arguments)


@pytest.mark.parametrize("task", ["depth", "edit"])  # classifier-free guidance, and distilled guidance
def test_empty_negative_prompts_change_nothing(pipe, task):
    pipe.set_adapters(task)
    options = {**inputs_for(task, count=2), "guidance_scale": 3.0}
    expected = run(pipe, **options)
    for empty in (["", ""], [""], ("", ""), None):
        assert torch.equal(run(pipe, **options, negative_prompt=empty), expected)
    if task == "edit":
        with pytest.raises(UserError, match="^negative_prompt: this adapter has distilled guidance"):
            run(pipe, **options, negative_prompt=["", "blue"])


def test_empty_prompts_beside_embeddings_change_nothing(pipe):
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeddings = dict(zip(names, pipe.encode_prompt(["a red ball"] * 2), strict=False))
    options = {**embeddings, "guidance_scale": 3.0, "prompt": None}
    expected = run(pipe, **options)
    assert torch.equal(run(pipe, **{**options, "prompt": ["", ""]}, negative_prompt=["", ""]), expected)
    with pytest.raises(UserError, match="negative_prompt and negative_prompt_embeds: both"):
        run(pipe, **options, negative_prompt=["", "blue"])


def test_neutral_arguments_of_stock_pipelines_change_nothing(pipe):
    expected = run(pipe)
    unset = dict.fromkeys(("clip_skip", "ip_adapter_image", "ip_adapter_image_embeds", "timesteps", "sigmas"))
    assert torch.equal(run(pipe, eta=0.0, guidance_rescale=0, true_cfg_scale=1.0, prompt_2=None, **unset), expected)
    assert torch.equal(run(pipe, max_sequence_length=pipe.tokenizer.model_max_length), expected)
    callback_names: list[list[str]] = []
    run(pipe, callback_on_step_end=lambda *a: callback_names.append([*a[3]]), callback_on_step_end_tensor_inputs=None)
    assert callback_names == [["latents"]] * 2
    flux: Any = CoDiPipeline(**vars(tiny_flux().freeze()))
    flux.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 16, "prompt": "a red ball", "steps": 1, "output_type": "pt"}
    neutral = {"max_sequence_length": 512, "negative_prompt_2": None, "negative_ip_adapter_image": None}
    assert torch.equal(flux(**options, **neutral).images, flux(**options).images)
    with pytest.raises(UserError, match="^eta: no argument of a call"):
        flux(**options, eta=0.0)


def test_seeds_wrap_around_at_64_bits(pipe):
    last = 2**64 - 1
    two = run(pipe, seed=last, num_images_per_prompt=2)
    expected = torch.cat([run(pipe, seed=seed) for seed in (last, 0)])
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-5)
    assert torch.equal(run(pipe, seed=-1), expected[:1])  # torch takes -1 as 2**64 - 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("guidance", value) for value in ({"text": "strong"}, {"text": [5, 1]}, [1, 5], {"text": [1, float("nan")]})),
        *(("sampler", value) for value in ("leapfrog", 3, ["map"])),
    ],
)
def test_adapter_with_an_invalid_config_is_refused(folder, tmp_path, key, value):
    (tmp_path / "edit").mkdir()
    for file in (folder / "edit").iterdir():
        (tmp_path / "edit" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "edit" / "config.json").read_text())
    config["info"][key] = value
    (tmp_path / "edit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json"):
        CoDiPipeline.from_pretrained(folder / "model", adapter=tmp_path / "edit")


# ---- callbacks and schedulers


def test_a_callback_stops_and_changes_guidance(pipe):
    pipe.set_adapters("depth")
    steps_done: list[int] = []

    def stop(pipeline, step, t, tensors):
        steps_done.append(step)
        pipeline._interrupt = step == 1
        return tensors

    run(pipe, **inputs_for("depth"), steps=4, callback_on_step_end=stop)
    assert (steps_done, pipe.interrupt) == ([0, 1], True)

    def drop(pipeline, step, t, tensors):
        pipeline._guidance_scale = 1.0

    options = {**inputs_for("depth"), "steps": 3}
    changed = run(pipe, **options, guidance_scale=3.0, callback_on_step_end=drop)
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (1.0, 3, False)
    assert not torch.equal(changed, run(pipe, **options, guidance_scale=3.0))
    assert not torch.equal(changed, run(pipe, **options))


def test_replaced_scheduler_is_used_or_warned_about(folder, monkeypatch):
    pipe = open_with_adapter(folder, "depth")
    options = {**inputs_for("depth"), "steps": 4}
    default = run(pipe, **options)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.allclose(run(pipe, **options), default, atol=1e-3)
    monkeypatch.setitem(pipe.adapter.config["info"], "jumps", True)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="scheduler EulerDiscreteScheduler: has no effect"):
        run(pipe, **options)


# ---- parts and folders


def test_from_pipe_keeps_adapters_and_shares_everything(folder):
    pipe = open_with_adapter(folder, "depth")
    pipe.set_adapters("depth", 0.5)
    copied = CoDiPipeline.from_pipe(pipe)
    copied.set_progress_bar_config(disable=True)
    assert copied.unet is pipe.unet and copied.get_active_adapters() == ["depth"]
    assert torch.equal(run(copied, **inputs_for("depth")), run(pipe, **inputs_for("depth")))
    stock = StableDiffusionPipeline.from_pipe(pipe, **BLANK)
    bare = CoDiPipeline.from_pipe(stock)
    assert bare.unet is pipe.unet and bare.adapters == [] and not hasattr(bare, "transformer")


def test_diffusers_opens_a_saved_pipeline_with_its_adapters(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    pipe = open_with_adapter(folder, "depth")
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):  # rather than the backbone without its adapters
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, CoDiPipeline) and list(again.tasks) == ["depth"]
    assert torch.equal(run(again, **inputs_for("depth")), run(pipe, **inputs_for("depth")))
    CoDiPipeline.from_pretrained(folder / "model").save_pretrained(tmp_path / "bare")
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "bare"), StableDiffusionPipeline)
    with pytest.raises(UserError, match="safe_serialization=False would pickle"):
        pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()


def test_options_of_from_pretrained(folder):
    model, euler = folder / "model", EulerDiscreteScheduler()
    pipe = CoDiPipeline.from_pretrained(
        model, text_encoder=None, scheduler=euler, safety_checker=None, use_safetensors=True, device_map="cpu",
        low_cpu_mem_usage=True, dtype={"unet": torch.bfloat16, "default": torch.float32},
    )  # fmt: skip
    assert pipe.text_encoder is None and pipe.scheduler is euler and pipe.hf_device_map == "cpu"
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    options: Any
    for options, message in (({"varient": "fp16"}, "did you mean 'variant'"), ({"use_safetensors": False}, "pickled")):
        with pytest.raises(UserError, match=message):
            CoDiPipeline.from_pretrained(model, **options)


# ---- hooks, with the CPU as the accelerator


@pytest.mark.parametrize("task", ["depth", "upscale"])
def test_offloading_models_and_groups_changes_nothing(folder, task):
    expected = run(open_with_adapter(folder, task), **inputs_for(task))
    pipe = open_with_adapter(folder, task)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(run(pipe, **inputs_for(task)), expected, rtol=0, atol=1e-5)
    pipe.load_adapter(folder / "canny")
    assert not hasattr(pipe._store.loaded["canny"].network, "_hf_hook")
    grouped = open_with_adapter(folder, task)
    grouped.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(grouped, **inputs_for(task)), expected)


def test_sequential_offload_covers_adapters(folder):
    """Sampling in this state needs a GPU: accelerate does not put layers back on the CPU."""
    pipe = open_with_adapter(folder, "depth")
    expected = run(pipe, **inputs_for("depth"))
    for _ in range(2):
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert pipe.unet.device.type == pipe.student.network.device.type == "meta"
        assert pipe.student.adapter.device.type == "cpu"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="^canny: the pipeline is offloaded: load and set adapters first"):
        pipe.load_adapter(folder / "canny")
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe, **inputs_for("depth")), expected)


def test_slicing_and_freeu_apply_to_adapters(folder):
    pipe = open_with_adapter(folder, "depth")
    image = inputs_for("depth", count=2)["image"]
    expected = run(pipe, image=image)
    pipe.enable_vae_slicing()
    pipe.enable_attention_slicing(1)
    torch.testing.assert_close(run(pipe, image=image), expected, rtol=0, atol=1e-4)
    pipe.disable_vae_slicing()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.allclose(run(pipe, image=image), expected, atol=1e-3)
    pipe.disable_freeu()
    torch.testing.assert_close(run(pipe, image=image), expected, rtol=0, atol=1e-4)


def test_transformer_caches_are_reset_at_each_call():
    pipe: Any = CoDiPipeline(**vars(tiny_flux().freeze()))
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a red ball", "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "pt"}
    uncached = pipe(**options).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.8))
    cached = pipe(**options).images
    assert not torch.equal(cached, uncached) and torch.equal(pipe(**options).images, cached)
    pipe.transformer.disable_cache()
    assert torch.equal(pipe(**options).images, uncached)


# ---- LoRAs of other programs


def test_loras_work_with_adapters_and_unload_completely(folder, tmp_path):
    pipe = open_with_adapter(folder, "depth")
    plain, backbone = run(pipe, **inputs_for("depth")), run(pipe, **inputs_for("depth"), strength=0)
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    assert pipe.get_active_adapters() == ["depth", "style"]
    styled = run(pipe, **inputs_for("depth"))
    assert not torch.allclose(styled, plain, atol=1e-3)
    assert not torch.allclose(run(pipe, **inputs_for("depth"), strength=0), backbone, atol=1e-3)
    pipe.set_adapters(["depth", "style"], [1.0, 0.0])
    torch.testing.assert_close(run(pipe, **inputs_for("depth")), plain, rtol=0, atol=1e-5)
    pipe.set_adapters("style")
    assert torch.equal(run(pipe, **inputs_for("depth")), styled)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, **inputs_for("depth")), plain) and pipe.get_active_adapters() == ["depth"]
    with pytest.raises(UserError, match="not a LoRA for this model"):
        pipe.load_lora_weights(str(folder / "model"))
    with pytest.raises(UserError, match="'depth': is taken"):
        pipe.load_lora_weights(str(tmp_path / "lora"), adapter_name="depth")


def lora_file(folder: Path, seed: int = 3) -> str:
    """Write a LoRA for the tiny U-Net."""
    folder.mkdir()
    save_lora(tiny_lora(tiny_unet(), "x", seed), folder, "x")
    return str(folder)


def test_saving_omits_loras_with_a_warning(folder, tmp_path):
    pipe = open_with_adapter(folder, "depth")
    plain = run(pipe, **inputs_for("depth"))
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    styled = run(pipe, **inputs_for("depth"))
    with pytest.warns(UserWarning, match="the LoRA style is not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(CoDiPipeline.from_pretrained(tmp_path / "saved"), **inputs_for("depth")), plain)
    assert torch.equal(run(pipe, **inputs_for("depth")), styled) and pipe.get_active_adapters() == ["depth", "style"]


def test_adapters_survive_lora_changes_after_their_folder_is_deleted(folder, tmp_path):
    shutil.copytree(folder / "generate", tmp_path / "generate")
    pipe = open_with_adapter(folder, "depth")
    pipe.load_adapter(tmp_path / "generate")
    pipe.set_adapters("generate")
    plain = run(pipe)
    shutil.rmtree(tmp_path / "generate")
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    pipe.set_adapters(["style"], 0.7)
    assert not torch.allclose(run(pipe), plain, atol=1e-3) and pipe.adapters == ["depth", "generate"]
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), plain)


def test_lora_scale_does_not_affect_adapters(folder, tmp_path):
    pipe = open_with_adapter(folder, "generate")
    plain = run(pipe)
    assert not torch.allclose(plain, run(pipe, strength=0), atol=1e-3)
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    styled, halved = run(pipe), run(pipe, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(run(pipe, cross_attention_kwargs={"scale": 0}), plain, rtol=0, atol=1e-5)
    assert torch.equal(run(pipe), styled)
    pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(run(pipe), halved, rtol=0, atol=1e-5)


def test_pipelines_on_one_backbone_share_loras(folder, tmp_path):
    pipe = open_with_adapter(folder, "generate")
    plain = run(pipe)
    other = CoDiPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    styled = run(pipe)
    assert torch.equal(run(other), styled) and other.get_active_adapters() == ["generate", "style"]
    other.unload_lora_weights()
    assert torch.equal(run(pipe), plain) and pipe.get_active_adapters() == ["generate"]
    pipe.load_lora_weights(str(tmp_path / "lora"), adapter_name="style")
    assert torch.equal(run(other), styled)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora_file(tmp_path / "another", seed=4), adapter_name="style")
    assert torch.equal(run(other), run(pipe)) and not torch.allclose(run(pipe), styled, atol=1e-3)


def test_loras_can_be_disabled_and_enabled(folder, tmp_path):
    pipe = open_with_adapter(folder, "generate")
    plain = run(pipe)
    pipe.load_lora_weights(lora_file(tmp_path / "lora"), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    styled = run(pipe)
    pipe.disable_lora()
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)
    assert pipe.get_active_adapters() == ["generate"]
    pipe.enable_lora()
    assert torch.equal(run(pipe), styled)
    pipe.set_adapters([])
    assert pipe.get_active_adapters() == []
    for names, weights in ((["style", "style"], None), ("style", float("nan"))):
        with pytest.raises(UserError, match="weights"):
            pipe.set_adapters(names, weights)
