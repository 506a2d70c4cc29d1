"""Measure how far images of the transformer families are from the stock pipelines', without an adapter.

    python benchmarks/family_parity.py

On the tiny random models of the tests, in float32, with the same noise and sigmas: the largest difference of a pixel
in [0, 1] at 4 and 20 steps, for each kind of guidance that the family has. Results go to
benchmarks/results/family_parity.json; benchmarks/backbones.py writes docs/backbones.md from them.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "family_parity.json"


def measure() -> list[dict[str, Any]]:
    """Return a row for each family and kind of guidance."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_families import CASES, FAMILIES, pictures

    rows = []
    for name, ours, theirs in CASES:
        largest = {}
        for steps in (4, 20):
            ours_images, expected = pictures(name, ours, theirs, steps)
            largest[str(steps)] = float((ours_images - expected).abs().max())
        family = FAMILIES[name]().kind
        guidance = ", ".join(f"{key} {value:g}" for key, value in ours.items() if isinstance(value, float)) or "none"
        rows.append({"family": family.name, "model": name, "guidance": guidance, "largest": largest})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    RESULTS.write_text(json.dumps({**versions, "rows": measure()}, indent=1) + "\n")
