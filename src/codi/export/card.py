"""The README.md of what is exported for diffusers: the lines that sample with it, and what they leave out."""

from __future__ import annotations

import inspect
from typing import Any

from ..models.backbones import find_model
from ..models.lora import FILE
from .source import Source

CARD = """\
# {task}: an adapter for {family}

For stock diffusers. These lines make the picture that `codi` makes with the same adapter, prompt and seed:

```python
{code}
```

{remarks}
"""


def write_card(source: Source, scheduler: str, call: dict[str, Any], lora: bool) -> str:
    """The text. `scheduler` is its class, `call` what the pipeline's call is given, `lora` whether there is a file."""
    two = source.backbone.text_encoder_2 is not None
    kind = f"StableDiffusion{'XL' if two else ''}{'ControlNet' if source.control else ''}Pipeline"
    classes, lines, parts = {scheduler, kind}, [], "use_safetensors=True" if two else "safety_checker=None"
    if source.control:
        lines.append("controlnet = ControlNetModel.from_pretrained(folder)")
        classes, parts = classes | {"ControlNetModel"}, f"{parts}, controlnet=controlnet"
    if source.shelved.full:
        lines.append('unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet")')
        classes, parts = classes | {"UNet2DConditionModel"}, f"{parts}, unet=unet"
    lines.append(f"pipe = {kind}.from_pretrained(model, {parts})")
    lines.append(f'pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")')
    if lora:
        lines.append(f'pipe.load_lora_weights(folder, weight_name="{FILE}")')
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    inputs = "prompt, image=condition" if source.control else "prompt"
    lines.append(f"picture = pipe({inputs}, {arguments}, generator=torch.manual_seed(0)).images[0]")
    head = [
        "import torch",
        f"from diffusers import {', '.join(sorted(classes))}",
        "",
        'folder = "."  # this one',
        f'model = "{source.model}"  # the backbone: a Stable Diffusion folder or hub id',
        'prompt = "a red ball"',
        *(["condition = ...  # a picture, see below"] if source.control else []),
        "",
    ]
    task = source.task.name
    return CARD.format(
        task=task, family=source.backbone.family, code="\n".join(head + lines), remarks="\n".join(_remarks(source))
    )


def _remarks(source: Source) -> list[str]:
    task, remarks = source.task, []
    if source.control:
        told = [" ".join((inspect.getdoc(thing) or "").split()) for thing in (type(task), task.condition)]
        remarks.append(f"- `condition`: a PIL picture, or a tensor in [0, 1]. {' '.join(told)} It is what "
                       f"`codi.tasks.get_task({task.name!r}, ...).condition(given)` returns.")  # fmt: skip
        remarks.append("- `codi` may treat what comes out once more (an upscaled picture gets the colours of the small "
                       "one, an inpainted one its known pixels): these lines do not.")  # fmt: skip
    if source.guidance.distilled:
        scales = ", ".join(f"{name} {scale:g}" for name, scale in source.guidance.scales.items())
        remarks.append(f"- Distilled guidance is built in at the adapter's own scale ({scales}), which is for prompts "
                       "that are not empty; the pipeline's `guidance_scale` has nothing to do with it.")  # fmt: skip
    if find_model(source.model) != source.model:
        remarks.append(f"- `{source.model}` lies inside codi: `codi models --json` says where.")
    remarks.append("- For another number of steps export again with `--steps`.")  # fmt: skip
    return remarks
