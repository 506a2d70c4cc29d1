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
    a list of any of these. Whole numbers of 8 or 16 bits are levels; PIL pictures of 32 bits (modes "F" and "I") are in
    the least range that holds them, of 0 to 1, 255 or, "I" alone, 65535.

    Raises UserError for another shape or range. What C may be is for the task to say.
    """
    return _in_range(_joined(image, _picture, "image", "pictures"), "image", "scale the picture to that range")


def to_mask(mask: Any) -> Tensor:
    """Return a mask, 1 (white) = make new, as float32 (B, 1, h, w) in [0, 1]: a tensor or array (h, w), (B, h, w) or
    (B, 1, h, w), an array (h, w, 1) or (B, h, w, 1), a PIL picture, or a list of any of these. Raises UserError for
    another shape or range."""
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
    """Return one argument as (B, C, h, w)."""
    if isinstance(image, Image.Image):
        image = _pixels(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise UserError(f"image: {type(image).__name__} is no picture: pass a tensor, an array or PIL pictures")
    tensor, shape, array = _floats(image, "image"), tuple(image.shape), isinstance(image, np.ndarray)
    if array and tensor.ndim == 2:
        tensor = tensor[..., None]
    tensor = tensor.movedim(-1, -3) if array and tensor.ndim > 2 else tensor
    if tensor.ndim not in (3, 4) or tensor.shape[-3] > 4 or 0 in shape:
        fix = "pass RGB pictures"
        if len(shape) > 2 and shape[-3 if array else -1] in (1, 3, 4):
            fix = ("arrays have their channels last: np.moveaxis(image, -3, -1)" if array
                   else "tensors have their channels first: image.movedim(-1, -3)")  # fmt: skip
        form = "(h, w, 3) or (B, h, w, 3)" if array else "(3, h, w) or (B, 3, h, w)"
        raise UserError(f"image: shape {shape} is not {form}: {fix}")
    return tensor if tensor.ndim == 4 else tensor[None]


def _mask(mask: Any) -> Tensor:
    """Return one argument as (B, 1, h, w)."""
    if isinstance(mask, Image.Image):
        picture = ImageOps.exif_transpose(mask)
        deep = _levels(picture)
        mask = np.asarray(picture.convert("L")) if deep is None else deep
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise UserError(f"mask: {type(mask).__name__} is no mask: pass a tensor, an array or PIL pictures")
    tensor, shape = _floats(mask, "mask"), tuple(mask.shape)
    if isinstance(mask, np.ndarray) and tensor.ndim in (3, 4) and shape[-1] == 1 != shape[-3]:
        tensor = tensor[..., 0]  # (h, w, 1); but (1, h, 1) is a mask one pixel wide
    rgb = isinstance(mask, np.ndarray) and tensor.ndim == 3 and shape[0] != 1 and shape[-1] in (2, 3, 4)
    if tensor.ndim in (2, 3):
        tensor = tensor[:, None] if tensor.ndim == 3 else tensor[None, None]
    if tensor.ndim != 4 or tensor.shape[1] != 1 or 0 in shape or rgb:
        raise UserError(f"mask: shape {shape} is not (B, 1, h, w): {_mask_fix(shape)}")
    return tensor


def _mask_fix(shape: tuple[int, ...]) -> str:
    """Return how to make a mask of an array or tensor of this shape."""
    fix = "pass one channel, (h, w) or (B, 1, h, w)"
    if len(shape) not in (3, 4):
        return fix
    return f"{fix}, such as {'mask[..., 0]' if shape[-1] < 5 else 'mask[:, :1]' if len(shape) == 4 else 'mask[:1]'}"


def _masks_for(pictures: Tensor, mask: Any) -> Tensor:
    """Return one mask, or as many as there are pictures. Raises UserError for any other number."""
    masks = to_mask(mask)
    if len(masks) not in (1, len(pictures)):
        shape = getattr(mask, "shape", None)
        what = "mask" if shape is None else f"mask of shape {tuple(shape)}"
        fix = "pass one, or one for each" if shape is None else _mask_fix(tuple(shape))
        raise UserError(f"{what}: {len(masks)} masks for a batch of {len(pictures)}: {fix}")
    return masks


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
    pictures = {name: to_tensor(one) for name, one in images.items()}
    masks = {name: _masks_for(pictures[name], mask) for name in masked if mask is not None and name in pictures}
    given = {name: tasks[name].bring(one, masks.get(name)) for name, one in pictures.items()}
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


def _floats(values: np.ndarray | Tensor, what: str) -> Tensor:
    """Return float32 on the CPU, whole numbers of 8 or 16 bits scaled to [0, 1]."""
    if isinstance(values, np.ndarray):
        levels = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(values.dtype, 1)
        try:
            return torch.from_numpy(values.astype(np.float32) / levels)
        except (TypeError, ValueError) as error:
            fix = "pass pixels in [0, 1]"
            raise UserError(f"{what}: an array of {values.dtype} holds no numbers: {fix}") from error
    if values.is_meta or values.layout != torch.strided:
        raise UserError(f"{what}: a {'meta' if values.is_meta else 'sparse'} tensor has no pixels: pass a dense one")
    levels = {torch.uint8: 255, torch.uint16: 65535}.get(values.dtype)
    values = values.detach().cpu().float()
    return values if levels is None else values / levels


def _in_range(tensor: Tensor, what: str, fix: str) -> Tensor:
    least, most = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 1.0)
    if not (least >= -1e-3 and most <= 1.001):  # nor where one is NaN
        raise UserError(f"{what}: values outside [0, 1]: {fix}")
    return tensor if least >= 0 and most <= 1 else tensor.clamp(0, 1)  # large pictures are not copied in vain


def _pixels(picture: Image.Image) -> np.ndarray:
    """Return float32 (h, w, 3 or 1) in [0, 1], upright; more than 8 bits are kept. (Files: data.images.read_image.)"""
    picture = ImageOps.exif_transpose(picture)
    deep = _levels(picture)
    if deep is None:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return deep[..., None] if picture.mode == "1" else np.repeat(deep[..., None], 3, axis=2)


def _levels(picture: Image.Image) -> np.ndarray | None:
    """Return float32 (h, w) in [0, 1] of a picture of other than 8 bits; None for all others."""
    if picture.mode not in ("1", "F") and not picture.mode.startswith("I"):
        return None
    pixels = np.asarray(picture, dtype=np.float32)
    ranges = {"1": [1], "F": [1, 255], "I": [1, 255, 65535]}.get(picture.mode, [65535])
    return pixels / next((most for most in ranges if pixels.max(initial=0) <= most), ranges[-1])
