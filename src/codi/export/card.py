"""The README.md of an export for diffusers: code that samples with it, and its limitations."""

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
    """Return the text. `call`: arguments of the pipeline's call; `lora`: whether there is a LoRA file."""
    backbone, kind = source.backbone, source.kind
    pipeline = kind.pipeline_for(backbone).__name__
    scheduler_class = type(scheduler).__name__
    classes, lines, parts = {scheduler_class}, [], kind.loading_arguments(backbone)
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
    lines.append(f'pipe.scheduler = {scheduler_class}.from_pretrained(folder, subfolder="scheduler")')
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
    """Return the imports and inputs at the top of the code."""
    condition = "a picture" if source.kind.takes_pictures else "a tensor (1, 3, height, width) in [0, 1]"
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted(classes))}",
        *([f"from diffusers.models.autoencoders.vae import {POSTERIOR}"] if _encodes(source) else []),
        "",
        'folder = "."  # this one',
        f'model = "{source.model}"  # the backbone: a {source.kind.name} folder or hub id',
        'prompt = "a red ball"',
        *([f"condition = ...  # {condition}, see below"] if source.reads else []),
        "",
    ]


def _size(source: Source) -> dict[str, Any]:
    """Return the size arguments for a transformer, whose pipeline would otherwise use its default size."""
    if source.kind.takes_pictures:
        return {}
    if source.reads:
        return {"height": _Code("condition.shape[-2]"), "width": _Code("condition.shape[-1]")}
    height, width = (side * codec.downscale(source.backbone.vae) for side in source.cells)
    return {"height": height, "width": width}


class _Code(str):
    """A string whose repr is the string itself: code, not a quoted value."""

    __slots__ = ()
    __repr__ = str.__str__


def _encodes(source: Source) -> bool:
    """Return whether the stock pipeline samples the condition's latent from the VAE's posterior."""
    return source.reads and source.kind.draws_condition


def _remarks(source: Source, scheduler: Any) -> list[str]:
    task, remarks = source.task, []
    if source.reads:
        texts = [" ".join((inspect.getdoc(item) or "").split()) for item in (type(task), task.condition)]
        kind = "a PIL picture, or a tensor" if source.kind.takes_pictures else "a tensor (1, 3, H, W)"
        remarks.append(f"- `condition`: {kind} in [0, 1]. {' '.join(texts)} It is what "
                       f"`codi.tasks.get_task({task.name!r}, ...).condition(given)` returns.")  # fmt: skip
        remarks.append("- `codi` may post-process the result (an upscaled picture gets the colours of the small one, "
                       "an inpainted one its known pixels): these lines do not.")  # fmt: skip
    if _encodes(source):
        remarks.append("- `codi` encodes the condition to the mean of the VAE's posterior. Without the line that sets "
                       f"`{POSTERIOR}.sample`, the stock pipeline samples the posterior, which is seldom visible, and "
                       "then starts from other noise for the same seed.")  # fmt: skip
    if source.guidance.distilled:
        scales = ", ".join(f"{name} {scale:g}" for name, scale in source.guidance.scales.items())
        remarks.append(f"- Distilled guidance is built in at the adapter's default scale ({scales}), meant for prompts "
                       "that are not empty; the pipeline's `guidance_scale` does not change it.")  # fmt: skip
    if find_model(source.model) != source.model:
        remarks.append(f"- `{source.model}` is part of codi: `codi models --json` prints its folder.")
    if isinstance(source.backbone.schedule, FlowSchedule):
        remarks += _flow_remarks(source, scheduler)
    remarks.append("- For a different number of steps, export again with `--steps`.")  # fmt: skip
    return remarks


def _flow_remarks(source: Source, scheduler: Any) -> list[str]:
    """Return the remarks on the times of a transformer's steps."""
    remarks = ["- `scheduler/scheduler_config.json` defines the times of the steps: programs that serve models pass "
               "the number of steps and no sigmas."]  # fmt: skip
    if source.backbone.scheduler.config.get("use_dynamic_shifting") and not scheduler.config["use_dynamic_shifting"]:
        height, width = (side * codec.downscale(source.backbone.vae) for side in source.cells)
        remarks.append(f"- These times are for pictures of {width} x {height} px. `codi` shifts them by the picture's "
                       "size, which this configuration cannot combine with the adapter's own shift.")  # fmt: skip
    if source.renoises:
        remarks.append("- Each step draws fresh noise, from torch's global generator. Pipelines of packed latents draw "
                       "it in a different order than `codi`: other pictures of the same distribution.")  # fmt: skip
    return remarks
