"""Measure start-up times: importing codi, its help, and a first small image.

    python benchmarks/lightness.py --repeats 9 --out benchmarks/results/lightness.json

Each command is a new process; a round runs all of them once in random order, and the first round is not measured.
`wall` and `cpu`: medians of the rounds in seconds, including the interpreter's own start (`python`). `imports` is the
minimum that `upscale` imports: torch and the classes of diffusers that it loads; `upscale` enlarges one image of 32 px
with `mini` in 4 steps.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from command import command_line
from PIL import Image

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json

GOALS = {"import": 0.15, "help": 0.3}  # seconds of wall time
PARTS = "AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel"


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of each measured Python process, by name."""
    Image.new("RGB", (32, 32), (90, 60, 30)).save(folder / "in.png")
    files = [str(folder / "in.png"), "-o", str(folder / "out.png"), "--overwrite"]
    upscale = ["-m", "codi", "upscale", *files, "--model", "mini"]
    return {
        "python": ["-c", "pass"],
        "import": ["-c", "import codi"],
        "help": ["-m", "codi", "--help"],
        "torch": ["-c", "import torch"],
        "imports": ["-c", f"from diffusers import {PARTS}; from transformers import CLIPTextModel, CLIPTokenizer"],
        "upscale": upscale,
    }


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Return wall time and CPU time of a Python process with these arguments."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = commands(Path(folder))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for number in range(1 + args.repeats):
            for name in random.Random(number).sample(list(runs), len(runs)):
                times[name].append(seconds_of(runs[name]))
    rows: list[dict[str, Any]] = []
    for name, pairs in times.items():
        wall, cpu = (round(statistics.median(values), 3) for values in zip(*pairs[1:], strict=True))
        rows.append({"what": name, "wall": wall, "cpu": cpu, "goal": GOALS.get(name)})
        print(rows[-1])
    share = statistics.median(few[0] / all_[0] for few, all_ in zip(times["imports"], times["upscale"], strict=True))
    write_json(
        {"command": command_line(), "repeats": args.repeats, "rows": rows, "share_of_imports_in_upscale": share,
         "machine": describe_machine()}, args.out,
    )  # fmt: skip
    print(f"imports are {share:.2f} of upscale")


if __name__ == "__main__":
    main()
