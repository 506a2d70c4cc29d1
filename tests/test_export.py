"""Export: other programs produce codi's images from an exported adapter."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

import codi
from codi.errors import UserError
from codi.export import comfyui
from codi.export import onnx as export_to_onnx
from codi.export.comfyui import Graph
from codi.export.diffusers import export_diffusers, make_scheduler
from codi.export.ldm import export_ldm, rename
from codi.export.onnx import export_onnx
from codi.export.source import load_source
from codi.models import codec
from codi.models.adapter import FORMS, ControlNetAdapter
from codi.models.student import Conditioning, Student
from codi.models.text import tokenize
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.sampler import initial_noise, sample, time_grid
from codi.tasks import get_task
from codi.training.saving import save_adapter
from tiny import influence, rand, randn, tiny_backbone, tiny_checkpoint, tiny_lora, tiny_scheduler, tiny_xl

TOLERANCE = 1e-5  # of images in [0, 1], float32; 1e-6 measured


def make(
    folder: Path,
    form: str,
    task: str = "canny",
    lora: bool = False,
    full: bool = False,
    downscale: int = 4,
    half: bool = False,
    **info: Any,
) -> Path:
    """Save an adapter of `tiny_checkpoint` with all weights nonzero, as after training."""
    backbone, task_object = tiny_backbone(), get_task(task)
    scales = len(info.get("guidance", ()))
    targeted = info.get("sampler", "ddim") != "ddim"
    adapter = FORMS[form].from_backbone(backbone.unet, backbone.vae, task_object.condition_channels, scales, targeted)
    if downscale != 4:
        adapter = ControlNetAdapter(
            dict(adapter.config["network"]), task_object.condition_channels, downscale, scales, targeted
        )
    student = Student(backbone.unet, adapter)
    if form != "lora":
        influence(student)
    with torch.no_grad():
        for i, part in enumerate((adapter.guidance, adapter.jump)):
            if part is not None:
                part.projection.weight.copy_(0.3 * randn(*part.projection.weight.shape, seed=40 + i))
        if full:
            for i, p in enumerate(backbone.unet.parameters()):
                p.add_(0.05 * randn(*p.shape, seed=i))
    unet = tiny_lora(backbone.unet, task) if lora else backbone.unet
    base_info = {"task": task, "task_options": task_object.config(), "family": backbone.family, "full": full}
    adapter.register_to_config(info={**base_info, **info})
    save_adapter(folder, adapter, unet, full, half)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipe(model):
    """A pipeline without adapters."""
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipe: CoDiPipeline, adapter: Path, prompt: Any = "a red ball", steps: int = 4, **inputs: Any) -> Tensor:
    """Return codi's image for seed 0."""
    pipe.set_adapters(pipe.load_adapter(adapter, as_=str(len(pipe.adapters))))
    return pipe(prompt=prompt, steps=steps, output_type="pt", **inputs).images  # type: ignore[union-attr]


def theirs(folder: Path, condition: Tensor | None) -> Tensor:
    """Return the image that the code of the model card makes."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    lines = code[1].replace('folder = "."', f"folder = {str(folder)!r}").replace("condition = ...", "")
    lines = lines.replace(").images[0]", ", output_type='pt').images")
    names: dict[str, Any] = {"condition": condition}
    exec(lines, names)
    return names["picture"]


GUIDED = {"guidance": {"text": [1, 5]}, "guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("form", "options", "scheduler"),
    [
        ("controlnet", {}, "DDIMScheduler"),
        ("controlnet", {"shift": 3.0}, "DPMSolverMultistepScheduler"),
        ("controlnet", {"lora": True}, "DDIMScheduler"),
        ("controlnet", {"lora": True, **GUIDED}, "DDIMScheduler"),
        ("controlnet", {"full": True, **GUIDED, "shift": 3.0}, "DPMSolverMultistepScheduler"),
        ("controlnet", {"sampler": "renoise", "shift": 3.0}, "LCMScheduler"),
        ("controlnet", {"lora": True, "sampler": "map", **GUIDED}, "DDIMScheduler"),
        ("controlnet", {"full": True, "sampler": "map", "shift": 3.0}, "DPMSolverMultistepScheduler"),
        ("lora", {"task": "generate", "lora": True, "sampler": "map"}, "DDIMScheduler"),
        ("controlnet", {"guidance_scale": 2.0}, "DDIMScheduler"),
        ("controlnet", {"task": "inpaint"}, "DDIMScheduler"),
        ("lora", {"task": "generate", "lora": True, **GUIDED}, "DDIMScheduler"),
        ("lora", {"task": "generate", "lora": True, "sampler": "renoise", **GUIDED}, "LCMScheduler"),
        ("lora", {"task": "generate", "full": True, "guidance": {"text": [1, 5]}}, "DDIMScheduler"),
    ],
)
def test_stock_diffusers_makes_the_same_image(tmp_path, model, pipe, form, options, scheduler):
    adapter = make(tmp_path / "adapter", form, **options)
    source = load_source(adapter, model)
    assert export_diffusers(source, tmp_path / "out", steps=4)["scheduler"] == scheduler
    inputs, condition = {}, None
    if form != "lora":
        inputs = {"image": rand(1, source.adapter.config["condition_channels"], 32, 32, seed=3)}
        condition = source.task.condition(source.task.bring(inputs["image"]))
    image, stock_image = ours(pipe, adapter, **inputs), theirs(tmp_path / "out", condition)
    if inputs and source.task.takes_mask:  # our pipeline restores the known pixels
        stock_image = source.task.finish(stock_image, source.task.bring(inputs["image"]))
    print((image - stock_image).abs().max())
    assert (image - stock_image).abs().max() < TOLERANCE
    assert image.std() > 0.01


def test_export_for_xl_names_its_pipeline(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    backbone = tiny_xl()
    backbone.pipeline().save_pretrained(model)
    xl_adapter = FORMS["controlnet"].from_backbone(backbone.unet, backbone.vae, 3, 0, False)
    influence(Student(backbone.unet, xl_adapter))
    task = get_task("canny")
    xl_adapter.register_to_config(info={"task": "canny", "task_options": task.config(), "family": backbone.family})
    save_adapter(adapter, xl_adapter, backbone.unet, False, half=False)
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    export_diffusers(load_source(adapter, model), tmp_path / "out", steps=4)
    image = rand(1, 3, 32, 32, seed=3)
    codi_image, stock_image = (
        ours(pipe, adapter, image=image),
        theirs(tmp_path / "out", task.condition(task.bring(image))),
    )
    assert (codi_image - stock_image).abs().max() < TOLERANCE and codi_image.std() > 0.01


def test_adapter_trained_with_loras_needs_them_at_export(tmp_path, model):
    recipe = {"loras": {"style.safetensors": 0.5}}
    adapter = make(tmp_path / "adapter", "controlnet", recipe=recipe)
    with pytest.raises(UserError, match=r"name them: --lora style.safetensors=0.5"):
        load_source(adapter, model)
    assert load_source(make(tmp_path / "full", "controlnet", full=True, recipe=recipe), model).loaded.full


@pytest.mark.parametrize("form", ["fused", "hint"])
@pytest.mark.parametrize("export", [export_diffusers, export_ldm])
def test_forms_without_a_stock_equivalent_are_refused(tmp_path, model, form, export):
    source = load_source(make(tmp_path / "adapter", form), model)
    with pytest.raises(UserError, match="has no place: train with `adapter: controlnet`, or export --to onnx"):
        export(source, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_diffusers, export_ldm])
def test_samplers_without_a_stock_equivalent_are_refused(tmp_path, model, export):
    source = load_source(make(tmp_path / "adapter", "controlnet", boundary=True), model)
    with pytest.raises(UserError, match="boundary scaling"):
        export(source, tmp_path / "out", 4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exported_schedulers_start_at_pure_noise_for_zero_terminal_snr(tmp_path, model, shift):
    source = load_source(make(tmp_path / "adapter", "controlnet", shift=shift), model)
    source.backbone.scheduler = tiny_scheduler(rescale_betas_zero_snr=True)
    student, text = Student(source.loaded.network, source.adapter), randn(1, 5, 8, seed=1)
    conditioning, noise = Conditioning(text, rand(1, 3, 32, 32)), randn(1, 4, 8, 8, seed=2)
    scheduler, call = make_scheduler(source, 4)
    scheduler.set_timesteps(**{key: value for key, value in call.items() if key != "guidance_scale"})
    z = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(student(z, t[None], conditioning), t, z, return_dict=False)[0]
    grid = time_grid(source.backbone.schedule.horizon, 4, shift)
    assert (z - sample(student, source.backbone.schedule, noise, conditioning, 4, grid=grid)).abs().max() < TOLERANCE


def test_guidance_as_a_low_rank_update_is_accurate_at_every_noise_level():
    """At the width of the embedded model; Stable Diffusion is five times wider and more accurate."""
    source = load_source("generate", "mini")
    unet, extra = source.backbone.unet, source.time_conditions(steps=4)[0]
    weights = source.updates(steps=4)
    levels = torch.arange(1000)
    features = unet.get_time_embed(sample=torch.zeros(1000, 1), timestep=levels)
    constant = features @ weights["time_embedding.linear_1.lora_A.weight"].T
    added = constant @ weights["time_embedding.linear_1.lora_B.weight"].T
    expected = unet.time_embedding.linear_1.weight @ extra
    assert (added - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len({len(value) for key, value in weights.items() if ".lora_A." in key}) == 1  # one rank, so one scale


# --- LDM -------------------------------------------------------------------------------------------------------------


def stable_diffusion(control: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the U-Net of v1-inference.yaml, or of the ControlNet of cldm_v15.yaml.

    They follow the constructor of the original code: model_channels 320, channel_mult 1 2 4 4, num_res_blocks 2,
    attention at the first three levels, context_dim 768.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def resnet(name: str, in_width: int, out_width: int) -> None:
        layer(f"{name}.in_layers.0", in_width)
        layer(f"{name}.in_layers.2", out_width, in_width, 3, 3)
        layer(f"{name}.emb_layers.1", out_width, 1280)
        layer(f"{name}.out_layers.0", out_width)
        layer(f"{name}.out_layers.3", out_width, out_width, 3, 3)
        if in_width != out_width:
            layer(f"{name}.skip_connection", out_width, in_width, 1, 1)

    def transformer(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, 1, 1)
        layer(f"{name}.proj_out", width, width, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for i, context in ((1, width), (2, 768)):
            layer(f"{inner}.attn{i}.to_q", width, width, bias=False)
            layer(f"{inner}.attn{i}.to_k", width, context, bias=False)
            layer(f"{inner}.attn{i}.to_v", width, context, bias=False)
            layer(f"{inner}.attn{i}.to_out.0", width, width)
        layer(f"{inner}.ff.net.0.proj", 8 * width, width)
        layer(f"{inner}.ff.net.2", width, 4 * width)
        for i in (1, 2, 3):
            layer(f"{inner}.norm{i}", width)

    layer("time_embed.0", 1280, 320)
    layer("time_embed.2", 1280, 1280)
    layer("input_blocks.0.0", 320, 4, 3, 3)
    width, skips, block = 320, [320], 1
    for level, out_width in enumerate((320, 640, 1280, 1280)):
        for _ in range(2):
            resnet(f"input_blocks.{block}.0", width, out_width)
            if level < 3:
                transformer(f"input_blocks.{block}.1", out_width)
            width, block = out_width, block + 1
            skips.append(width)
        if level < 3:
            layer(f"input_blocks.{block}.0.op", width, width, 3, 3)
            skips.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width)
    resnet("middle_block.2", width, width)
    if control:
        for i, feature in enumerate(skips):
            layer(f"zero_convs.{i}.0", feature, feature, 1, 1)
        layer("middle_block_out.0", width, width, 1, 1)
        hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
        for i in range(8):
            layer(f"input_hint_block.{2 * i}", hint[i + 1], hint[i], 3, 3)
        return shapes
    block = 0
    for level, out_width in ((3, 1280), (2, 1280), (1, 640), (0, 320)):
        for i in range(3):
            resnet(f"output_blocks.{block}.0", width + skips.pop(), out_width)
            if level < 3:
                transformer(f"output_blocks.{block}.1", out_width)
            if level and i == 2:
                layer(f"output_blocks.{block}.{2 if level < 3 else 1}.conv", out_width, out_width, 3, 3)
            width, block = out_width, block + 1
    layer("out.0", 320)
    layer("out.2", 4, 320, 3, 3)
    return shapes


@pytest.mark.parametrize(("control", "count"), [(False, 686), (True, 340)])
def test_renamed_weights_match_the_published_names_and_shapes(control, count):
    with torch.device("meta"):
        built = ControlNetModel(cross_attention_dim=768) if control else UNet2DConditionModel(cross_attention_dim=768)
    renamed = rename(built.state_dict(), built.config, "p.")
    expected = stable_diffusion(control)
    assert len(expected) == count
    assert {key.removeprefix("p."): tuple(value.shape) for key, value in renamed.items()} == expected


def test_diffusers_loads_exported_ldm_files(tmp_path, model):
    adapter = make(tmp_path / "adapter", "controlnet", full=True, downscale=8, **GUIDED)
    source = load_source(adapter, model)
    out = tmp_path / "out.safetensors"
    returned = export_ldm(source, out, steps=4)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"out.safetensors", "out-unet.safetensors"}
    with safe_open(out, "pt") as file:
        metadata = json.loads(file.metadata()["codi"])
    assert (
        metadata == returned
        and metadata["timesteps"] == [999, 749, 499, 249]
        and metadata["prediction"] == "v_prediction"
    )
    net, unet = source.control.net, source.full_network(4)
    for exported, path in ((net, out), (unet, tmp_path / "out-unet.safetensors")):
        exported.save_config(tmp_path / type(exported).__name__)
        loaded = type(exported).from_single_file(str(path), config=str(tmp_path / type(exported).__name__))
        state, loaded_state = exported.state_dict(), loaded.state_dict()
        assert state.keys() == loaded_state.keys() and all(torch.equal(state[key], loaded_state[key]) for key in state)


def test_stock_pipeline_loads_low_rank_updates_with_kohya_names(tmp_path, model, pipe):
    adapter = make(tmp_path / "adapter", "lora", "generate", lora=True, **GUIDED)
    export_ldm(load_source(adapter, model), tmp_path / "out.safetensors", steps=4)
    stock = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    stock.load_lora_weights(tmp_path, weight_name="out.safetensors")
    options: Any = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    stock_image = stock("a red ball", generator=torch.manual_seed(0), **options).images
    assert (ours(pipe, adapter) - stock_image).abs().max() < TOLERANCE


@pytest.mark.parametrize("half", [True, False])
def test_diffusers_files_keep_the_precision_of_the_adapter(tmp_path, model, half):
    """Each file keeps its own precision unless `dtype` is passed; the loaded adapter is unchanged."""
    stored = torch.float16 if half else torch.float32
    for name, options in {"full": {"full": True}, "lora": {"lora": True}}.items():
        adapter = make(tmp_path / name, "controlnet", downscale=8, half=half, **options)
        source = load_source(adapter, model)
        for dtype in (None, torch.bfloat16):
            out = tmp_path / f"{name}-{dtype}"
            export_diffusers(source, out, 4, dtype)
            files = list(out.rglob("*.safetensors"))
            assert len(files) == 2
            for file in files:
                assert {v.dtype for v in load_file(file).values()} == {dtype or stored}, file
        assert source.control is not None
        assert {v.dtype for v in source.control.net.parameters()} == {torch.float32}


@pytest.mark.parametrize("half", [True, False])
def test_ldm_files_keep_the_precision_of_the_adapter(tmp_path, model, half):
    """Each file keeps its own precision unless `dtype` is passed."""
    stored = torch.float16 if half else torch.float32
    for name, options in {"full": {"full": True}, "lora": {"lora": True}}.items():
        adapter = make(tmp_path / name, "controlnet", downscale=8, half=half, **options, **GUIDED)
        source, out = load_source(adapter, model), tmp_path / f"{name}.safetensors"
        export_ldm(source, out, steps=4)
        converted = tmp_path / f"{name}-bf16.safetensors"
        export_ldm(source, converted, 4, torch.bfloat16)
        kind = "unet" if name == "full" else "lora"
        for path, expected in ((out, stored), (converted, torch.bfloat16)):
            for file in (path, path.with_name(f"{path.stem}-{kind}.safetensors")):
                kinds = {v.dtype for key, v in load_file(file).items() if not key.endswith(".alpha")}
                assert kinds == {expected}, file


# ComfyUI's nodes and their required inputs, from its code and published workflows.
COMFYUI = {
    "CheckpointLoaderSimple": {"ckpt_name"},
    "UNETLoader": {"unet_name", "weight_dtype"},
    "LoraLoaderModelOnly": {"model", "lora_name", "strength_model"},
    "ModelSamplingDiscrete": {"model", "sampling", "zsnr"},
    "CLIPTextEncode": {"text", "clip"},
    "CLIPTextEncodeSDXL": {
        "clip", "width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l",
    },
    "ConditioningZeroOut": {"conditioning"},
    "LoadImage": {"image"},
    "ImageScale": {"image", "upscale_method", "width", "height", "crop"},
    "ControlNetLoader": {"control_net_name"},
    "ControlNetApplyAdvanced": {
        "positive", "negative", "control_net", "image", "strength", "start_percent", "end_percent",
    },
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "KSamplerSelect": {"sampler_name"},
    "ManualSigmas": {"sigmas"},
    "SamplerCustom": {
        "model", "add_noise", "noise_seed", "cfg", "positive", "negative", "sampler", "sigmas", "latent_image",
    },
    "VAEDecode": {"samples", "vae"},
    "SaveImage": {"images", "filename_prefix"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "options", "nodes"),
    [
        ("controlnet", {"task": "upscale", "full": True}, {"UNETLoader", "ControlNetApplyAdvanced", "ImageScale"}),
        ("controlnet", {"lora": True}, {"LoraLoaderModelOnly", "ControlNetApplyAdvanced"}),
        ("lora", {"task": "generate", "lora": True, "sampler": "renoise"}, {"LoraLoaderModelOnly"}),
    ],
)
def test_comfyui_workflow_uses_the_exported_files_and_stock_nodes(tmp_path, model, form, options, nodes):
    source = load_source(make(tmp_path / "adapter", form, downscale=8 if form == "controlnet" else 4, **options), model)
    export_ldm(source, tmp_path / "out.safetensors", 4)
    graph = json.loads((tmp_path / "out-comfyui.json").read_text())
    kinds = {node["class_type"] for node in graph.values()}
    assert nodes <= kinds and ("UNETLoader" in kinds) == bool(options.get("full"))
    files = set()
    for node in graph.values():
        assert set(node["inputs"]) == COMFYUI[node["class_type"]]
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in graph and isinstance(value[1], int)
            elif str(value).startswith("out"):
                files.add(value)
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}
    sampler = next(node["inputs"] for node in graph.values() if node["class_type"] == "KSamplerSelect")
    assert sampler == {"sampler_name": "lcm" if options.get("sampler") == "renoise" else "euler"}


def test_comfyui_workflow_of_xl_sets_the_size_and_zero_prompt(tmp_path):
    backbone = tiny_xl().freeze()
    source = SimpleNamespace(backbone=backbone)
    graph = Graph()
    assert [comfyui._prompt(graph, source, ["1", 1], text, 64) for text in ("a", "")] == [["1", 0], ["3", 0]]  # type: ignore[arg-type]
    assert [node["class_type"] for node in graph.nodes.values()] == [*["CLIPTextEncodeSDXL"] * 2, "ConditioningZeroOut"]
    assert all(set(node["inputs"]) == COMFYUI[node["class_type"]] for node in graph.nodes.values())


def test_sigmas_of_a_comfyui_workflow_make_the_same_image(tmp_path, model, pipe):
    """Uses ComfyUI's arithmetic: x = z sqrt(1 + sigma^2), Euler in sigma, the level of the nearest log sigma."""
    adapter = make(tmp_path / "adapter", "lora", "generate", lora=True, shift=3.0)
    source = load_source(adapter, model)
    export_ldm(source, tmp_path / "out.safetensors", 4)
    graph = json.loads((tmp_path / "out-comfyui.json").read_text())
    text = next(node["inputs"]["sigmas"] for node in graph.values() if node["class_type"] == "ManualSigmas")
    grid = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]  # as the node reads them
    assert len(grid) == 5 and grid[-1] == 0
    schedule: Any = source.schedule(4)
    table = (schedule.sigmas / schedule.alphas)[1:].log()
    text_features = pipe.text.encode(["a red ball"])["features"]
    x = initial_noise((4, 8, 8), [0]) * (1 + grid[0] ** 2) ** 0.5
    for now, after in itertools.pairwise(grid):
        level = (table - torch.tensor(now).log()).abs().argmin()
        with torch.no_grad():
            v = source.loaded.network(x / (1 + now**2) ** 0.5, level, text_features).sample
        clean = x / (1 + now**2) - v * now / (1 + now**2) ** 0.5  # ComfyUI's V_PREDICTION
        x = clean + (x - clean) * after / now
    image = codec.decode(source.backbone.vae, x)
    assert (image - ours(pipe, adapter)).abs().max() < 1e-4


def test_controlnet_with_another_cell_size_has_no_ldm_form(tmp_path, model):
    source = load_source(make(tmp_path / "adapter", "controlnet"), model)
    with pytest.raises(UserError, match="reads 4 px per latent cell, the original one 8: export --to diffusers"):
        export_ldm(source, tmp_path / "out.safetensors", 4)


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("fused", {"task": "upscale", "lora": True}),
        ("fused", {"task": "edit", "guidance": {"text": [1, 5], "image": [1, 2]}, "guidance_scale": 3.0}),
        ("fused", {"task": "inpaint", "sampler": "renoise", "shift": 3.0}),
        ("fused", {"task": "canny", "lora": True, "sampler": "map"}),
        ("controlnet", {"task": "depth", "boundary": True}),
        ("hint", {"task": "canny", "full": True}),
        ("hint", {"task": "upscale", "full": True, "colour": "back-projection"}),
        ("lora", {"task": "generate", "lora": True, "guidance_scale": 2.0}),
    ],
)
def test_onnxruntime_makes_the_same_images(tmp_path, model, pipe, form, options):
    adapter = make(tmp_path / "adapter", form, **options)
    source = load_source(adapter, model)
    steps = 2 if options.get("lora") or options.get("sampler") == "renoise" else 1
    config = export_onnx(source, tmp_path / "out", steps, size=(32, 24))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "config.json", "tokenizer"}
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {node.name: node.shape for node in session.get_outputs()} == {"picture": ["batch", 3, 32, 24]}
    assert {node.name: node.shape for node in session.get_inputs()} == {
        name: spec["shape"] for name, spec in config["inputs"].items()
    }
    assert session.get_modelmeta().custom_metadata_map == {
        "name": "adapter", "task": options["task"], "base": f"{model.name} ({source.backbone.family})",
        "licence": "not stated", "version": f"codi {codi.__version__}", "steps": str(steps),
    }  # fmt: skip
    prompts = ["a red ball", "", "a blue box and a green cone"]
    arguments, inputs = {}, {}
    if "image" in config["inputs"]:
        *_, h, w = config["inputs"]["image"]["shape"]
        image = rand(3, max(3, config["inputs"]["image"]["shape"][1]), h, w, seed=3)
        image = (image > 0.5).float() if options["task"] == "canny" else image
        image[:, :3] = image[:, :1] if options["task"] == "depth" else image[:, :3]
        arguments["image"], inputs["image"] = image, source.task.bring(image)
    else:
        arguments = {"height": 32, "width": 24}
    if "guidance_scale" in config["inputs"]:
        inputs["guidance_scale"] = torch.tensor([config["inputs"]["guidance_scale"]["default"]] * 3)
        inputs["guidance_scale"][1, 0] = 1
    fields = config["inputs"]["noise"]["shape"][1] // 4
    inputs["noise"] = initial_noise((4, 8, 6), [0, 1, 2], fields)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    inputs["input_ids"] = tokenize(tokenizer, prompts)
    pictures = ours(pipe, adapter, prompts, steps, **arguments)
    difference = (pictures - run_onnx(tmp_path / "out", inputs)).abs().max()
    assert difference < 1e-4 and pictures.std() > 0.01


def test_onnx_size_must_be_a_multiple_of_the_cell(tmp_path, model):
    source = load_source(make(tmp_path / "adapter", "fused"), model)
    with pytest.raises(UserError, match="size 30 x 32: .* multiples of 4 px"):
        export_onnx(source, tmp_path / "out", 1, size=(32, 30))


def test_large_onnx_models_store_weights_in_a_second_file(tmp_path, monkeypatch):
    weight = onnx.numpy_helper.from_array(np.arange(1024, dtype=np.float32), "w")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1024])
    node, output = onnx.helper.make_node("Add", ["x", "w"], ["y"]), onnx.helper.make_tensor_value_info("y", 1, [1024])
    graph = onnx.helper.make_graph([node], "g", [value], [output], [weight])
    (tmp_path / "parts").mkdir()
    config = {name: "" for name in ("name", "task", "base", "licence", "version", "steps")}
    config |= {"output": {"y": {"shape": [1024]}}}
    onnx_model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save_model(
        onnx_model, str(tmp_path / "parts" / "model.onnx"), save_as_external_data=True, all_tensors_to_one_file=False
    )
    monkeypatch.setattr(export_to_onnx, "LARGEST", 1000)
    export_to_onnx.gather(tmp_path / "parts", tmp_path / "model.onnx", config)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(1024, np.float32)})[0][-1] == 1024


def run_onnx(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Return the image that onnxruntime computes."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["picture"], {name: value.numpy() for name, value in inputs.items()})[0])


# --- the command -----------------------------------------------------------------------------------------------------


def test_export_command_lists_the_written_files(shell, tmp_path, model):
    adapter, out = make(tmp_path / "adapter", "controlnet"), tmp_path / "new" / "out"
    ran = shell("export", adapter, "--to", "diffusers", "-o", out, "--model", model, "--json")
    assert ran.code == 0, ran
    result = json.loads(ran.out)
    assert result["to"] == "diffusers" and result["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert {row["path"] for row in result["files"]} == {str(p) for p in out.rglob("*") if p.is_file()}
    shell("export", adapter, "--to", "diffusers", "-o", out, "--model", model).failed(1, str(out), "exists already")


def test_export_usage_errors_are_one_line(shell, tmp_path, model, monkeypatch):
    adapter = make(tmp_path / "adapter", "fused")
    options = ("--model", model, "-o", tmp_path / "out")
    shell("export", "nothing-there", "--to", "diffusers", *options).failed(1, "nothing-there", "no adapter there")
    shell("export", adapter, "--to", "diffusers", *options).failed(1, "FusedAdapter", "--to onnx")
    shell("export", adapter, "--to", "ldm", *options).failed(2, "writes a .safetensors file", "out.safetensors")
    shell("export", adapter, "--to", "onnx", *options, "--steps", 1, "--size", "30x32").failed(1, "size 30 x 32")
    shell("export", adapter, "--to", "ldm", *options, "--size", "32x32").failed(2, "only ONNX fixes the size")
    shell("export", adapter, "--to", "onnx", *options, "--dtype", "float16").failed(2, "--to onnx writes float32 alone")
    shell("export", adapter, "--to", "diffusers", "-o", tmp_path / "a.safetensors").failed(2, "writes a folder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shell("export", adapter, "--to", "onnx", *options).failed(
        1, "onnx: this package is missing", "pip install codi[export]"
    )
    assert not (tmp_path / "out").exists()
