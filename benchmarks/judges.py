"""Judges of generated images by the scene reader, for `codi.evaluation.evaluate`, and caption accuracy.

A judge maps (output, inputs, batch) to named figures (B,), higher is better, NaN where a sample has nothing to measure.
`Read` is the reading function: `functools.partial(reading.read, reading.load_reader())` or one of the same signature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from reading import LEAST_PIXELS, DetectedObject, Reading
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from codi.data.batches import Batch
from codi.data.scenes import COLOURS, MATERIALS, SHAPES, SIZES
from codi.tasks.base import CAP

Read = Callable[[Tensor], Reading]
Judge = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
Attributes = tuple[str, str, str]  # colour, shape, material

_PHRASE = re.compile(rf"\b(?:{'|'.join(SIZES)}) ({'|'.join(MATERIALS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def caption_objects(caption: str) -> list[Attributes]:
    """Return the objects of a scene's caption, in its order, which is that of the instance ids (1, 2, ...)."""
    return [(colour, shape, material) for material, colour, shape in _PHRASE.findall(caption)]


def match(detected: Sequence[DetectedObject], expected: Sequence[Attributes]) -> list[DetectedObject | None]:
    """Return the detected object matched to each expected one, or None: the one-to-one assignment with the most equal
    attributes; ties prefer the same order from left to right. (Captions order objects by position in meters, which
    perspective may swap, so order alone would not be a fair rule.)"""
    if not detected or not expected:
        return [None] * len(expected)
    score = np.array(
        [
            [
                sum(a == b for a, b in zip(f.attributes, w, strict=True)) - 0.01 * abs(i - j)
                for i, f in enumerate(detected)
            ]
            for j, w in enumerate(expected)
        ]
    )
    matches: list[DetectedObject | None] = [None] * len(expected)
    for j, i in zip(*linear_sum_assignment(score, maximize=True), strict=True):
        matches[j] = detected[i]
    return matches


def caption_figures(reading: Reading, captions: Sequence[str]) -> dict[str, Tensor]:
    """Return how well images show their captions, (B,) each.

    `all`: the right number of objects, each with the caption's color, shape and material (0 or 1); `count`: the number
    alone; `colour`, `shape`, `material`: the share of the caption's objects whose match has it (missing ones do not).
    """
    rows = []
    for detected, caption in zip(reading.objects, captions, strict=True):
        expected = caption_objects(caption)
        pairs = list(zip(match(detected, expected), expected, strict=True))
        agree = [[f is not None and f.attributes[k] == w[k] for f, w in pairs] for k in range(3)]
        shares = [sum(a) / len(a) if a else float("nan") for a in agree]
        count = len(detected) == len(expected)
        rows.append([float(count and all(all(a) for a in agree)), float(count), *shares])
    columns = torch.tensor(rows, dtype=torch.float64).T
    return dict(zip(("all", "count", "colour", "shape", "material"), columns, strict=True))


def caption_judge(read: Read) -> Judge:
    """Return a judge of whether images show their captions: `caption_figures`, with names caption_..."""

    def judge(output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {f"caption_{key}": value for key, value in caption_figures(read(output), batch.text).items()}

    return judge


def hole_judge(read: Read) -> Judge:
    """Return a judge of inpainting. `hole_objects`: of the true objects with at least two thirds of their visible
    pixels in the hole, the share whose color and shape a detected object in the hole has; `hole_colours`: the same for
    color alone. A detected object counts for one true object, and is in the hole with half of its pixels, so that small
    differences of outlines change nothing. Needs the data column `mask`."""

    def judge(output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading, ids = read(output), batch.extras["mask"][:, 0].long()
        hole = inputs[:, 3] > 0.5
        rows = []
        for b, objects in enumerate(caption_objects(text) for text in batch.text):
            inside = _inside(ids[b], len(objects), hole[b], 2 / 3)
            expected = [attributes for attributes, keep in zip(objects, inside, strict=True) if keep]
            inside = _inside(reading.instances[b], len(reading.objects[b]), hole[b], 1 / 2)
            detected = [o.attributes for o, keep in zip(reading.objects[b], inside, strict=True) if keep]
            rows.append([_share(expected, detected, 2), _share(expected, detected, 1)])
        columns = torch.tensor(rows, dtype=torch.float64).T
        return {"hole_objects": columns[0], "hole_colours": columns[1]}

    return judge


def depth_judge(read: Read) -> Judge:
    """Return a judge of depth. `depth_db`: -10 log10 of the mean squared error of the disparity read from the result to
    the input disparity; `depth_closeness`: 1 - the mean absolute error; and the figures of `caption_judge`."""

    def judge(output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading = read(output)
        error = (reading.disparity - inputs[:, 0].to(reading.disparity)).double()
        squared = error.square().mean((1, 2)).clamp_min(1e-12)
        return {
            "depth_db": (-10 * squared.log10()).clamp_max(CAP),
            "depth_closeness": 1 - error.abs().mean((1, 2)),
            **{f"caption_{key}": value for key, value in caption_figures(reading, batch.text).items()},
        }

    return judge


def _inside(ids: Tensor, count: int, region: Tensor, share: float) -> list[bool]:
    """Return for each instance 1 ... count of `ids` (S, S) whether it is visible and at least `share` of it in
    `region`."""
    area = ids.flatten().bincount(minlength=count + 1)[1 : count + 1]
    inner = ids[region].bincount(minlength=count + 1)[1 : count + 1]
    return ((area >= LEAST_PIXELS * ids.numel() / 64**2) & (inner >= share * area)).tolist()


def _share(expected: list[Attributes], detected: list[Attributes], attributes: int) -> float:
    """Return the share of `expected` that is in `detected`, as multisets of the first `attributes` attributes; NaN if
    nothing is expected."""
    if not expected:
        return float("nan")
    available = Counter(d[:attributes] for d in detected)
    return (Counter(e[:attributes] for e in expected) & available).total() / len(expected)
