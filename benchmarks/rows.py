"""The results of photographs.py: one JSON file that grows run by run, and the tables made of it.

`contests` holds, for SET/KIND, figures of each picture by each method, and `rows`, a method each: means over `count`
pictures. `distance` is the ENLite0 distance of whole pictures, which the feature network sees at 224 px, smaller than
most are; `patch_distance` is that of their patches of 224 px as they are, which tells more of texture. `seconds` pass
on the clock, `cpu_seconds` in the process, which waiting on a busy machine does not count to. `ratios` compare with
Real-ESRGAN (Telea for inpainting) on the `count` pictures that both have: the median of the pictures' ratios, and the
ratio of the means. `methods` says of what weights and options the figures are, `commands` what made the file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codi.errors import UserError

REFERENCE = {"upscale": "realesrgan", "inpaint": "telea"}
DISTANCES = ("distance", "patch_distance")
Told = dict[str, Any]


def opened(path: Path, settings: Told) -> Told:
    """What `path` holds, or nothing yet. Raises UserError where it was measured with other settings, or is broken."""
    if not path.is_file():
        return {"settings": settings, "methods": {}, "contests": {}}
    try:
        told = json.loads(path.read_text())
        before = told["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no results of this script: name another --out") from error
    if before != settings:
        raise UserError(f"{path}: was measured with {before}, not {settings}: name another --out")
    return told


def forget(told: Told, task: str, methods: dict[str, Told]) -> None:
    """Drops figures of methods {label: what its pictures depend on} that are not what they were."""
    known = told["methods"].setdefault(task, {})
    for label, now in methods.items():
        if known.get(label, now) != now:
            for entry in told["contests"].values():
                for record in entry["pictures"].values() if entry["task"] == task else ():
                    record["figures"].pop(label, None)
        known[label] = now


def rows(entry: Told, labels: Sequence[str]) -> list[Told]:
    """A contest's table: a row for each of `labels` that has figures."""
    pictures: list[dict[str, Told]] = [record["figures"] for record in entry["pictures"].values()]
    reference = REFERENCE[entry["task"]]
    found = []
    for label in labels:
        mine = [picture[label] for picture in pictures if label in picture]
        if not mine:
            continue
        row: Told = {"method": label, "count": len(mine)}
        for figure in dict.fromkeys(figure for one in mine for figure in one):
            row[figure] = statistics.fmean(one[figure] for one in mine if figure in one)
        both = [(picture[label], picture[reference]) for picture in pictures if {label, reference} <= picture.keys()]
        if both and label != reference:
            row["ratios"] = {"against": reference, "count": len(both)}
            row["ratios"] |= {figure: ratio([(a[figure], b[figure]) for a, b in both]) for figure in DISTANCES}
        found.append(row)
    return found


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Of (a, b): the median of a / b, and mean a / mean b; None where a b is 0."""
    a, b = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    median = statistics.median(x / y for x, y in pairs) if all(y for _, y in pairs) else None
    return {"median": median, "of_means": a / b if b else None}


def line(row: Told) -> str:
    """A row for people."""
    told = f"{row['method']:20} {row['count']:4d} pictures {row['psnr']:6.2f} dB  SSIM {row['ssim']:.4f}  distance"
    told += f" {row['distance']:.4f}  of patches {row['patch_distance']:.4f}  {row['cpu_seconds']:8.2f} CPU s"
    median = row.get("ratios", {}).get("distance", {}).get("median")
    return told + (f"  distance x{median:.3f} of {row['ratios']['against']}" if median else "")
