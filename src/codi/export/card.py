"""The README.md of what is exported for diffusers: the lines that sample with it, and what they leave out."""

from __future__ import annotations

import inspect
from typing import Any

from ..models import codec
from ..models.backbones import find_model
from ..models.lora import FILE
from ..schedule import FlowSchedule
from .source import Source

CARD = """\
# {task}: an adapter for {family}

For stock diffusers. These lines make the picture that `codi` makes with the same adapter, prompt and seed:

```python
{code}
```

{remarks}
"""


POSTERIOR = "DiagonalGaussianDistribution"


def write_card(source: Source, scheduler: Any, call: dict[str, Any], lora: bool) -> str:
    """The text. `call`: what the pipeline's call is given, `lora`: whether there is a file."""
    backbone, kind = source.backbone, source.kind
    pipeline = kind.pipeline_for(backbone).__name__
    walk = type(scheduler).__name__
    classes, lines, parts = {walk}, [], kind.loading_arguments(backbone)
    if source.control:
        pipeline, net = pipeline.replace("Pipeline", "ControlNetPipeline"), type(source.control.net).__name__
        lines.append(f"controlnet = {net}.from_pretrained(folder)")
        classes, parts = classes | {net}, [*parts, "controlnet=controlnet"]
    elif source.hint:
        pipeline = str(kind.control_pipeline)
    if source.loaded.full:
        lines.append(f'{kind.component} = {kind.network}.from_pretrained(f"{{folder}}/{kind.component}")')
        classes, parts = classes | {kind.network}, [*parts, f"{kind.component}={kind.component}"]
    lines.append(f"pipe = {pipeline}.from_pretrained({', '.join(['model', *parts])})")
    lines.append(f'pipe.scheduler = {walk}.from_pretrained(folder, subfolder="scheduler")')
    if lora:
        lines.append(f'pipe.load_lora_weights(folder, weight_name="{FILE}")')
    if _encodes(source):
        lines.append(f"{POSTERIOR}.sample = lambda self, generator=None: self.mode()  # see below")
    arguments = ", ".join(f"{name}={value!r}" for name, value in {**_size(source), **call}.items())
    inputs = f"prompt=prompt, {kind.control_argument}" if source.reads else "prompt=prompt"
    lines.append(f"picture = pipe({inputs}, {arguments}, generator=torch.manual_seed(0)).images[0]")
    code = [*_head(source, {*classes, pipeline}), *lines]
    task, remarks = source.task.name, "\n".join(_remarks(source, scheduler))
    return CARD.format(task=task, family=backbone.family, code="\n".join(code), remarks=remarks)


def _head(source: Source, classes: set[str]) -> list[str]:
    """What comes before the pipeline."""
    given = "a picture" if source.kind.takes_pictures else "a tensor (1, 3, height, width) in [0, 1]"
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted(classes))}",
        *([f"from diffusers.models.autoencoders.vae import {POSTERIOR}"] if _encodes(source) else []),
        "",
        'folder = "."  # this one',
        f'model = "{source.model}"  # the backbone: a {source.kind.name} folder or hub id',
        'prompt = "a red ball"',
        *([f"condition = ...  # {given}, see below"] if source.reads else []),
        "",
    ]


def _size(source: Source) -> dict[str, Any]:
    """The arguments for the size of a transformer's picture, which the stock pipelines take to be their own."""
    if source.kind.takes_pictures:
        return {}
    if source.reads:
        return {"height": _Code("condition.shape[-2]"), "width": _Code("condition.shape[-1]")}
    height, width = (side * codec.downscale(source.backbone.vae) for side in source.cells)
    return {"height": height, "width": width}


class _Code(str):
    """A string that is written into code as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def _encodes(source: Source) -> bool:
    """Whether the stock pipeline draws the condition's latent from the VAE's posterior."""
    return source.reads and source.kind.draws_condition


def _remarks(source: Source, scheduler: Any) -> list[str]:
    task, remarks = source.task, []
    if source.reads:
        given = [" ".join((inspect.getdoc(thing) or "").split()) for thing in (type(task), task.condition)]
        kind = "a PIL picture, or a tensor" if source.kind.takes_pictures else "a tensor (1, 3, H, W)"
        remarks.append(f"- `condition`: {kind} in [0, 1]. {' '.join(given)} It is what "
                       f"`codi.tasks.get_task({task.name!r}, ...).condition(given)` returns.")  # fmt: skip
        remarks.append("- `codi` may treat what comes out once more (an upscaled picture gets the colours of the small "
                       "one, an inpainted one its known pixels): these lines do not.")  # fmt: skip
    if _encodes(source):
        remarks.append("- `codi` takes the mean of what the VAE's encoder says of the condition. The stock pipeline, "
                       "without the line about it, draws from around the mean, which seldom shows, and then starts "
                       "from other noise for the same seed.")  # fmt: skip
    if source.guidance.distilled:
        scales = ", ".join(f"{name} {scale:g}" for name, scale in source.guidance.scales.items())
        remarks.append(f"- Distilled guidance is built in at the adapter's own scale ({scales}), which is for prompts "
                       "that are not empty; the pipeline's `guidance_scale` has nothing to do with it.")  # fmt: skip
    if find_model(source.model) != source.model:
        remarks.append(f"- `{source.model}` lies inside codi: `codi models --json` says where.")
    if isinstance(source.backbone.schedule, FlowSchedule):
        remarks += _flow_remarks(source, scheduler)
    remarks.append("- For another number of steps export again with `--steps`.")  # fmt: skip
    return remarks


def _flow_remarks(source: Source, scheduler: Any) -> list[str]:
    """Of transformers: where the times of the steps are, and what they hold for."""
    remarks = ["- `scheduler/scheduler_config.json` holds the times of the steps: a program that serves models passes "
               "the number of steps and no sigmas."]  # fmt: skip
    if source.backbone.scheduler.config.get("use_dynamic_shifting") and not scheduler.config["use_dynamic_shifting"]:
        height, width = (side * codec.downscale(source.backbone.vae) for side in source.cells)
        remarks.append(f"- They are those of pictures of {width} x {height} px. `codi` shifts them by the picture's "
                       "size, which this configuration cannot together with the adapter's own shift.")  # fmt: skip
    if source.renoises:
        remarks.append("- Each step draws fresh noise, from torch's global generator. Pipelines of packed latents draw "
                       "it in another order than `codi`: other pictures, of the same distribution.")  # fmt: skip
    return remarks
