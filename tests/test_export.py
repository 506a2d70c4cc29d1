"""Export: what other programs make of an adapter is what codi makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

from codi.errors import UserError
from codi.export.diffusers import export_diffusers
from codi.export.source import load_source
from codi.models.adapter import FORMS
from codi.models.student import Student
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import get_task
from codi.training.saving import save_adapter
from tiny import influence, rand, randn, tiny_backbone, tiny_checkpoint, tiny_lora

TOLERANCE = 1e-5  # of pictures in [0, 1], float32; 1e-6 measured


def make(folder: Path, form: str, task: str = "canny", lora: bool = False, full: bool = False, **info: Any) -> Path:
    """An adapter of `tiny_checkpoint` as training leaves one: everything in it matters."""
    backbone, made = tiny_backbone(), get_task(task)
    told = len(info.get("guidance", ()))
    jumps = info.get("jumps", False)
    adapter = FORMS[form].from_backbone(backbone.unet, backbone.vae, made.condition_channels, told, jumps)
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


def ours(model: Path, adapter: Path, steps: int, **given: Any) -> torch.Tensor:
    """The picture of seed 0."""
    pipe = CoDiPipeline.from_pretrained(model, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red ball", steps=steps, output_type="pt", **given).images  # type: ignore[union-attr]


def theirs(folder: Path, **given: Any) -> torch.Tensor:
    """The picture that the lines of the card make."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    lines = code[1].replace('folder = "."', f"folder = {str(folder)!r}").replace(").images[0]", ", output_type='pt').images")
    lines = lines.replace("condition = ...", "").replace("picture = ", "pipe.set_progress_bar_config(disable=True)\npicture = ")
    names: dict[str, Any] = dict(given)
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
def test_stock_diffusers_makes_the_same_picture(tmp_path, model, form, options, scheduler):
    adapter = make(tmp_path / "adapter", form, **options)
    source = load_source(adapter, model)
    told = export_diffusers(source, tmp_path / "out", steps=4)
    assert told["scheduler"] == scheduler
    given = {} if form == "lora" else {"image": rand(1, 3, 32, 32, seed=3)}
    if options.get("task") == "inpaint":
        latent_like = source.task.condition(torch.cat([given["image"], torch.ones(1, 1, 32, 32)], 1))
    condition = source.task.condition(source.task.bring(given["image"])) if given and "task" not in options else None
    if options.get("task") == "inpaint":
        given["mask"], condition = torch.ones(1, 1, 32, 32), latent_like
    difference = (ours(model, adapter, 4, **given) - theirs(tmp_path / "out", condition=condition)).abs().max()
    print(form, options, "max difference", float(difference))
    assert difference < TOLERANCE
