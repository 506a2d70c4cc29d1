"""What the reader says about generated pictures: judges for `codi.evaluation.evaluate`, and figures for captions.

A judge maps (output, given, batch) to named figures (B,), higher is better, NaN where a sample has nothing to measure.
`Read` is how it sees: `functools.partial(reading.read, reading.load_reader())`, or anything that answers alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from reading import LEAST_PIXELS, Found, Reading
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from codi.data.batches import Batch
from codi.data.scenes import COLOURS, MATERIALS, SHAPES, SIZES
from codi.tasks.base import CAP

Read = Callable[[Tensor], Reading]
Judge = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
Attributes = tuple[str, str, str]  # colour, shape, material

_PHRASE = re.compile(rf"\b(?:{'|'.join(SIZES)}) ({'|'.join(MATERIALS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def asked(caption: str) -> list[Attributes]:
    """The objects of a scene's caption, in its order, which is that of the instance ids (1, 2, ...)."""
    return [(colour, shape, material) for material, colour, shape in _PHRASE.findall(caption)]


def match(found: Sequence[Found], wanted: Sequence[Attributes]) -> list[Found | None]:
    """For each object wanted the read object that stands for it, or None: the one-to-one assignment that agrees in most
    attributes, and among equals in the order from left to right (captions follow metres, which perspective may swap, so
    the order alone would be no fair rule)."""
    if not found or not wanted:
        return [None] * len(wanted)
    score = np.array(
        [
            [sum(a == b for a, b in zip(f.attributes, w, strict=True)) - 0.01 * abs(i - j) for i, f in enumerate(found)]
            for j, w in enumerate(wanted)
        ]
    )
    answer: list[Found | None] = [None] * len(wanted)
    for j, i in zip(*linear_sum_assignment(score, maximize=True), strict=True):
        answer[j] = found[i]
    return answer


def caption_figures(reading: Reading, captions: Sequence[str]) -> dict[str, Tensor]:
    """How well pictures show their captions, (B,) each.

    `all`: the right number of objects, each with colour, shape and material as asked (0 or 1); `count`: the number
    alone; `colour`, `shape`, `material`: the share of the objects asked for whose match has it (a missing one has not).
    """
    rows = []
    for found, caption in zip(reading.objects, captions, strict=True):
        wanted = asked(caption)
        pairs = list(zip(match(found, wanted), wanted, strict=True))
        agree = [[f is not None and f.attributes[k] == w[k] for f, w in pairs] for k in range(3)]
        shares = [sum(a) / len(a) if a else float("nan") for a in agree]
        count = len(found) == len(wanted)
        rows.append([float(count and all(all(a) for a in agree)), float(count), *shares])
    columns = torch.tensor(rows, dtype=torch.float64).T
    return dict(zip(("all", "count", "colour", "shape", "material"), columns, strict=True))


def caption_judge(read: Read) -> Judge:
    """Does the picture show its caption? Figures of `caption_figures`, named caption_..."""

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {f"caption_{key}": value for key, value in caption_figures(read(output), batch.text).items()}

    return judge


def hole_judge(read: Read) -> Judge:
    """Inpainting: `hole_objects`, the share of the objects that belong in the hole (two thirds of their visible pixels
    lie in it) whose colour and shape the result shows there (by an object that has half of its pixels in it, so that an
    outline read a little differently changes nothing); `hole_colours`, of their colours alone. One read object stands
    for one asked for. Needs the data column `mask`."""

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading, ids = read(output), batch.extras["mask"][:, 0].long()
        hole = given[:, 3] > 0.5
        rows = []
        for b, objects in enumerate(asked(text) for text in batch.text):
            inside = _inside(ids[b], len(objects), hole[b], 2 / 3)
            wanted = [a for a, inner in zip(objects, inside, strict=True) if inner]
            inside = _inside(reading.instances[b], len(reading.objects[b]), hole[b], 1 / 2)
            found = [f.attributes for f, inner in zip(reading.objects[b], inside, strict=True) if inner]
            rows.append([_share(wanted, found, 2), _share(wanted, found, 1)])
        columns = torch.tensor(rows, dtype=torch.float64).T
        return {"hole_objects": columns[0], "hole_colours": columns[1]}

    return judge


def depth_judge(read: Read) -> Judge:
    """Depth: `depth_db`, -10 log10 of the mean squared error of the disparity read in the result to the one given;
    `depth_closeness`, 1 - its mean absolute error; and whether the picture shows its caption."""

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        reading = read(output)
        error = (reading.disparity - given[:, 0].to(reading.disparity)).double()
        squared = error.square().mean((1, 2)).clamp_min(1e-12)
        return {
            "depth_db": (-10 * squared.log10()).clamp_max(CAP),
            "depth_closeness": 1 - error.abs().mean((1, 2)),
            **{f"caption_{key}": value for key, value in caption_figures(reading, batch.text).items()},
        }

    return judge


def _inside(ids: Tensor, count: int, region: Tensor, share: float) -> list[bool]:
    """For each instance 1 ... count of `ids` (S, S): is it seen, and that share of it in `region` (S, S)?"""
    area = ids.flatten().bincount(minlength=count + 1)[1 : count + 1]
    inner = ids[region].bincount(minlength=count + 1)[1 : count + 1]
    return ((area >= LEAST_PIXELS * ids.numel() / 64**2) & (inner >= share * area)).tolist()


def _share(wanted: list[Attributes], found: list[Attributes], attributes: int) -> float:
    """The share of `wanted` that is among `found`, as multisets of the first so many attributes; NaN for none."""
    if not wanted:
        return float("nan")
    have = Counter(f[:attributes] for f in found)
    return (Counter(w[:attributes] for w in wanted) & have).total() / len(wanted)
