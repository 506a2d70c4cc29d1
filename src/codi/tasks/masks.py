"""Masks of the part of an image to inpaint: drawn at random for training, or read from files."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import Picture, read_image
from ..errors import UserError

KINDS = ("boxes", "strokes", "objects", "outpaint")
FULL_SHARE = 0.05  # of masks, that cover everything: only the prompt remains
GREY = 0.25  # share of grey pixels above which a mask file is suspicious: soft edges have less
EMPTY_SHARE = 0.01  # of masks, that cover nothing: the output must equal the image


def draw_masks(
    kinds: Sequence[str], height: int, width: int, seeds: Sequence[int], ids: Tensor | None = None
) -> Tensor:
    """Draw masks (B, 1, height, width) of 0 and 1 (inpaint), one per seed, each of a random kind of `kinds`.

    `ids` (B, 1, height, width) are instance ids, 0 = none, which "objects" needs; an image without instances gets boxes
    instead.
    """
    masks = []
    for k, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        if (chance := rng.random()) < FULL_SHARE + EMPTY_SHARE:
            mask = np.full((height, width), float(chance < FULL_SHARE), np.float32)
        else:
            kind = kinds[int(rng.integers(len(kinds)))]
            mask = _objects(ids[k, 0], rng) if kind == "objects" and ids is not None else None
            mask = DRAW.get(kind, _boxes)(height, width, rng) if mask is None else mask
        masks.append(torch.from_numpy(mask)[None])
    return torch.stack(masks)


def _boxes(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one to three boxes of an eighth to three fifths of each side."""
    mask = np.zeros((height, width), np.float32)
    for _ in range(1 + int(rng.choice(3, p=(0.6, 0.25, 0.15)))):
        h, w = (max(1, round(side * rng.uniform(0.125, 0.6))) for side in (height, width))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        mask[top : top + h, left : left + w] = 1
    return mask


def _strokes(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one to four random walks of a round brush."""
    mask = np.zeros((height, width), np.uint8)
    side = min(height, width)
    for _ in range(int(rng.integers(1, 5))):
        at = rng.uniform((0, 0), (width, height))
        angle, brush = rng.uniform(0, 2 * math.pi), max(1, round(side * rng.uniform(0.04, 0.16)))
        for _ in range(int(rng.integers(2, 9))):
            angle += rng.normal(0, 0.9)
            step = side * rng.uniform(0.05, 0.3)
            to = np.clip(at + step * np.array((math.cos(angle), math.sin(angle))), 0, (width - 1, height - 1))
            start, end = ((int(x), int(y)) for x, y in (at, to))
            cv2.line(mask, start, end, 1, brush, cv2.LINE_8)
            cv2.circle(mask, end, brush // 2, 1, -1)
            at = to
    return mask.astype(np.float32)


def _outpaint(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Mask all but a window, or a strip along one side."""
    mask = np.zeros((height, width), np.float32)
    if rng.random() < 0.5:
        mask[:] = 1
        h, w = (max(1, round(side * rng.uniform(0.4, 0.85))) for side in (height, width))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        mask[top : top + h, left : left + w] = 0
        return mask
    rotated = np.rot90(mask, int(rng.integers(4)))  # a view: writing to it changes mask
    rotated[: max(1, round(rotated.shape[0] * rng.uniform(0.15, 0.6)))] = 1
    return mask


def _objects(ids: Tensor, rng: np.random.Generator) -> np.ndarray | None:
    """Mask one instance, sometimes two, dilated to a loose outline like a hand-drawn one; None without instances."""
    grid = ids.cpu().numpy()
    instances = np.unique(grid[grid > 0])
    if len(instances) > 64:  # the values are a soft mask, not ids
        instances, grid = np.ones(1), (grid > grid.max() / 2).astype(np.float32)
    if not len(instances):
        return None
    chosen = rng.choice(instances, size=min(len(instances), 1 + int(rng.random() < 0.25)), replace=False)
    mask = np.isin(grid, chosen).astype(np.uint8)
    diameter = 2 * int(rng.integers(0, max(2, round(min(mask.shape) * 0.06)) + 1)) + 1
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))).astype(np.float32)


DRAW: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "boxes": _boxes,
    "strokes": _strokes,
    "outpaint": _outpaint,
}


def read_mask(path: str | os.PathLike[str], size: tuple[int, int]) -> Tensor:
    """Read a mask file as (1, H, W) of 0 and 1 (inpaint) for an image of `size` (H, W).

    White means inpaint, in any color model and bit depth. With transparency: strokes of one color on a transparent
    ground mean inpaint; in a photo with erased parts, these parts do. A mask of another resolution is resized, a pixel
    counting as marked if any part of it is. A file without white (for example of values 0 and 1) is thresholded at half
    of its maximum, with a warning.

    Raises UserError for a file that cannot be read, is a photo, or has another aspect ratio than the image.
    """
    picture = read_image(path)
    height, width = picture.rgb.shape[-2:]
    if abs(width * size[0] - height * size[1]) > max(width, height, *size):
        raise UserError(f"{path}: {width} x {height} px does not fit the picture of {size[1]} x {size[0]}: "
                        "give a mask of its shape")  # fmt: skip
    return F.adaptive_max_pool2d(_marks(picture).float(), size)


def _marks(picture: Picture) -> Tensor:
    """Return the part to inpaint, bool (1, H, W)."""
    bright = picture.rgb.amax(0, keepdim=True)  # the maximum, not grey: pure red or blue strokes count like white
    clear = torch.zeros_like(bright, dtype=torch.bool) if picture.alpha is None else picture.alpha < 0.5
    if clear.all():
        raise UserError(f"{picture.path}: is wholly transparent: give black with white where to repaint")
    if clear.any():
        visible = picture.rgb[:, ~clear[0]]
        if bool((visible.amax(1) - visible.amin(1) < 0.1).all()):
            return ~clear
        if _is_photo(visible):
            return clear
    elif _is_photo(picture.rgb.flatten(1)):
        raise UserError(f"{picture.path}: looks like a photo, not a mask: give black with white where to repaint")
    bright, threshold = bright.masked_fill(clear, 0), 0.5
    if 0 < (top := float(bright.max())) <= 0.5:
        warnings.warn(f"{picture.path}: has no white: masked what is brighter than {top / 2:.3g} of 1", stacklevel=3)
        threshold = top / 2
    elif float(((bright > 0.1) & (bright < 0.9)).float().mean()) > GREY:
        warnings.warn(
            f"{picture.path}: is grey rather than black and white: masked what is brighter than half", stacklevel=3
        )
    return bright > threshold


def _is_photo(pixels: Tensor) -> bool:
    """Return whether pixels (3, N) have more than 64 colors, at 4 bits a channel: more than a drawn mask has."""
    coloured = pixels[:, (pixels.amax(0) - pixels.amin(0)) > 0.1]
    return len(torch.unique((coloured * 15).round(), dim=1).T) > 64
