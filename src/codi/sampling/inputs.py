"""Conversion of a caller's images and masks to tensors, and of results to the requested type."""

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
    """Convert images to float32 (B, C, h, w) in [0, 1] on the CPU.

    Takes a tensor (B, C, h, w) or (C, h, w), an array (B, h, w, C), (h, w, C) or (h, w), a PIL image (C = 3; C = 1 for
    1-bit images such as edge maps), or a list of any of these. Integers of 8 or 16 bits are levels. PIL images of 32
    bits (modes "F" and "I") are scaled from the smallest range that holds them: 0 to 1, 255 or, "I" only, 65535.

    Raises UserError for another shape or range. The task checks C.
    """
    return _in_range(_batch(image, _picture, "image", "pictures"), "image", "scale the picture to that range")


def to_mask(mask: Any) -> Tensor:
    """Convert masks, 1 (white) = inpaint, to float32 (B, 1, h, w) in [0, 1].

    Takes a tensor or array (h, w), (B, h, w) or (B, 1, h, w), an array (h, w, 1) or (B, h, w, 1), a PIL image, or a
    list of any of these. Raises UserError for another shape or range.
    """
    return _in_range(_batch(mask, _mask, "mask", "masks"), "mask", "1 marks pixels to repaint, 0 pixels to keep")


def _batch(value: Any, convert: Callable[[Any], Tensor], noun: str, plural: str) -> Tensor:
    """Convert one image or mask, or a list of them, to one batch."""
    if not isinstance(value, (list, tuple)):
        return convert(value)
    if not value:
        raise UserError(f"{noun}: an empty list: pass at least one")
    tensors = [_batch(item, convert, noun, plural) for item in value]
    if len({tensor.shape[1:] for tensor in tensors}) != 1:
        raise UserError(f"{noun}: {plural} of one call must have one size: call once for each size")
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _picture(image: Any) -> Tensor:
    """Convert one array, tensor or PIL image to (B, C, h, w)."""
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
    """Convert one array, tensor or PIL image to a mask (B, 1, h, w)."""
    if isinstance(mask, Image.Image):
        picture = ImageOps.exif_transpose(mask)
        levels = _levels(picture)
        mask = np.asarray(picture.convert("L")) if levels is None else levels
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
    """Return a hint on how to get a mask from an array or tensor of this shape."""
    fix = "pass one channel, (h, w) or (B, 1, h, w)"
    if len(shape) not in (3, 4):
        return fix
    return f"{fix}, such as {'mask[..., 0]' if shape[-1] < 5 else 'mask[:, :1]' if len(shape) == 4 else 'mask[:1]'}"


def _masks_for(pictures: Tensor, mask: Any) -> Tensor:
    """Return one mask, or one per image. Raises UserError for any other number."""
    masks = to_mask(mask)
    if len(masks) not in (1, len(pictures)):
        shape = getattr(mask, "shape", None)
        noun = "mask" if shape is None else f"mask of shape {tuple(shape)}"
        fix = "pass one, or one for each" if shape is None else _mask_fix(tuple(shape))
        raise UserError(f"{noun}: {len(masks)} masks for a batch of {len(pictures)}: {fix}")
    return masks


def inputs_of(
    tasks: dict[str, Task], image: ImageInput | dict[str, Any] | None, mask: Any, size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Return the input of each task, by the name of its adapter. `size` (h, w) is the output size for tasks without an
    input image; None if the images of other tasks set it.

    Raises UserError for an image or mask that is missing, superfluous, or not of the kind that its task takes.
    """
    image_tasks = [name for name, task in tasks.items() if task.name != "generate"]
    images = image if isinstance(image, dict) else {name: image for name in image_tasks or tasks if image is not None}
    if len(image_tasks) > 1 and not isinstance(image, dict):
        raise UserError(f"image: {', '.join(image_tasks)} take one each: pass image={{name: picture}}")
    if unknown := set(images) - set(tasks):
        raise UserError(f"image: {sorted(unknown)[0]!r} is no adapter that is set: use {', '.join(tasks)}")
    if missing := [name for name in image_tasks if images.get(name) is None]:
        raise UserError(f"image: the task {tasks[missing[0]].name!r} needs one: pass image=...")
    masked = [name for name, task in tasks.items() if task.takes_mask]
    if mask is not None and not masked:
        raise UserError(f"mask: {', '.join(tasks) or 'text-to-image'} takes none: leave it out, or set task inpaint")
    pictures = {name: to_tensor(value) for name, value in images.items()}
    masks = {name: _masks_for(pictures[name], mask) for name in masked if mask is not None and name in pictures}
    inputs = {name: tasks[name].bring(picture, masks.get(name)) for name, picture in pictures.items()}
    outputs = {name: output_size(tasks[name], tensor) for name, tensor in inputs.items()}
    if len(set(outputs.values())) > 1:
        sizes = ", ".join(f"{name} {w} x {h} px" for name, (h, w) in outputs.items())
        raise UserError(f"image: the outputs would differ in size ({sizes}): resize the images to one output size")
    height, width = next(iter(outputs.values()), size or (0, 0))
    return {name: inputs[name] if name in inputs else torch.zeros(1, 0, height, width) for name in tasks}


def output_size(task: Task, image: Tensor) -> tuple[int, int]:
    """Return the output size (H, W) for an input image of the task."""
    height, width = image.shape[-2:]
    return height * task.scale, width * task.scale


def to_output(result: Tensor, output_type: str) -> Any:
    """Convert images (B, 3, H, W) in [0, 1], or latents, to `output_type`: pil, np, pt or latent."""
    if output_type in ("pt", "latent"):
        return result
    array = result.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else [Image.fromarray((a * 255).round().astype(np.uint8)) for a in array]


def _floats(values: np.ndarray | Tensor, noun: str) -> Tensor:
    """Convert to float32 on the CPU, integers of 8 or 16 bits scaled to [0, 1]."""
    if isinstance(values, np.ndarray):
        levels = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(values.dtype, 1)
        try:
            return torch.from_numpy(values.astype(np.float32) / levels)
        except (TypeError, ValueError) as error:
            fix = "pass pixels in [0, 1]"
            raise UserError(f"{noun}: an array of {values.dtype} holds no numbers: {fix}") from error
    if values.is_meta or values.layout != torch.strided:
        raise UserError(f"{noun}: a {'meta' if values.is_meta else 'sparse'} tensor has no pixels: pass a dense one")
    levels = {torch.uint8: 255, torch.uint16: 65535}.get(values.dtype)
    values = values.detach().cpu().float()
    return values if levels is None else values / levels


def _in_range(tensor: Tensor, noun: str, fix: str) -> Tensor:
    low, high = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 1.0)
    if not (low >= -1e-3 and high <= 1.001):  # also true for NaN
        raise UserError(f"{noun}: values outside [0, 1]: {fix}")
    return tensor if low >= 0 and high <= 1 else tensor.clamp(0, 1)  # do not copy large images needlessly


def _pixels(picture: Image.Image) -> np.ndarray:
    """Convert to float32 (h, w, 3 or 1) in [0, 1], upright; keep more than 8 bits. (Files: data.images.read_image.)"""
    picture = ImageOps.exif_transpose(picture)
    levels = _levels(picture)
    if levels is None:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return levels[..., None] if picture.mode == "1" else np.repeat(levels[..., None], 3, axis=2)


def _levels(picture: Image.Image) -> np.ndarray | None:
    """Convert an image of other than 8 bits to float32 (h, w) in [0, 1]; return None for one of 8 bits."""
    if picture.mode not in ("1", "F") and not picture.mode.startswith("I"):
        return None
    pixels = np.asarray(picture, dtype=np.float32)
    ranges = {"1": [1], "F": [1, 255], "I": [1, 255, 65535]}.get(picture.mode, [65535])
    return pixels / next((limit for limit in ranges if pixels.max(initial=0) <= limit), ranges[-1])
