"""Pictures and masks of any usual kind <-> tensors, as callers of the pipeline pass and get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..tasks import Task

ImageInput = Tensor | Image.Image | np.ndarray | Sequence[Any]


def to_tensor(image: ImageInput) -> Tensor:
    """Return whatever a caller passes as float32 (B, C, h, w) in [0, 1] on the CPU: a tensor (B, C, h, w) or
    (C, h, w), an array (B, h, w, C), (h, w, C) or (h, w), PIL pictures (C = 3; of two levels, as edge maps are: 1), or
    a list of any of these. Whole numbers of 8 or 16 bits are levels.

    Raises UserError for another shape or range. What C may be is for the task to say.
    """
    tensor = _joined(image, _picture, "image", "pictures")
    if tensor.ndim != 4 or tensor.shape[1] > 4 or 0 in (len(tensor), *tensor.shape[-2:]):
        raise UserError(f"image: shape {tuple(tensor.shape)} is not (B, 3, h, w): pass RGB pictures")
    return _in_range(tensor, "image", "scale the picture to that range")


def to_mask(mask: Any) -> Tensor:
    """Return a mask, 1 (white) = make new, as float32 (B, 1, h, w) in [0, 1]: a tensor or array (h, w), (B, h, w) or
    (B, 1, h, w), a PIL picture, or a list of any of these. Raises UserError for another shape or range."""
    return _in_range(_joined(mask, _mask, "mask", "masks"), "mask", "1 is what to make new, 0 what to keep")


def _joined(value: Any, convert: Callable[[Any], Tensor], what: str, plural: str) -> Tensor:
    """Return one picture or mask, or all of a list, in one batch."""
    if not isinstance(value, (list, tuple)):
        return convert(value)
    if not value:
        raise UserError(f"{what}: an empty list: pass at least one")
    tensors = [_joined(one, convert, what, plural) for one in value]
    if len({tensor.shape[1:] for tensor in tensors}) != 1:
        raise UserError(f"{what}: {plural} of one call must have one size: call once for each size")
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _picture(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        image = _pixels(image)
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4:
            raise UserError(f"image: shape {image.shape} is not (B, h, w, 3): pass RGB pictures")
        return torch.from_numpy(_scaled(array)).permute(0, 3, 1, 2)
    if not isinstance(image, Tensor):
        raise UserError(f"image: {type(image).__name__} is no picture: pass a tensor, an array or PIL pictures")
    return _floats(image[None] if image.ndim == 3 else image)


def _mask(mask: Any) -> Tensor:
    if isinstance(mask, Image.Image):
        mask = np.asarray(ImageOps.exif_transpose(mask).convert("L"))
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise UserError(f"mask: {type(mask).__name__} is no mask: pass a tensor, an array or PIL pictures")
    tensor = torch.from_numpy(_scaled(mask)) if isinstance(mask, np.ndarray) else _floats(mask)
    if tensor.ndim in (2, 3):
        tensor = tensor.reshape(-1, 1, *tensor.shape[-2:])
    if tensor.ndim != 4 or tensor.shape[1] != 1 or 0 in tensor.shape:
        raise UserError(f"mask: shape {tuple(mask.shape)} is not (B, 1, h, w): pass one channel, 1 = make new")
    return tensor


def inputs_of(
    tasks: dict[str, Task], image: ImageInput | dict[str, Any] | None, mask: Any, size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Return what each task is given, by the name of its adapter. `size` (h, w) is that of tasks which take no picture;
    None where only the others know it.

    Raises UserError for a picture or mask that is missing, in excess, or not of the kind that its task takes.
    """
    takers = [name for name, task in tasks.items() if task.name != "generate"]
    images = image if isinstance(image, dict) else {name: image for name in takers or tasks if image is not None}
    if len(takers) > 1 and not isinstance(image, dict):
        raise UserError(f"image: {', '.join(takers)} take one each: pass image={{name: picture}}")
    if unknown := set(images) - set(tasks):
        raise UserError(f"image: {sorted(unknown)[0]!r} is no adapter that is set: use {', '.join(tasks)}")
    if missing := [name for name in takers if images.get(name) is None]:
        raise UserError(f"image: the task {tasks[missing[0]].name!r} needs one: pass image=...")
    masked = [name for name, task in tasks.items() if task.takes_mask]
    if mask is not None and not masked:
        raise UserError(f"mask: {', '.join(tasks) or 'text-to-image'} takes none: leave it out, or set task inpaint")
    given = {
        name: tasks[name].bring(to_tensor(one), to_mask(mask) if mask is not None and name in masked else None)
        for name, one in images.items()
    }
    outputs = {name: output_size(tasks[name], g) for name, g in given.items()}
    if len(set(outputs.values())) > 1:
        sizes = ", ".join(f"{name} {w} x {h} px" for name, (h, w) in outputs.items())
        raise UserError(f"image: pictures of one size cannot come of {sizes}: bring them to the same output size")
    height, width = next(iter(outputs.values()), size or (0, 0))
    return {name: given[name] if name in given else torch.zeros(1, 0, height, width) for name in tasks}


def output_size(task: Task, given: Tensor) -> tuple[int, int]:
    """Return (H, W) of the result for `given`."""
    height, width = given.shape[-2:]
    return height * task.scale, width * task.scale


def to_output(result: Tensor, output_type: str) -> Any:
    """Return pictures (B, 3, H, W) in [0, 1], or latents, as `output_type` says: pil, np, pt or latent."""
    if output_type in ("pt", "latent"):
        return result
    array = result.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else [Image.fromarray((a * 255).round().astype(np.uint8)) for a in array]


def _scaled(array: np.ndarray) -> np.ndarray:
    """Return float32, whole numbers of 8 or 16 bits scaled to [0, 1]."""
    levels = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(array.dtype, 1)
    try:
        return array.astype(np.float32) / levels
    except (TypeError, ValueError) as error:
        raise UserError(f"image: an array of {array.dtype} holds no numbers: pass pixels in [0, 1]") from error


def _floats(tensor: Tensor) -> Tensor:
    """Do the same for a tensor, of any device."""
    levels = {torch.uint8: 255, torch.uint16: 65535}.get(tensor.dtype)
    tensor = tensor.detach().cpu().float()
    return tensor if levels is None else tensor / levels


def _in_range(tensor: Tensor, what: str, fix: str) -> Tensor:
    least, most = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 1.0)
    if not (least >= -1e-3 and most <= 1.001):  # nor where one is NaN
        raise UserError(f"{what}: values outside [0, 1]: {fix}")
    return tensor if least >= 0 and most <= 1 else tensor.clamp(0, 1)  # large pictures are not copied in vain


def _pixels(picture: Image.Image) -> np.ndarray:
    """float32 (h, w, 3 or 1) in [0, 1], upright; 16-bit grey keeps its range. (Files: data.images.read_image.)"""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "1":
        return np.asarray(picture, dtype=np.float32)[..., None]
    if picture.mode.startswith("I"):
        return np.repeat(np.asarray(picture, dtype=np.float32)[..., None] / 65535, 3, axis=2)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
