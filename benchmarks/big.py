"""Peak memory of `codi upscale` over the size of the picture: it is made and written row by row.

    python benchmarks/big.py --sides 1024 4096 8192 --out benchmarks/results/big.json

Each side, in output pixels, is a process of its own: a picture of noise and stripes a quarter as large, `mini`, one
step. `peak_mib` is the process' largest resident set; `ratio` that to the first side's, at most 1.15 by intention.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from command import command_line
from PIL import Image

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json

GOAL = 1.15


def picture(side: int, file: Path) -> Path:
    """Stripes and noise, 8 bits."""
    rows, columns = np.mgrid[:side, :side]
    stripes = 127 + 90 * np.sin((rows + 2 * columns) / 9)
    noise = np.random.default_rng(0).normal(0, 10, (side, side, 3))
    Image.fromarray((stripes[..., None] + noise).clip(0, 255).astype(np.uint8)).save(file)
    return file


def measure(side: int, words: list[str]) -> dict[str, float]:
    """Peak memory in MiB and seconds of one command."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = picture(side // 4, Path(folder) / "in.png"), Path(folder) / "out.png"
        command = [sys.executable, "-m", "codi", "upscale", str(given), "-o", str(out), "--steps", "1", *words]
        started = time.perf_counter()
        child = os.posix_spawn(sys.executable, command, os.environ)
        _, status, usage = os.wait4(child, 0)
        if status:
            raise SystemExit(f"side {side}: codi upscale ended with {os.waitstatus_to_exitcode(status)}")
        with Image.open(out) as made:
            assert made.size == (side, side)
        return {"side": side, "peak_mib": usage.ru_maxrss / 1024, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 4096, 8192], help="output pixels")
    parser.add_argument("--words", default="", help="further words for codi upscale, e.g. '--model FOLDER'")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for side in args.sides:
        rows.append(measure(side, args.words.split()))
        rows[-1]["ratio"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
        print(rows[-1], flush=True)
    write_json({"command": command_line(), "goal": GOAL, "rows": rows, "machine": describe_machine()}, args.out)


if __name__ == "__main__":
    main()
