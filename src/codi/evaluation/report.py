"""Results as a table for people, as JSON for programs, and as a sheet of pictures."""

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

# heading, field of Row, format; an arrow says which way is better
COLUMNS = (
    ("method", "method", "s"),
    ("steps", "steps", "d"),
    ("PSNR dB ↑", "psnr", ".2f"),
    ("SSIM ↑", "ssim", ".4f"),
    ("ENLite0 distance ↓", "distance", ".4f"),
    ("FD-ENLite0 ↓", "fd", ".3f"),
    ("obedience ↑", "obedience", ".4g"),  # dB or a share
    ("latency ms ↓", "latency_ms", ".1f"),
)


def heads(results: Results) -> list[str]:
    """The table's headings: `COLUMNS`, then what was measured beside the headline of obedience."""
    return [*(head for head, _, _ in COLUMNS), *(f"{name} ↑" for name in _further(results))]


def cells(results: Results) -> list[list[str]]:
    """The table's rows as text, in the order of `heads`; "-" for what was not measured."""
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
    """One line that says what was measured, how often and where."""
    machine = results.machine
    where = machine.get("gpu") or f"{machine.get('cpus')} CPUs, {machine.get('threads')} threads"
    unit = f"; obedience: {results.obedience_unit}" if results.obedience_unit else ""
    return f"{results.task}, {results.count} held-out samples, seed {results.seed}{unit}; {where}"


def markdown_table(results: Results) -> str:
    """The results as a GitHub-flavoured Markdown table, with its caption below."""
    titles = heads(results)
    rules = ["---"] + ["---:"] * (len(titles) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, rules, *cells(results))]
    return "\n".join(lines) + f"\n\n{caption(results)}\n"


def rich_table(results: Results) -> Table:
    """The results as a rich table, for the terminal."""
    table = Table(caption=caption(results), caption_justify="left")
    for number, head in enumerate(heads(results)):
        table.add_column(head, justify="right" if number else "left", no_wrap=number == 0, overflow="fold")
    for row in cells(results):
        table.add_row(*row)
    return table


def write_json(content: Results | Mapping[str, Any], path: str | Path) -> Path:
    """Write results (or any JSON-able mapping) to `path`: whole or not at all. Raises `UserError` if it cannot."""
    told = content.to_json() if isinstance(content, Results) else content
    return write_text(json.dumps(told, indent=2, allow_nan=False, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path`: whole or not at all. Raises `UserError` if it cannot."""
    path = Path(path)
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def contact_sheet(columns: Mapping[str, Tensor], side: int | None = None, gap: int = 4) -> Image.Image:
    """A sheet with one row a sample and one labelled column a name: `Results.pictures`, or any (K, C, H, W) in [0, 1].

    Pictures are shown at `side` pixels (the largest side among them, at least 96, if left out), enlarged without
    smoothing, so that what is given looks as coarse as it is. One channel is shown grey; of more than three the first
    three are shown.
    """
    if not columns or len({len(pictures) for pictures in columns.values()}) != 1:
        raise ValueError("a contact sheet needs columns of one and the same number of pictures")
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
    shown = F.interpolate(rgb[None], shape, mode=mode)[0]
    return Image.fromarray((shown * 255).round().byte().permute(1, 2, 0).numpy())
