"""The arguments of a call of the pipeline: from diffusers' names and the short ones to what one call makes."""

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
from .checks import Callback, lora_scale_of, require_callback, require_neutral, require_possible, require_values, whole
from .colour import require_method
from .guidance import Guidance
from .inputs import inputs_of, output_size
from .noise import Noise, counted, require_generators, seeds_of
from .prompts import EMBEDDINGS, Prompts, embeddings_of, repeated, require_complete, texts_of
from .solvers import warn_of_scheduler
from .tiles import Tiles

LARGE = 3  # times the size that the backbone was trained at: beyond it users are warned, but for tiled upscaling
STEPS = 4


@dataclass(frozen=True)
class Arguments:
    """What a caller passed, by the names of `CoDiPipeline.__call__`."""

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
    """By the names that diffusers has for it."""
    stock: dict[str, Any]
    """What else stock pipelines take."""
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
    """What one call makes: its arguments resolved."""

    tasks: dict[str, Task]
    given: dict[str, Tensor]
    """By adapter, a row for each picture."""
    size: tuple[int, int]
    """(height, width) of the pictures."""
    prompts: Prompts
    noise: Noise
    guide: Guidance
    steps: int
    strength: float
    embedded: float | None
    lora_scale: float
    tiles: Tiles | None
    method: str
    """How colors are matched, of upscaling."""
    batch_size: int
    output_type: str
    callback: Callback | None
    callback_tensors: Sequence[str]


def resolve(pipe: Any, a: Arguments) -> Call:
    """Return what a call of `pipe` (a CoDiPipeline) with these arguments makes.

    Raises UserError for arguments that no picture can be made from, and for two that contradict each other.
    """
    tasks = pipe.tasks
    steps = whole("steps", agreed("steps", a.steps, "num_inference_steps", a.num_inference_steps, STEPS))
    require_neutral(pipe, a.stock)
    require_possible(steps, int(pipe.schedule.horizon), a.strength, a.embedded_guidance, a.output_type)
    callback_tensors = require_callback(a.callback, a.callback_tensors)
    if a.image is not None and not tasks:
        raise UserError("image: no adapter is set, and text-to-image takes none: load_adapter first")
    guide = guidance_of(pipe, a)
    warn_of_scheduler(pipe, a.strength)
    given, size = _pictures(pipe, a, tasks)
    count, prompts = _prompts(pipe, a, given)
    given = {name: tensor if len(tensor) == count else tensor.expand(count, *tensor.shape[1:])
             for name, tensor in _repeated(given, a, count).items()}  # fmt: skip
    tiles = _tiles(pipe, a, tasks, given, size)
    infos = pipe.infos(a.strength)
    default = next((info["colour"] for info in infos if info.get("colour")), "wavelet")
    method: str = default if a.colour is None else a.colour
    require_method(method)
    if a.output_type == "bands" and (not tiles or method == "adain"):
        raise UserError("output_type 'bands': of pictures that are upscaled in tiles, without adain: use pt")
    return Call(
        tasks, given, size, prompts, _noise(pipe, a, count, size, tiles), guide, steps, a.strength,
        a.embedded_guidance, lora_scale_of(**a.attention), tiles, method, whole("batch_size", a.batch_size),
        a.output_type, a.callback, callback_tensors,
    )  # fmt: skip


def agreed(short: str, value: Any, name: str, other: Any, default: Any = None) -> Any:
    """Return a setting that has two names. Raises UserError where both are given and differ."""
    if value is None or other is None:
        return default if value is None and other is None else other if value is None else value
    numbers = isinstance(value, Real) and isinstance(other, Real)
    if value is other or (numbers and value == other):  # arrays compare element by element
        return value
    shown = (f"{short} {value!r}", f"{name} {other!r}") if numbers else (short, name)
    raise UserError(f"{shown[0]} and {shown[1]}: two names of one setting, given twice: give one")


def guidance_of(pipe: Any, a: Arguments) -> Guidance:
    """Return the guidance of a call. Raises UserError for one that the adapters or the checkpoint do not have."""
    guide = pipe.guidance(a.guidance_scale, a.image_guidance_scale, a.strength)
    if guide.second_pass != 1:
        pipe.kind.require_guidance(pipe, guide.second_pass)
    negative = any(texts_of(a.negative_prompt, "negative_prompt"))
    if guide.distilled and (negative or a.embeddings.get("negative_prompt_embeds") is not None):
        raise UserError("negative_prompt: guidance is distilled into this adapter, away from no prompt at all: "
                        "leave it out")  # fmt: skip
    return guide


def _pictures(pipe: Any, a: Arguments, tasks: dict[str, Task]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return what each task is given, and the size (height, width) of the result, which a given picture sets."""
    mask = agreed("mask", a.mask, "mask_image", a.mask_image)
    height, width = (None if side is None else whole(name, side)
                     for name, side in (("height", a.height), ("width", a.width)))  # fmt: skip
    size = pipe.size_of(None, None) if a.image is not None else pipe.size_of(height, width)
    given = inputs_of(tasks, a.image, mask, size) if tasks else {"": torch.zeros(1, 0, *size)}
    name, one = next(iter(given.items()))
    high, wide = output_size(tasks[name], one) if tasks else size
    if (height or high, width or wide) != (high, wide):
        raise UserError(f"size {width or wide} x {height or high}: the picture given makes {wide} x {high} px: "
                        "leave the size out")  # fmt: skip
    return given, (high, wide)


def _prompts(pipe: Any, a: Arguments, given: dict[str, Tensor]) -> tuple[int, Prompts]:
    """Return the number of pictures and their prompts: what is given once is repeated for all."""
    each = whole("num_images_per_prompt", a.num_images_per_prompt)
    texts, negative = texts_of(a.prompt), texts_of(a.negative_prompt, "negative_prompt")
    embedded = embeddings_of(a.embeddings, a.prompt)
    negative_embedded = embeddings_of(a.embeddings, a.negative_prompt, negative=True)
    for bundle in (embedded, negative_embedded):
        require_complete(bundle, pipe.kind.condition_shapes(pipe.network.config))
    sizes = {"prompts": len(texts), "negative prompts": len(negative)}
    for what, bundle in (("prompt_embeds", embedded), ("negative_prompt_embeds", negative_embedded)):
        sizes |= {} if bundle is None else {what: len(next(iter(bundle.values())))}
    sizes |= {f"images of {name}": len(tensor) for name, tensor in given.items()}
    # Seeds and generators are the noise of pictures: one each also where a prompt has several.
    own = {"seeds": len(seeds_of(a.seed))}
    own |= {"generators": len(a.generator)} if isinstance(a.generator, (list, tuple)) else {}
    count = max(sizes.values()) * each
    count = count if each > 1 else max(count, *own.values())
    sizes = {what: size * each if size > 1 else 1 for what, size in sizes.items()} | own
    if wrong := [f"{size} {what}" for what, size in sizes.items() if size not in (1, count)]:
        raise UserError(f"prompt, seed, image: {', '.join(wrong)} for {count} pictures: give one, or one for each")
    embedded, negative_embedded = (_rows(bundle, each, count) for bundle in (embedded, negative_embedded))
    return count, Prompts(_all(texts, each, count), _all(negative, each, count), embedded, negative_embedded)


def _all(rows: list[str], each: int, count: int) -> list[str]:
    return rows * count if len(rows) == 1 else repeated(rows, each)


def _rows(bundle: dict[str, Tensor] | None, each: int, count: int) -> dict[str, Tensor] | None:
    if bundle is None:
        return None
    return {name: v.expand(count, *v.shape[1:]) if len(v) == 1 else repeated(v, each) for name, v in bundle.items()}


def _repeated(given: dict[str, Tensor], a: Arguments, count: int) -> dict[str, Tensor]:
    each = a.num_images_per_prompt
    return {name: repeated(one, each) if 1 < len(one) < count else one for name, one in given.items()}


def _noise(pipe: Any, a: Arguments, count: int, size: tuple[int, int], tiles: Tiles | None) -> Noise:
    generator = require_generators(a.generator, a.seed)
    latents = a.latents
    if latents is not None:
        if not isinstance(latents, Tensor) or latents.ndim not in (3, 4):
            raise UserError("latents: not a tensor (B, C, h, w): pass the noise to begin with, or leave it out")
        require_values("latents", latents)
        if tiles:
            raise UserError("latents: tiles have none in common: pass tile=0, or leave latents out")
        latents = pipe.kind.from_stock(latents, pipe.cells_of(size))
    return Noise(count, counted(a.seed, count), generator, latents)


def _tiles(
    pipe: Any, a: Arguments, tasks: dict[str, Task], given: dict[str, Tensor], size: tuple[int, int]
) -> Tiles | None:
    """Return the tiles of upscaling, None for none; warn of pictures that are larger than a backbone can hold."""
    tiles, own = None, max(pipe.size_of(None, None))
    tile = None if a.tile is None else whole("tile", a.tile, 0)
    if [task.name for task in tasks.values()] == ["upscale"]:
        tiles = pipe.tiles(next(iter(given.values())), tile)
    elif tile:
        raise UserError(f"tile {tile}: tiles are for upscaling alone: leave it out")
    elif tasks and max(size) > LARGE * own:
        warnings.warn(f"picture of {size[1]} x {size[0]} px: this model was trained at {own}: what it makes may not "
                      "hold together, and takes long: make the picture smaller first", stacklevel=4)  # fmt: skip
    if tiles and a.output_type == "latent":
        raise UserError("output_type 'latent': tiles have none in common: pass tile=0, or another type")
    return tiles


__all__ = ["EMBEDDINGS", "Arguments", "Call", "resolve"]
