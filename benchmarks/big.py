"""Measure the peak memory of `codi upscale` by image size; the image is computed and written in strips of rows.

    python benchmarks/big.py --sides 1024 4096 8192 --out benchmarks/results/big.json

Each side, in output pixels, runs in its own process: an image of noise and stripes a quarter as large, one step, with
`mini` or a full-size checkpoint with random weights (`--kind sd15`). `peak_mib` is the process's peak resident set, on
a GPU the allocator's peak; `ratio` compares it with the first side's (goal: at most 1.15).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from command import command_line
from fullsize import build
from PIL import Image

from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models.adapter import FORMS
from codi.tasks import get_task
from codi.training.saving import save_adapter

GOAL = 1.15
# Runs codi's command line and writes the peak GPU memory in bytes to the file given first.
RUN = """
import pathlib, sys
from codi.apps.cli import main
code = main(sys.argv[2:])
import torch
used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
pathlib.Path(sys.argv[1]).write_text(str(used))
sys.exit(code)
"""


def picture(side: int, file: Path) -> Path:
    """Write an 8-bit image of stripes and noise."""
    rows, columns = np.mgrid[:side, :side]
    stripes = 127 + 90 * np.sin((rows + 2 * columns) / 9)
    noise = np.random.default_rng(0).normal(0, 10, (side, side, 3))
    Image.fromarray((stripes[..., None] + noise).clip(0, 255).astype(np.uint8)).save(file)
    return file


def full_size(kind: str, folder: Path) -> list[str]:
    """Save a checkpoint of that kind and an untrained upscaler in `folder`. Return the options that select them."""
    backbone, task = build(kind), get_task("upscale")
    form: Any = FORMS["fused"]
    backbone.pipeline().save_pretrained(folder / "model")
    adapter = form.from_backbone(backbone.unet, backbone.vae, reads="pixels")
    info = {"task": task.name, "task_options": task.config(), "steps": [1, 4], "family": backbone.family}
    adapter.register_to_config(info=info)
    save_adapter(folder / "adapter", adapter, backbone.unet, full=False, half=False)
    return ["--model", str(folder / "model"), "--adapter", str(folder / "adapter")]


def measure(side: int, options: list[str]) -> dict[str, float]:
    """Return peak memory in MiB and seconds of one command."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = picture(side // 4, Path(folder) / "in.png"), Path(folder) / "out.png"
        memory_file = Path(folder) / "allocated"
        command = [
            sys.executable,
            "-c",
            RUN,
            str(memory_file),
            "upscale",
            str(source),
            "-o",
            str(output),
            "--steps",
            "1",
            *options,
        ]
        started = time.perf_counter()
        child = os.posix_spawn(sys.executable, command, os.environ)
        _, status, usage = os.wait4(child, 0)
        if status:
            raise SystemExit(f"side {side}: codi upscale ended with {os.waitstatus_to_exitcode(status)}")
        with Image.open(output) as image:
            assert image.size == (side, side)
        peak = int(memory_file.read_text()) / 2**20 or usage.ru_maxrss / 1024
        return {"side": side, "peak_mib": peak, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 4096, 8192], help="output pixels")
    parser.add_argument("--kind", choices=["mini", "sd15", "sd21"], default="mini")
    parser.add_argument("--words", default="", help="further options of codi upscale, e.g. '--device cuda'")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, float]] = []
    results = {"command": command_line(), "kind": args.kind, "goal": GOAL, "rows": rows, "machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        options = args.words.split()
        options += full_size(args.kind, Path(folder)) if args.kind != "mini" else ["--model", "mini"]
        for side in args.sides:
            rows.append(measure(side, options))
            rows[-1]["ratio"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
            print(rows[-1], flush=True)
            write_json(results, args.out)


if __name__ == "__main__":
    main()
