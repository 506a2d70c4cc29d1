"""Scenes as data: chunks of rendered samples, and the imagefolder that `codi data render` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest
from .raycast import render
from .scenes import SPLITS, Edit, Scene, sample_edit, sample_scene

COLUMNS = ("conditioning_image", "mask", "edited_image")
FOLDERS = {"conditioning_image": "depth", "mask": "mask", "edited_image": "edited"}  # column -> sub-folder


@dataclass
class Chunk:
    """`image` uint8 (B, 3, S, S); `columns`: `conditioning_image` int32 (B, 1, S, S), depth in millimetres, 0 = sky;
    `mask` uint8 (B, 1, S, S), instance ids, 0 = none; with edits `edited_image` uint8 (B, 3, S, S)."""

    scenes: list[Scene]
    edits: list[Edit]
    image: Tensor
    columns: dict[str, Tensor]


def chunk(size: int, device: str = "cpu") -> int:
    """Scenes to render at a time: on a CPU what fits its cache is fastest, a GPU wants many."""
    return max(1, (4 if device == "cpu" else 512) * 64 * 64 // (size * size))


def check_size(size: int) -> None:
    """Raises UserError for a size that the ray caster does not render."""
    if not 32 <= size <= 512:
        raise UserError(f"size {size}: scenes are rendered from 32 to 512 pixels: choose a size between")


def render_chunk(
    split: str, indices: Sequence[int], size: int, seed: int, edits: bool = True, device: str = "cpu"
) -> Chunk:
    """Renders the scenes with these keys; without `edits` the edits are drawn but not rendered."""
    scenes = [sample_scene(seed, split, i) for i in indices]
    changes = [sample_edit(scene, seed, split, i) for scene, i in zip(scenes, indices, strict=True)]
    out = render(scenes, size, device=device)
    columns = {"conditioning_image": (out.depth * 1000).round().int()[:, None], "mask": out.mask[:, None]}
    if edits:
        columns["edited_image"] = render([e.target for e in changes], size, device=device).image
    return Chunk(scenes, changes, out.image.cpu(), {name: column.cpu() for name, column in columns.items()})


def render_folder(
    count: int,
    folder: str | Path,
    size: int = 64,
    split: str = "train",
    seed: int = 0,
    edits: bool = True,
    start: int = 0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes scenes `start` ... `start + count - 1` of (`seed`, `split`) as an imagefolder; returns its metadata.jsonl.

    000000.png (8-bit RGB), depth/000000.png (16-bit millimetres, 0 = sky), mask/000000.png (16-bit instance ids,
    0 = none), with `edits` edited/000000.png (the scene after `instruction`), and metadata.jsonl: a line a scene with
    all the numbers that made it. metadata.jsonl is written last, so that a folder without one is an interrupted
    render. Same arguments, same bytes. `progress` is told the number of scenes done so far.
    Raises UserError for a count, size, split or seed that cannot be rendered, for a folder that is not empty (unless
    `overwrite`) and for one that cannot be written.
    """
    folder = Path(folder)
    check_size(size)
    if split not in SPLITS:
        raise UserError(f"{split}: unknown split{nearest(split, SPLITS)}: use one of {', '.join(SPLITS)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("start", start, 0)):
        if value < least:
            raise UserError(f"{name} {value}: too small: give at least {least}")
    metadata = folder / "metadata.jsonl"
    try:
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise UserError(f"{folder}: not empty: name a new folder, or allow --overwrite")
        for sub in ("", *(FOLDERS[c] for c in COLUMNS[: 2 + edits])):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        metadata.unlink(missing_ok=True)
        lines = []
        for rows in _rendered(folder, range(start, start + count), size, split, seed, edits):
            lines += rows
            if progress is not None:
                progress(len(lines))
        partial = folder / "metadata.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        os.replace(partial, metadata)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}): choose a folder with room and rights"
        ) from None
    return metadata


def _rendered(folder: Path, indices: range, size: int, split: str, seed: int, edits: bool) -> Iterator[list[dict]]:
    """Renders and writes chunk after chunk; yields the metadata rows in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks are too small to share out: more threads only wait for one another
    try:
        for at in range(0, len(indices), chunk(size)):
            mine = indices[at : at + chunk(size)]
            yield _write(folder, mine, render_chunk(split, mine, size, seed, edits))
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path, indices: Sequence[int], out: Chunk) -> list[dict]:
    rows = []
    for k, index in enumerate(indices):
        name, scene, edit = f"{index:06d}.png", out.scenes[k], out.edits[k]
        _write_png(folder / name, out.image[k])
        row = {"file_name": name, "text": scene.caption}
        for column, pixels in out.columns.items():
            _write_png(folder / FOLDERS[column] / name, pixels[k])
            row[column] = f"{FOLDERS[column]}/{name}"
        if "edited_image" in out.columns:
            row |= {"instruction": edit.instruction, "edit": edit.kind, "edited_text": edit.target.caption}
        rows.append(row | {"scene": asdict(scene)})
    return rows


def _write_png(path: Path, pixels: Tensor) -> None:
    """(3, H, W) uint8 as 8-bit RGB, (1, H, W) of any integer type as 16-bit grey; fast rather than small."""
    grid = pixels.permute(1, 2, 0).numpy()
    grid = np.ascontiguousarray(grid[..., ::-1]) if grid.shape[2] == 3 else grid.astype(np.uint16)
    path.write_bytes(cv2.imencode(".png", grid, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
