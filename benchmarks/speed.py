"""Writes docs/speed.md from the committed results: python benchmarks/speed.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from readme import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "lcm": "diffusers' ControlNet pipeline, 4 LCM steps",
    "lcm-loop": "diffusers, 4 LCM steps, up to the latent",
    "ddim": "diffusers' ControlNet pipeline, 50 DDIM steps, guidance",
    "codi": "codi, 4 steps",
    "codi-loop": "codi, 4 steps, up to the latent",
    "codi-tiny": "codi, 4 steps, tiny decoder",
    "bare": "the bare modules of codi, nothing around them",
}
STARTS = {
    "python": "the interpreter alone", "import": "`import codi`", "help": "`codi --help`", "torch": "`import torch`",
    "imports": "torch, and what is needed of diffusers and transformers",
    "upscale": "`codi upscale` of 32 px on `mini`, all of it",
}  # fmt: skip


def where(result: dict[str, Any]) -> str:
    """The machine."""
    machine = result["machine"]
    cores = f"{machine['threads']} of {machine['cpus']} CPU cores"
    return machine["gpu"] if result.get("device") == "cuda" else cores


def of_rounds(count: int) -> str:
    """What the seconds are."""
    return "one round" if count == 1 else f"medians of {count} rounds"


def named(contestant: str) -> str:
    """In words."""
    name, _, variant = contestant.partition("/")
    return NAMES[name] + (f", {variant}" if variant else "")


def met(ratio: float, goal: float, most: bool = False) -> str:
    """Whether a goal is; `most`: an upper bound."""
    return "met" if (ratio <= goal if most else ratio >= goal) else "missed"


def latency_lines(result: dict[str, Any]) -> list[str]:
    """Seconds, then the ratios that are owed."""
    batch = "one picture" if result["batch"] == 1 else f"{result['batch']} pictures"
    lines = [f"Seconds for {batch} of {result['size']} px, Stable Diffusion 1.5's size, {result['dtype']}, on "
             f"{where(result)}, {of_rounds(result['repeats'])}:", ""]  # fmt: skip
    lines += table(["what", "seconds"], [[named(name), f"{s:.2f}"] for name, s in result["seconds"].items()])
    if result["ratios"]:
        rows = []
        for row in result["ratios"]:
            overhead = row["faster"] == "bare"
            goal = f"{'at most' if overhead else 'at least'} {row['goal']:g}"
            told = [f"{row['ratio']:.2f}", goal, met(row["ratio"], row["goal"], overhead)]
            rows.append([f"{row['slower']} / {row['faster']}", *told])
        lines += ["", "Medians of the rounds' ratios:", "", *table(["ratio", "here", "goal", ""], rows)]
    if result.get("variants"):
        rows = [[named(name), f"{ratio:.2f}"] for name, ratio in result["variants"].items()]
        lines += ["", "How many times faster than the same as it is:", "", *table(["variant", "times"], rows)]
    if result.get("share"):
        rate, copy = (result["rates"][key] for key in ("flop_per_second", "bytes_per_second"))
        told = f"{rate / 1e12:.2f} TFLOP/s in a product of matrices, {copy / 1e9:.0f} GB/s in a copy"
        reached = f"`codi` reaches {result['share']['codi']:.0%} of the former"
        lines += ["", f"The machine's own rate in {result['dtype']}: {told}; {reached}."]
    return lines


def step_lines(result: dict[str, Any]) -> list[str]:
    """Training steps beside LCM distillation."""
    about = (f"One optimiser step, {result['kind']} at {result['size']} px, batch {result['batch']}, {result['dtype']}"
             f"{', gradient checkpointing' if result['checkpointing'] else ''}, on {where(result)}, medians of "
             f"{result['steps']}; `lcm` is the distillation of diffusers' example (goal: 0.65 of its time, 0.8 of its "
             "memory):")  # fmt: skip
    rows = [
        [name, f"{r['seconds']:.1f}", f"{r['seconds_ratio']:.2f}", f"{r['peak_bytes'] / 2**30:.1f}",
         f"{r['peak_bytes_ratio']:.2f}"]
        for name, r in result["rows"].items()
    ]  # fmt: skip
    return [about, "", *table(["method", "seconds", "ratio", "peak GiB", "ratio"], rows)]


def big_lines(result: dict[str, Any]) -> list[str]:
    """Memory over the size of the picture."""
    goal = result["goal"]
    rows = [
        [f"{r['side']} px", f"{r['peak_mib']:.0f}", f"{r['ratio']:.2f}", f"{r['seconds']:.0f}"] for r in result["rows"]
    ]
    worst = max(r["ratio"] for r in result["rows"])
    told = f"`codi upscale` to so many pixels a side, `{result.get('kind', 'mini')}`, one step: peak memory (goal: at "
    told += f"most {goal:g} times the first row's: {met(worst, goal, most=True)}):"
    return [told, "", *table(["side", "peak MiB", "ratio", "seconds"], rows)]


def light_lines(result: dict[str, Any]) -> list[str]:
    """What a user waits for."""
    rows = []
    for r in result["rows"]:
        goal = f"{r['goal']:g}: {met(r['wall'], r['goal'], most=True)}" if r["goal"] else ""
        rows.append([STARTS[r["what"]], f"{r['wall']:.2f}", f"{r['cpu']:.2f}", goal])
    share = f"Importing takes {result['share_of_imports_in_upscale']:.0%} of the last."
    about = f"Seconds of a process on {where(result)}, medians of {result['repeats']}:"
    return [about, "", *table(["what", "wall", "CPU", "goal"], rows), "", share]


def full_lines(result: dict[str, Any]) -> list[str]:
    """What holds at full size."""
    rows = []
    for r in result["rows"]:
        same = all(form["equals_backbone"] for form in r["adapters"].values())
        rows.append([r["kind"], r["dtype"], f"{r['parameters']['unet'] / 1e6:.0f}",
                     f"{r['adapters']['fused']['parameters'] / 1e6:.0f}", f"{r['latent_difference_to_diffusers']:.1g}",
                     *("yes" if fact else "no" for fact in (same, r["folder_survives"]))])  # fmt: skip
    heads = ["checkpoint", "dtype", "U-Net M", "adapter M", "latent off diffusers'", "untrained adapters are neutral",
             "folder survives"]  # fmt: skip
    return [f"Random weights in the published configurations, {result['size']} px, two steps with guidance:", "",
            *table(heads, rows)]  # fmt: skip


WAYS = {
    "plain": "as `from_pretrained` gives it", "fused": "`fuse_lora()` (the commands do so)",
    "channels-last": "`--channels-last`", "bfloat16": "`--dtype bfloat16`", "tiny-decoder": "`--decoder tiny`",
    "plain-attention": "diffusers' classic attention in place of torch's", "compiled": "`--compile`",
}  # fmt: skip


def flag_lines(result: dict[str, Any]) -> list[str]:
    """What each way of running is worth."""
    about = f"`{result['model']}`, adapter `{result['adapter']}`, one picture of {result['size']} px in "
    about += f"{result['steps']} steps on {where(result)}, medians of {result['repeats']}; one change at a time:"
    rows = [[WAYS[way], f"{s:.2f}", f"{result['ratios'][way]:.2f}"] for way, s in result["seconds"].items()]
    return [about, "", *table(["way", "seconds", "share of the first"], rows)]


PARTS: tuple[tuple[str, str, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("Sampling", "latency-*.json", latency_lines),
    ("Flags", "flags-*.json", flag_lines),
    ("Training", "train_step-*.json", step_lines),
    ("Big pictures", "big-*.json", big_lines),
    ("Starting", "lightness.json", light_lines),
    ("Checkpoints at full size", "fullsize.json", full_lines),
)


def page(folder: Path) -> str:
    """The whole page; what was not measured is not in it."""
    lines = ["# Speed and memory", "", "Written by `benchmarks/speed.py` from the results beside it."]
    for title, pattern, told in PARTS:
        files = sorted(folder.glob(pattern), key=lambda path: path.stem)
        if files:
            lines += ["", f"## {title}"]
        for file in files:
            result = json.loads(file.read_text())
            lines += ["", *told(result), "", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "speed.md").write_text(page(RESULTS))
