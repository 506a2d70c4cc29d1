"""The results of photographs.py: a JSON file that grows with each run, and the tables computed from it.

`contests` holds, for SET/KIND, figures of each image by each method, and `rows`, one per method: means over `count`
images. `distance` is the ENLite0 distance of whole images, resized to the feature network's 224 px and so mostly
downscaled; `patch_distance` is that of their patches of 224 px at full resolution, more sensitive to texture. `seconds`
are wall time, `cpu_seconds` time of the process, without waiting on a busy machine. `ratios` compare with Real-ESRGAN
(Telea for inpainting) on the `count` images that both have: the median of per-image ratios, and the ratio of the means.
`methods` records each method's weights and options, `commands` the commands that measured the file.
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
JSONDict = dict[str, Any]


def load_results(path: Path, settings: JSONDict) -> JSONDict:
    """Return the results in `path`, or empty ones. Raises UserError for other settings or a broken file."""
    if not path.is_file():
        return {"settings": settings, "methods": {}, "contests": {}}
    try:
        results = json.loads(path.read_text())
        previous = results["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no results of this script: use another --out") from error
    if previous != settings:
        raise UserError(f"{path}: was measured with {previous}, not {settings}: use another --out")
    return results


def drop_outdated(results: JSONDict, task: str, methods: dict[str, JSONDict]) -> None:
    """Drop the figures of methods, {label: everything its images depend on}, that have changed."""
    known = results["methods"].setdefault(task, {})
    for label, dependencies in methods.items():
        if known.get(label, dependencies) != dependencies:
            for entry in results["contests"].values():
                for record in entry["pictures"].values() if entry["task"] == task else ():
                    record["figures"].pop(label, None)
        known[label] = dependencies


def rows(entry: JSONDict, labels: Sequence[str]) -> list[JSONDict]:
    """Return a contest's table: a row for each of `labels` that has figures."""
    pictures: list[dict[str, JSONDict]] = [record["figures"] for record in entry["pictures"].values()]
    reference = REFERENCE[entry["task"]]
    table = []
    for label in labels:
        values = [picture[label] for picture in pictures if label in picture]
        if not values:
            continue
        row: JSONDict = {"method": label, "count": len(values)}
        for figure in dict.fromkeys(figure for figures in values for figure in figures):
            row[figure] = statistics.fmean(figures[figure] for figures in values if figure in figures)
        pairs = [(picture[label], picture[reference]) for picture in pictures if {label, reference} <= picture.keys()]
        if pairs and label != reference:
            row["ratios"] = {"against": reference, "count": len(pairs)}
            row["ratios"] |= {figure: ratio([(a[figure], b[figure]) for a, b in pairs]) for figure in DISTANCES}
        table.append(row)
    return table


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Return for pairs (a, b) the median of a / b, and mean a / mean b; None if a divisor is 0."""
    a, b = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    median = statistics.median(x / y for x, y in pairs) if all(y for _, y in pairs) else None
    return {"median": median, "of_means": a / b if b else None}


def line(row: JSONDict) -> str:
    """Return a row as one line of text."""
    text = f"{row['method']:20} {row['count']:4d} pictures {row['psnr']:6.2f} dB  SSIM {row['ssim']:.4f}  distance"
    text += f" {row['distance']:.4f}  of patches {row['patch_distance']:.4f}  {row['cpu_seconds']:8.2f} CPU s"
    median = row.get("ratios", {}).get("distance", {}).get("median")
    return text + (f"  distance x{median:.3f} of {row['ratios']['against']}" if median else "")
