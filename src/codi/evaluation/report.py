"""Evaluation results as tables, as JSON and as a contact sheet of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor

from ..files import write_file
from .evaluate import Results

# heading, field of Row, format; the arrow points to the better direction
COLUMNS = (
    ("method", "method", "s"),
    ("steps", "steps", "d"),
    ("PSNR dB ↑", "psnr", ".2f"),
    ("SSIM ↑", "ssim", ".4f"),
    ("ENLite0 distance ↓", "distance", ".4f"),
    ("FD-ENLite0 ↓", "fd", ".3f"),
    ("obedience ↑", "obedience", ".4g"),  # dB or a fraction
    ("latency ms ↓", "latency_ms", ".1f"),
)


def heads(results: Results) -> list[str]:
    """Return the table's headings: `COLUMNS`, then all measures but the first, which is the obedience."""
    return [*(head for head, _, _ in COLUMNS), *(f"{name} ↑" for name in _further(results))]


def cells(results: Results) -> list[list[str]]:
    """Return the table's rows as text, in the order of `heads`; "-" for what was not measured."""
    return [
        [_cell(getattr(row, name), form) for _, name, form in COLUMNS]
        + [_cell(row.measures.get(name), ".4g") for name in _further(results)]
        for row in results.rows
    ]


def _further(results: Results) -> list[str]:
    return list(dict.fromkeys(name for row in results.rows for name in row.measures))[1:]


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def caption(results: Results) -> str:
    """Return one line with the task, number of samples, seed, unit of obedience and machine."""
    machine = results.machine
    hardware = machine.get("gpu") or f"{machine.get('cpus')} CPUs, {machine.get('threads')} threads"
    unit = f"; obedience: {results.obedience_unit}" if results.obedience_unit else ""
    return f"{results.task}, {results.count} held-out samples, seed {results.seed}{unit}; {hardware}"


def markdown_table(results: Results) -> str:
    """Return the results as a table in GitHub-flavored Markdown, with its caption below."""
    titles = heads(results)
    rules = ["---"] + ["---:"] * (len(titles) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, rules, *cells(results))]
    return "\n".join(lines) + f"\n\n{caption(results)}\n"


def rich_table(results: Results) -> Table:
    """Return the results as a rich table, for the terminal."""
    table = Table(caption=caption(results), caption_justify="left")
    for number, head in enumerate(heads(results)):
        table.add_column(head, justify="right" if number else "left", no_wrap=number == 0, overflow="fold")
    for row in cells(results):
        table.add_row(*row)
    return table


def write_json(content: Results | Mapping[str, Any], path: str | Path) -> Path:
    """Write results (or any JSON-serializable mapping) to `path`, atomically. Raises `UserError` if that fails."""
    data = content.to_json() if isinstance(content, Results) else content
    return write_text(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path`, atomically. Raises `UserError` if that fails."""
    path = Path(path)
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def contact_sheet(columns: Mapping[str, Tensor], side: int | None = None, gap: int = 4) -> Image.Image:
    """Return a sheet with a row per sample and a labelled column per name, of (K, C, H, W) in [0, 1] each, such as
    `Results.pictures`.

    The larger side of each image is scaled to `side` pixels (by default the largest side of all images, at least 96),
    enlarged without smoothing, so that pixels of small inputs stay visible. One channel is shown as grey; of more than
    three channels, the first three are shown.
    """
    if not columns or len({len(pictures) for pictures in columns.values()}) != 1:
        raise ValueError("a contact sheet needs columns with the same number of images")
    side = side or max(96, *(max(pictures.shape[-2:]) for pictures in columns.values()))
    font = ImageFont.load_default(size=max(10, side // 9))
    head = round(font.getbbox("Ag")[3]) + 2 * gap
    rows = len(next(iter(columns.values())))
    sheet = Image.new("RGB", (len(columns) * (side + gap) + gap, head + rows * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pictures) in enumerate(columns.items()):
        left = gap + column * (side + gap)
        draw.text((left, gap), name, fill="black", font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(_tile(picture, side), (left, head + row * (side + gap)))
    return sheet


def _tile(picture: Tensor, side: int) -> Image.Image:
    rgb = (picture.expand(3, -1, -1) if len(picture) == 1 else picture[:3]).detach().float().cpu().clamp(0, 1)
    scale = side / max(rgb.shape[-2:])
    shape = [max(1, round(scale * extent)) for extent in rgb.shape[-2:]]
    mode = "nearest-exact" if scale >= 1 else "area"
    scaled = F.interpolate(rgb[None], shape, mode=mode)[0]
    return Image.fromarray((scaled * 255).round().byte().permute(1, 2, 0).numpy())
