"""Rendering of scenes as data: chunks of samples, and the imagefolder that `codi data render` writes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..files import LOCK, locked, remove_leftovers, write_file
from .raycast import render
from .scenes import SPLITS, Edit, Scene, sample_edit, sample_scene

COLUMNS = ("conditioning_image", "mask", "edited_image")
FOLDERS = {"conditioning_image": "depth", "mask": "mask", "edited_image": "edited"}  # column -> sub-folder
PNG_END = b"IEND\xaeB`\x82"


@dataclass
class Chunk:
    """Rendered scenes: `image` is uint8 (B, 3, S, S).

    `columns`: `conditioning_image` int32 (B, 1, S, S), depth in millimeters, 0 = sky; `mask` uint8 (B, 1, S, S),
    instance ids, 0 = none; with edits `edited_image` uint8 (B, 3, S, S).
    """

    scenes: list[Scene]
    edits: list[Edit]
    image: Tensor
    columns: dict[str, Tensor]


def chunk(size: int, device: str = "cpu") -> int:
    """Return the number of scenes to render at once: few on a CPU, so that they fit its cache, many on a GPU."""
    return max(1, (4 if device == "cpu" else 512) * 64 * 64 // (size * size))


def check_size(size: int) -> None:
    """Raise UserError for a size that the ray caster does not support."""
    if not 32 <= size <= 512:
        raise UserError(f"size {size}: scenes are rendered from 32 to 512 pixels: choose a size between")


def render_chunk(
    split: str, indices: Sequence[int], size: int, seed: int, edits: bool = True, device: str = "cpu"
) -> Chunk:
    """Render the scenes with keys (`seed`, `split`, index); without `edits`, edits are drawn but not rendered."""
    scenes = [sample_scene(seed, split, i) for i in indices]
    drawn_edits = [sample_edit(scene, seed, split, i) for scene, i in zip(scenes, indices, strict=True)]
    out = render(scenes, size, device=device)
    columns = {"conditioning_image": (out.depth * 1000).round().int()[:, None], "mask": out.mask[:, None]}
    if edits:
        columns["edited_image"] = render([e.target for e in drawn_edits], size, device=device).image
    return Chunk(scenes, drawn_edits, out.image.cpu(), {name: column.cpu() for name, column in columns.items()})


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
    """Write scenes `start` ... `start + count - 1` of (`seed`, `split`) as an imagefolder; return its metadata.jsonl.

    The files are 000000.png (8-bit RGB), depth/000000.png (16-bit millimeters, 0 = sky), mask/000000.png (16-bit
    instance ids, 0 = none), with `edits` edited/000000.png (the scene after `instruction`), and metadata.jsonl: a line
    per scene with all its parameters, and its files under the names that `datasets` uses (`mask_file_name`).
    metadata.jsonl is written first and every file atomically, so after an interruption it names missing files, and
    readers refuse the folder; the same arguments complete it. The same arguments give the same bytes. `progress` is
    called with the number of scenes done so far.
    Raises UserError for a count, size, split or seed that cannot be rendered, for a folder with other content (unless
    `overwrite`), for one into which another process renders, and for one that cannot be written.
    """
    folder = Path(folder)
    check_size(size)
    if split not in SPLITS:
        raise UserError(f"{split}: unknown split{nearest(split, SPLITS)}: use one of {', '.join(SPLITS)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("start", start, 0)):
        if value < least:
            raise UserError(f"{name} {value}: too small: give at least {least}")
    metadata = folder / "metadata.jsonl"
    rows = {index: _row(index, size, split, seed, edits) for index in range(start, start + count)}
    text = "".join(json.dumps(row) + "\n" for row in rows.values()).encode()
    try:
        with locked(folder, "another process renders into it: wait, or name another folder"):
            for sub in ("", *FOLDERS.values()):
                remove_leftovers(folder / sub, r"metadata\.jsonl|\d{6,}\.png")
            if overwrite or not metadata.is_file() or metadata.read_bytes() != text:
                if {file.name for file in folder.iterdir()} - {LOCK} and not overwrite:
                    raise UserError(f"{folder}: not empty: name a new folder, or allow --overwrite")
                for row in rows.values():  # before new metadata names them, since they may show other scenes
                    for file in _files(folder, row).values():
                        file.unlink(missing_ok=True)
                write_file(metadata, lambda temporary: temporary.write_bytes(text))
            for done in _render_missing(folder, rows, size, split, seed, edits):
                if progress is not None:
                    progress(done)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}): choose a folder with enough space and write permission"
        ) from None
    return metadata


def _row(index: int, size: int, split: str, seed: int, edits: bool) -> dict[str, Any]:
    """Return the metadata row of a scene."""
    scene, name = sample_scene(seed, split, index), f"{index:06d}.png"
    row: dict[str, Any] = {"file_name": name, "text": scene.caption}
    row |= {f"{column}_file_name": f"{FOLDERS[column]}/{name}" for column in COLUMNS[: 2 + edits]}
    if edits:
        edit = sample_edit(scene, seed, split, index)
        row |= {"instruction": edit.instruction, "edit": edit.kind, "edited_text": edit.target.caption}
    return row | {"size": size, "scene": asdict(scene)}


def _files(folder: Path, row: dict[str, Any]) -> dict[str, Path]:
    """Return the files of a scene as "image" or column -> path."""
    columns = {column: row[key] for column in COLUMNS if (key := f"{column}_file_name") in row}
    return {"image": folder / row["file_name"]} | {column: folder / name for column, name in columns.items()}


def _render_missing(
    folder: Path, rows: dict[int, dict[str, Any]], size: int, split: str, seed: int, edits: bool
) -> Iterator[int]:
    """Render and write the missing files, chunk by chunk; yield the number of scenes done."""
    threads, indices = torch.get_num_threads(), list(rows)
    torch.set_num_threads(1)  # chunks are too small for several threads
    try:
        for start in range(0, len(indices), chunk(size)):
            chunk_indices = indices[start : start + chunk(size)]
            files = [_files(folder, rows[index]) for index in chunk_indices]
            if not all(_is_complete(file) for group in files for file in group.values()):
                out = render_chunk(split, chunk_indices, size, seed, edits)
                for k, group in enumerate(files):
                    for column, file in group.items():
                        data = _png(out.image[k] if column == "image" else out.columns[column][k])
                        # Flushing each would take longer than rendering, and _is_complete detects truncated files.
                        write_file(file, functools.partial(Path.write_bytes, data=data), durable=False)
            yield start + len(chunk_indices)
    finally:
        torch.set_num_threads(threads)


def _is_complete(file: Path) -> bool:
    """Return True if a PNG exists and was not truncated, e.g. by a loss of power."""
    try:
        with file.open("rb") as stream:
            stream.seek(-len(PNG_END), os.SEEK_END)
            return stream.read() == PNG_END
    except OSError:
        return False


def _png(pixels: Tensor) -> bytes:
    """Encode (3, H, W) uint8 as 8-bit RGB PNG, (1, H, W) of any integer type as 16-bit grey, with fast compression."""
    grid = pixels.permute(1, 2, 0).numpy()
    grid = np.ascontiguousarray(grid[..., ::-1]) if grid.shape[2] == 3 else grid.astype(np.uint16)
    return cv2.imencode(".png", grid, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
