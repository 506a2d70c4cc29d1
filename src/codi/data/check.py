"""A look at a data set before training: how many pictures, how large, what is missing or broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .crops import load_picture, why_unreadable
from .samples import CorruptSample, PictureSource
from .sources import open_source


@dataclass
class FolderReport:
    """What `check_folder` found. Sides are shorter sides in pixels, over the readable pictures."""

    images: int
    side_min: int = 0
    side_median: int = 0
    side_max: int = 0
    captions_missing: int = 0
    corrupt: list[CorruptSample] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)


def check_folder(folder: str | Path, task: str = "upscale", size: int = 64) -> FolderReport:
    """Reads every picture of a folder (or .tar files) in full. For task `upscale`, `too_small` names those that would
    have to be enlarged to `size`, the training size: they teach blur. Raises UserError as `open_source` does."""
    source = open_source(folder)
    if not isinstance(source, PictureSource):
        raise UserError(f"{folder}: not files: name a folder of pictures or .tar files")
    report, sides = FolderReport(len(source)), []
    for index in range(len(source)):
        try:
            row = source.row(index)
            side = min(load_picture(row.image).size)
        except Exception as error:  # whatever a decoder raises on damaged bytes
            report.corrupt.append(CorruptSample(index, source.name(index), why_unreadable(error)))
            continue
        sides.append(side)
        report.captions_missing += not row.text
        if task == "upscale" and side < size:
            report.too_small.append(source.name(index))
    if sides:
        report.side_min, report.side_median, report.side_max = min(sides), int(median(sides)), max(sides)
    return report


def contact_sheet(images: Sequence[Tensor], columns: int, gap: int = 2) -> Image.Image:
    """Pictures, float (3, H, W) in [0, 1], side by side in rows of `columns`, on white. Sizes may differ: each cell is
    as large as the largest. Raises ValueError for no pictures or no columns."""
    if not len(images) or columns < 1:
        raise ValueError(f"{len(images)} pictures in {columns} columns: at least one of each is needed")
    height, width = max(i.shape[-2] for i in images) + gap, max(i.shape[-1] for i in images) + gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for at, image in enumerate(images):
        top, left = at // columns * height + gap, at % columns * width + gap
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return Image.fromarray(sheet)
