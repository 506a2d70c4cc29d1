"""Arguments of a pipeline call: validated, and aliases and defaults resolved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..tasks import Task
from .checks import (
    Callback,
    lora_scale_of,
    reject_unsupported,
    require_callback,
    require_in_range,
    require_values,
    whole_number,
)
from .colour import require_method
from .guidance import Guidance
from .inputs import inputs_of, output_size
from .noise import Noise, require_generators, seeds_for, seeds_of
from .prompts import EMBEDDINGS, Prompts, embeddings_of, repeat_rows, require_complete, texts_of
from .solvers import warn_of_scheduler
from .tiles import Tiles

LARGE = 3  # times the backbone's training size, beyond which users are warned, except when upscaling in tiles
STEPS = 4


@dataclass(frozen=True)
class Arguments:
    """Arguments as passed to `CoDiPipeline.__call__`."""

    prompt: Any
    image: Any
    mask_image: Any
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: Any
    num_images_per_prompt: int
    generator: Any
    latents: Tensor | None
    embeddings: dict[str, Any]
    output_type: str
    callback: Callback | None
    callback_tensors: Any
    attention: dict[str, Any]
    """`cross_attention_kwargs` and `joint_attention_kwargs`, by name."""
    stock: dict[str, Any]
    """Any other arguments, by name: those of stock pipelines are accepted if they have no effect."""
    mask: Any
    steps: int | None
    seed: Any
    strength: float
    image_guidance_scale: float | None
    embedded_guidance: float | None
    tile: int | None
    colour: str | None
    batch_size: int


@dataclass(frozen=True)
class Call:
    """Resolved arguments of one call."""

    tasks: dict[str, Task]
    given: dict[str, Tensor]
    """Input of each task by adapter name, one row per output image."""
    size: tuple[int, int]
    """(height, width) of the output images."""
    prompts: Prompts
    noise: Noise
    guide: Guidance
    steps: int
    strength: float
    embedded: float | None
    lora_scale: float
    tiles: Tiles | None
    method: str
    """Color correction of upscaling, one of `colour.METHODS`."""
    batch_size: int
    output_type: str
    callback: Callback | None
    callback_tensors: Sequence[str]


def resolve(pipe: Any, a: Arguments) -> Call:
    """Return the resolved arguments of a call of `pipe` (a CoDiPipeline).

    Raises UserError for invalid arguments and for two that contradict each other.
    """
    tasks = pipe.tasks
    steps = whole_number("steps", merge_aliases("steps", a.steps, "num_inference_steps", a.num_inference_steps, STEPS))
    reject_unsupported(pipe, a.stock)
    require_in_range(steps, int(pipe.schedule.horizon), a.strength, a.embedded_guidance, a.output_type)
    callback_tensors = require_callback(a.callback, a.callback_tensors)
    if a.image is not None and not tasks:
        raise UserError("image: no adapter is set, and text-to-image takes none: load_adapter first")
    guide = guidance_of(pipe, a)
    warn_of_scheduler(pipe, a.strength)
    inputs, size = _inputs(pipe, a, tasks)
    count, prompts = _prompts(pipe, a, inputs)
    inputs = {name: tensor if len(tensor) == count else tensor.expand(count, *tensor.shape[1:])
              for name, tensor in _repeated(inputs, a, count).items()}  # fmt: skip
    tiles = _tiles(pipe, a, tasks, inputs, size)
    infos = pipe.infos(a.strength)
    default = next((info["colour"] for info in infos if info.get("colour")), "wavelet")
    method: str = default if a.colour is None else a.colour
    require_method(method)
    if a.output_type == "bands" and (not tiles or method == "adain"):
        raise UserError("output_type 'bands': only for upscaling in tiles, and not with colour='adain': use pt")
    return Call(
        tasks, inputs, size, prompts, _noise(pipe, a, count, size, tiles), guide, steps, a.strength,
        a.embedded_guidance, lora_scale_of(**a.attention), tiles, method, whole_number("batch_size", a.batch_size),
        a.output_type, a.callback, callback_tensors,
    )  # fmt: skip


def merge_aliases(short: str, value: Any, name: str, other: Any, default: Any = None) -> Any:
    """Return the value of an argument that has two names. Raises UserError if both are passed and differ."""
    if value is None or other is None:
        return default if value is None and other is None else other if value is None else value
    numbers = isinstance(value, Real) and isinstance(other, Real)
    if value is other or (numbers and value == other):  # arrays compare element by element
        return value
    shown = (f"{short} {value!r}", f"{name} {other!r}") if numbers else (short, name)
    raise UserError(f"{shown[0]} and {shown[1]}: two names of one argument: pass one of them")


def guidance_of(pipe: Any, a: Arguments) -> Guidance:
    """Return the guidance of a call. Raises UserError if the adapters or the checkpoint do not support it."""
    guide = pipe.guidance(a.guidance_scale, a.image_guidance_scale, a.strength)
    if guide.second_pass != 1:
        pipe.kind.require_guidance(pipe, guide.second_pass)
    negative = any(texts_of(a.negative_prompt, "negative_prompt"))
    if guide.distilled and (negative or a.embeddings.get("negative_prompt_embeds") is not None):
        raise UserError("negative_prompt: this adapter has distilled guidance, against the empty prompt only: "
                        "leave it out")  # fmt: skip
    return guide


def _inputs(pipe: Any, a: Arguments, tasks: dict[str, Task]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return the input of each task and the output size (height, width), which an input image determines."""
    mask = merge_aliases("mask", a.mask, "mask_image", a.mask_image)
    height, width = (None if side is None else whole_number(name, side)
                     for name, side in (("height", a.height), ("width", a.width)))  # fmt: skip
    size = pipe.size_of(None, None) if a.image is not None else pipe.size_of(height, width)
    inputs = inputs_of(tasks, a.image, mask, size) if tasks else {"": torch.zeros(1, 0, *size)}
    name, first = next(iter(inputs.items()))
    out_height, out_width = output_size(tasks[name], first) if tasks else size
    if (height or out_height, width or out_width) != (out_height, out_width):
        raise UserError(f"size {width or out_width} x {height or out_height}: the output for this image has "
                        f"{out_width} x {out_height} px: leave the size out")  # fmt: skip
    return inputs, (out_height, out_width)


def _prompts(pipe: Any, a: Arguments, inputs: dict[str, Tensor]) -> tuple[int, Prompts]:
    """Return the number of output images and their prompts; a single prompt or embedding is used for all images."""
    each = whole_number("num_images_per_prompt", a.num_images_per_prompt)
    texts, negative = texts_of(a.prompt), texts_of(a.negative_prompt, "negative_prompt")
    embedded = embeddings_of(a.embeddings, a.prompt)
    negative_embedded = embeddings_of(a.embeddings, a.negative_prompt, negative=True)
    for bundle in (embedded, negative_embedded):
        require_complete(bundle, pipe.kind.condition_shapes(pipe.network.config))
    sizes = {"prompts": len(texts), "negative prompts": len(negative)}
    for label, bundle in (("prompt_embeds", embedded), ("negative_prompt_embeds", negative_embedded)):
        sizes |= {} if bundle is None else {label: len(next(iter(bundle.values())))}
    sizes |= {f"images of {name}": len(tensor) for name, tensor in inputs.items()}
    # Seeds and generators count output images, not prompts: num_images_per_prompt does not repeat them.
    noise_sizes = {"seeds": len(seeds_of(a.seed))}
    noise_sizes |= {"generators": len(a.generator)} if isinstance(a.generator, (list, tuple)) else {}
    count = max(sizes.values()) * each
    count = count if each > 1 else max(count, *noise_sizes.values())
    sizes = {label: size * each if size > 1 else 1 for label, size in sizes.items()} | noise_sizes
    if wrong := [f"{size} {label}" for label, size in sizes.items() if size not in (1, count)]:
        raise UserError(f"prompt, seed, image: {', '.join(wrong)} for {count} pictures: give one, or one for each")
    embedded, negative_embedded = (_embedding_rows(bundle, each, count) for bundle in (embedded, negative_embedded))
    return count, Prompts(
        _text_rows(texts, each, count), _text_rows(negative, each, count), embedded, negative_embedded
    )


def _text_rows(texts: list[str], each: int, count: int) -> list[str]:
    return texts * count if len(texts) == 1 else repeat_rows(texts, each)


def _embedding_rows(bundle: dict[str, Tensor] | None, each: int, count: int) -> dict[str, Tensor] | None:
    if bundle is None:
        return None
    return {name: v.expand(count, *v.shape[1:]) if len(v) == 1 else repeat_rows(v, each) for name, v in bundle.items()}


def _repeated(inputs: dict[str, Tensor], a: Arguments, count: int) -> dict[str, Tensor]:
    each = a.num_images_per_prompt
    return {name: repeat_rows(rows, each) if 1 < len(rows) < count else rows for name, rows in inputs.items()}


def _noise(pipe: Any, a: Arguments, count: int, size: tuple[int, int], tiles: Tiles | None) -> Noise:
    generator = require_generators(a.generator, a.seed)
    latents = a.latents
    if latents is not None:
        if not isinstance(latents, Tensor) or latents.ndim not in (3, 4):
            raise UserError("latents: not a tensor (B, C, h, w): pass the initial noise, or leave it out")
        require_values("latents", latents)
        if tiles:
            raise UserError("latents: not supported in tiles: pass tile=0, or leave latents out")
        latents = pipe.kind.from_stock(latents, pipe.cells_of(size))
    return Noise(count, seeds_for(a.seed, count), generator, latents)


def _tiles(
    pipe: Any, a: Arguments, tasks: dict[str, Task], inputs: dict[str, Tensor], size: tuple[int, int]
) -> Tiles | None:
    """Return the tiles for upscaling, None without; warn of images much larger than the backbone's training size."""
    tiles, trained_size = None, max(pipe.size_of(None, None))
    tile = None if a.tile is None else whole_number("tile", a.tile, 0)
    if [task.name for task in tasks.values()] == ["upscale"]:
        tiles = pipe.tiles(next(iter(inputs.values())), tile)
    elif tile:
        raise UserError(f"tile {tile}: only for upscaling: leave it out")
    elif tasks and max(size) > LARGE * trained_size:
        warnings.warn(f"picture of {size[1]} x {size[0]} px: this model was trained at {trained_size}: the result may "
                      "be incoherent, and slow: make the picture smaller first", stacklevel=4)  # fmt: skip
    if tiles and a.output_type == "latent":
        raise UserError("output_type 'latent': not supported in tiles: pass tile=0, or another type")
    return tiles


__all__ = ["EMBEDDINGS", "Arguments", "Call", "resolve"]
