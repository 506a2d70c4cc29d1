"""Export: what other programs make of an adapter is what codi makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from codi.errors import UserError
from codi.export.diffusers import export_diffusers
from codi.export.ldm import export_ldm, rename
from codi.export.source import load_source
from codi.models.adapter import FORMS, ControlNetAdapter
from codi.models.student import Student
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import get_task
from codi.training.saving import save_adapter
from tiny import influence, rand, randn, tiny_backbone, tiny_checkpoint, tiny_lora

TOLERANCE = 1e-5  # of pictures in [0, 1], float32; 1e-6 measured


def make(
    folder: Path,
    form: str,
    task: str = "canny",
    lora: bool = False,
    full: bool = False,
    downscale: int = 4,
    **info: Any,
) -> Path:
    """An adapter of `tiny_checkpoint` as training leaves one: everything in it matters."""
    backbone, made = tiny_backbone(), get_task(task)
    told = len(info.get("guidance", ()))
    jumps = info.get("jumps", False)
    adapter = FORMS[form].from_backbone(backbone.unet, backbone.vae, made.condition_channels, told, jumps)
    if downscale != 4:
        adapter = ControlNetAdapter(dict(adapter.config["unet"]), made.condition_channels, downscale, told, jumps)
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
    known = {"task": task, "task_options": made.config(), "family": backbone.family, "full": full}
    adapter.register_to_config(info={**known, **info})
    save_adapter(folder, adapter, unet, full, half=False)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipe(model):
    """The backbone, for adapters to be set on."""
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipe: CoDiPipeline, adapter: Path, **given: Any) -> Tensor:
    """The picture of seed 0 in four steps."""
    pipe.set_adapters(pipe.load_adapter(adapter, as_=str(len(pipe.adapters))))
    return pipe(prompt="a red ball", steps=4, output_type="pt", **given).images  # type: ignore[union-attr]


def theirs(folder: Path, condition: Tensor | None) -> Tensor:
    """The picture that the lines of the card make."""
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
        ("controlnet", {"jumps": True, "shift": 3.0}, "LCMScheduler"),
        ("controlnet", {"guidance_scale": 2.0}, "DDIMScheduler"),
        ("controlnet", {"task": "inpaint"}, "DDIMScheduler"),
        ("lora", {"task": "generate", "lora": True, **GUIDED}, "DDIMScheduler"),
        ("lora", {"task": "generate", "lora": True, "jumps": True, "guidance": {"text": [1, 5]}}, "LCMScheduler"),
        ("lora", {"task": "generate", "full": True, "guidance": {"text": [1, 5]}}, "DDIMScheduler"),
    ],
)
def test_stock_diffusers_makes_the_same_picture(tmp_path, model, pipe, form, options, scheduler):
    adapter = make(tmp_path / "adapter", form, **options)
    source = load_source(adapter, model)
    assert export_diffusers(source, tmp_path / "out", steps=4)["scheduler"] == scheduler
    given, condition = {}, None
    if form != "lora":
        given = {"image": rand(1, source.adapter.config["condition_channels"], 32, 32, seed=3)}
        condition = source.task.condition(source.task.bring(given["image"]))
    picture, other = ours(pipe, adapter, **given), theirs(tmp_path / "out", condition)
    if given and source.task.takes_mask:  # what our pipeline puts back after sampling
        other = source.task.finish(other, source.task.bring(given["image"]))
    print((picture - other).abs().max())
    assert (picture - other).abs().max() < TOLERANCE
    assert picture.std() > 0.01


@pytest.mark.parametrize("form", ["fused", "hint"])
@pytest.mark.parametrize("export", [export_diffusers, export_ldm])
def test_what_others_cannot_express_is_refused(tmp_path, model, form, export):
    source = load_source(make(tmp_path / "adapter", form), model)
    with pytest.raises(UserError, match="has no place: train with `adapter: controlnet`, or export --to onnx"):
        export(source, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_diffusers, export_ldm])
def test_samplers_that_others_do_not_have_are_refused(tmp_path, model, export):
    source = load_source(make(tmp_path / "adapter", "controlnet", boundary=True), model)
    with pytest.raises(UserError, match="boundary scaling"):
        export(source, tmp_path / "out", 4)


def test_guidance_as_a_low_rank_update_is_right_at_every_level():
    """At the width of the embedded model; Stable Diffusion's is five times wider, and better."""
    source = load_source("generate", "mini")
    unet, told = source.backbone.unet, source.told()
    weights = source.updates(steps=4)
    levels = torch.arange(1000)
    features = unet.get_time_embed(sample=torch.zeros(1000, 1), timestep=levels)
    constant = features @ weights["time_embedding.linear_1.lora_A.weight"].T
    added = constant @ weights["time_embedding.linear_1.lora_B.weight"].T
    wanted = unet.time_embedding.linear_1.weight @ told
    assert (added - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert len({len(value) for key, value in weights.items() if ".lora_A." in key}) == 1  # one rank, so one scale


# --- LDM -------------------------------------------------------------------------------------------------------------


def stable_diffusion(control: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of v1-inference.yaml's U-Net, or of cldm_v15.yaml's ControlNet, by the constructor of the
    original code: model_channels 320, channel_mult 1 2 4 4, num_res_blocks 2, attention at the first three levels,
    context_dim 768."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def resnet(name: str, before: int, after: int) -> None:
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", after, 1280)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

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
    width, kept, block = 320, [320], 1
    for level, after in enumerate((320, 640, 1280, 1280)):
        for _ in range(2):
            resnet(f"input_blocks.{block}.0", width, after)
            if level < 3:
                transformer(f"input_blocks.{block}.1", after)
            width, block = after, block + 1
            kept.append(width)
        if level < 3:
            layer(f"input_blocks.{block}.0.op", width, width, 3, 3)
            kept.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width)
    resnet("middle_block.2", width, width)
    if control:
        for i, feature in enumerate(kept):
            layer(f"zero_convs.{i}.0", feature, feature, 1, 1)
        layer("middle_block_out.0", width, width, 1, 1)
        hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
        for i in range(8):
            layer(f"input_hint_block.{2 * i}", hint[i + 1], hint[i], 3, 3)
        return shapes
    block = 0
    for level, after in ((3, 1280), (2, 1280), (1, 640), (0, 320)):
        for i in range(3):
            resnet(f"output_blocks.{block}.0", width + kept.pop(), after)
            if level < 3:
                transformer(f"output_blocks.{block}.1", after)
            if level and i == 2:
                layer(f"output_blocks.{block}.{2 if level < 3 else 1}.conv", after, after, 3, 3)
            width, block = after, block + 1
    layer("out.0", 320)
    layer("out.2", 4, 320, 3, 3)
    return shapes


@pytest.mark.parametrize(("control", "count"), [(False, 686), (True, 340)])
def test_names_and_shapes_are_the_published_ones(control, count):
    with torch.device("meta"):
        built = ControlNetModel(cross_attention_dim=768) if control else UNet2DConditionModel(cross_attention_dim=768)
    named = rename(built.state_dict(), built.config, "p.")
    wanted = stable_diffusion(control)
    assert len(wanted) == count
    assert {key.removeprefix("p."): tuple(value.shape) for key, value in named.items()} == wanted


def test_diffusers_reads_the_ldm_files_back(tmp_path, model):
    adapter = make(tmp_path / "adapter", "controlnet", full=True, downscale=8, **GUIDED)
    source = load_source(adapter, model)
    out = tmp_path / "out.safetensors"
    told = export_ldm(source, out, steps=4)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"out.safetensors", "out-unet.safetensors"}
    with safe_open(out, "pt") as file:
        notes = json.loads(file.metadata()["codi"])
    assert notes == told and notes["timesteps"] == [999, 749, 499, 249] and notes["prediction"] == "v_prediction"
    net, unet = source.control.net, source.full_unet()
    for own, path in ((net, out), (unet, tmp_path / "out-unet.safetensors")):
        own.save_config(tmp_path / type(own).__name__)
        read = type(own).from_single_file(str(path), config=str(tmp_path / type(own).__name__))
        state, other = own.state_dict(), read.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_low_rank_updates_come_back_from_kohya_s_names(tmp_path, model, pipe):
    adapter = make(tmp_path / "adapter", "lora", "generate", lora=True, **GUIDED)
    export_ldm(load_source(adapter, model), tmp_path / "out.safetensors", steps=4)
    stock = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    stock.load_lora_weights(tmp_path, weight_name="out.safetensors")
    options: Any = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    other = stock("a red ball", generator=torch.manual_seed(0), **options).images
    assert (ours(pipe, adapter) - other).abs().max() < TOLERANCE


def test_a_controlnet_of_other_cells_has_no_ldm_form(tmp_path, model):
    source = load_source(make(tmp_path / "adapter", "controlnet"), model)
    with pytest.raises(UserError, match="reads 4 px a latent cell, the original one 8: export --to diffusers"):
        export_ldm(source, tmp_path / "out.safetensors", 4)
