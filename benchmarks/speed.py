"""Write docs/speed.md from the committed results: python benchmarks/speed.py"""

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
    "lcm-loop": "diffusers, 4 LCM steps, without decoding",
    "ddim": "diffusers' ControlNet pipeline, 50 DDIM steps, guidance",
    "codi": "codi, 4 steps",
    "codi-loop": "codi, 4 steps, without decoding",
    "codi-tiny": "codi, 4 steps, tiny decoder",
    "bare": "the modules of codi without its pipeline",
}
STARTS = {
    "python": "the interpreter alone", "import": "`import codi`", "help": "`codi --help`", "torch": "`import torch`",
    "imports": "torch and the needed classes of diffusers and transformers",
    "upscale": "`codi upscale` of 32 px on `mini`, whole command",
}  # fmt: skip


STEP_GOALS = (0.65, 0.8)  # share of LCM's time and memory
GPU_GOAL = 0.025  # seconds for an image of 512 px with the tiny decoder


def duration(seconds: float) -> str:
    """Format seconds as s or ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def machine_name(result: dict[str, Any]) -> str:
    """Return the GPU or CPU cores that a result was measured on."""
    machine = result["machine"]
    cores = f"{machine['threads']} of {machine['cpus']} CPU cores"
    return machine["gpu"] if result.get("device") == "cuda" else cores


def rounds_label(count: int) -> str:
    """Describe what seconds of so many rounds are."""
    return "one round" if count == 1 else f"medians of {count} rounds"


def contestant_name(contestant: str) -> str:
    """Return a contestant's name for people."""
    name, _, variant = contestant.partition("/")
    return NAMES[name] + (f", {variant}" if variant else "")


def met(ratio: float, goal: float, most: bool = False) -> str:
    """Return whether a goal is met, as a word; with `most` the goal is an upper bound."""
    return "met" if (ratio <= goal if most else ratio >= goal) else "missed"


def latency_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of one latency result: times, then ratios with goals."""
    batch = "one picture" if result["batch"] == 1 else f"{result['batch']} pictures"
    lines = [f"Time for {batch} of {result['size']} px, Stable Diffusion 1.5's size, {result['dtype']}, on "
             f"{machine_name(result)}, {rounds_label(result['repeats'])}:", ""]  # fmt: skip
    lines += table(["method", "time"], [[contestant_name(name), duration(s)] for name, s in result["seconds"].items()])
    lines += [f"\n{contestant_name(name)} failed: {why}" for name, why in result.get("failed", {}).items()]
    if result["device"] == "cuda" and (result["size"], result["batch"]) == (512, 1):
        best = min(s for name, s in result["seconds"].items() if name.startswith("codi-tiny"))
        text = f"{duration(best)}, goal {duration(GPU_GOAL)}: {met(best, GPU_GOAL, most=True)}"
        lines += ["", f"An image with the tiny decoder, the fastest variant: {text}."]
    if result["ratios"]:
        rows = []
        for row in result["ratios"]:
            overhead = row["faster"] == "bare"
            goal = f"{'at most' if overhead else 'at least'} {row['goal']:g}"
            has_spread = "least" in row and result["repeats"] > 1
            spread = f" ({row['least']:.2f} to {row['greatest']:.2f})" if has_spread else ""
            text = [f"{row['ratio']:.2f}{spread}", goal, met(row["ratio"], row["goal"], overhead)]
            rows.append([f"{row['slower']} / {row['faster']}", *text])
        label = "Ratios of the one round" if result["repeats"] == 1 else "Medians of the rounds' ratios"
        lines += ["", f"{label}:", "", *table(["ratio", "here", "goal", ""], rows)]
    if result.get("variants"):
        rows = [[contestant_name(name), f"{ratio:.2f}"] for name, ratio in result["variants"].items()]
        lines += ["", "Speed-up of each variant over the unchanged pipeline:", "", *table(["variant", "times"], rows)]
    if result.get("share"):
        rate, copy = (result["rates"][key] for key in ("flop_per_second", "bytes_per_second"))
        text = f"{rate / 1e12:.2f} TFLOP/s in a matrix product, {copy / 1e9:.0f} GB/s in a copy"
        reached = [f"`{name}` {result['share'][name]:.0%}" for name in ("codi", "codi-tiny") if name in result["share"]]
        reached = f"share of the former reached: {', '.join(reached)}"
        lines += ["", f"The machine's best rate in {result['dtype']}: {text}; {reached}."]
    return lines


def step_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of training steps against LCM distillation."""
    about = (f"One optimiser step, {result['kind']} at {result['size']} px, batch {result['batch']}, {result['dtype']}"
             f"{', gradient checkpointing' if result['checkpointing'] else ''}, on {machine_name(result)}, medians of "
             f"{result['steps']}; `lcm` is the distillation of diffusers' example (goal: {STEP_GOALS[0]:g} of its "
             f"time, {STEP_GOALS[1]:g} of its memory):")  # fmt: skip
    rows_by_method = dict(result["rows"])
    if {"pe-codi", "pe-codi-guided"} <= rows_by_method.keys():  # guidance_share: 0.5
        plain, guided = rows_by_method["pe-codi"], rows_by_method["pe-codi-guided"]
        time = {key: (plain[key] + guided[key]) / 2 for key in ("seconds", "seconds_ratio")}
        rows_by_method["pe-codi, every other update guided"] = {**guided, **time}
    rows = []
    for name, r in rows_by_method.items():
        ratios = r["seconds_ratio"], r["peak_bytes_ratio"]
        ratio_cells = [
            f"{ratio:.2f}" + ("" if name == "lcm" else f" ({met(ratio, goal, most=True)})")
            for ratio, goal in zip(ratios, STEP_GOALS, strict=True)
        ]
        rows.append([name, f"{r['seconds']:.1f}", ratio_cells[0], f"{r['peak_bytes'] / 2**30:.1f}", ratio_cells[1]])
    return [about, "", *table(["method", "seconds", "ratio", "peak GiB", "ratio"], rows)]


def big_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of memory by image size."""
    goal = result["goal"]
    rows = [
        [f"{r['side']} px", f"{r['peak_mib']:.0f}", f"{r['ratio']:.2f}", f"{r['seconds']:.0f}"] for r in result["rows"]
    ]
    worst = max(r["ratio"] for r in result["rows"])
    text = f"`codi upscale` by output side, model `{result.get('kind', 'mini')}`, one step: peak memory (goal: at "
    text += f"most {goal:g} times the first row's: {met(worst, goal, most=True)}):"
    return [text, "", *table(["side", "peak MiB", "ratio", "seconds"], rows)]


def light_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of start-up times."""
    rows = []
    for r in result["rows"]:
        goal = f"{r['goal']:g}: {met(r['wall'], r['goal'], most=True)}" if r["goal"] else ""
        rows.append([STARTS[r["what"]], f"{r['wall']:.2f}", f"{r['cpu']:.2f}", goal])
    share = f"Importing takes {result['share_of_imports_in_upscale']:.0%} of the last row."
    about = f"Seconds of a process on {machine_name(result)}, medians of {result['repeats']}:"
    return [about, "", *table(["process", "wall", "CPU", "goal"], rows), "", share]


def full_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of checks at full size."""
    rows = []
    for r in result["rows"]:
        same = all(form["equals_backbone"] for form in r["adapters"].values())
        rows.append([r["kind"], r["dtype"], f"{r['parameters']['unet'] / 1e6:.0f}",
                     f"{r['adapters']['fused']['parameters'] / 1e6:.0f}", f"{r['latent_difference_to_diffusers']:.1g}",
                     *("yes" if fact else "no" for fact in (same, r["folder_survives"]))])  # fmt: skip
    heads = ["checkpoint", "dtype", "U-Net M", "adapter M", "latent difference to diffusers",
             "untrained adapters are neutral", "saved folder reloads"]  # fmt: skip
    return [f"Random weights in the published configurations, {result['size']} px, two steps with guidance:", "",
            *table(heads, rows)]  # fmt: skip


WAYS = {
    "plain": "as `from_pretrained` returns it", "fused": "`fuse_lora()` (the commands do so)",
    "channels-last": "`--channels-last`", "bfloat16": "`--dtype bfloat16`", "tiny-decoder": "`--decoder tiny`",
    "plain-attention": "diffusers' classic attention in place of torch's", "compiled": "`--compile`",
}  # fmt: skip


def flag_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of ways to run an adapter."""
    about = f"`{result['model']}`, adapter `{result['adapter']}`, one picture of {result['size']} px in "
    about += f"{result['steps']} steps on {machine_name(result)}, medians of {result['repeats']}; one change at a time:"
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
    """Return the page; parts without results are left out."""
    lines = ["# Speed and memory", "", "Written by `benchmarks/speed.py` from the results beside it."]
    for title, pattern, section in PARTS:
        files = sorted(folder.glob(pattern), key=lambda path: path.stem)
        if files:
            lines += ["", f"## {title}"]
        for file in files:
            result = json.loads(file.read_text())
            lines += ["", *section(result), "", f"`{result['command']}`"]
        if title == "Sampling" and not any(json.loads(file.read_text())["device"] == "cuda" for file in files):
            goal = f"goal {duration(GPU_GOAL)} for a picture of 512 px with the tiny decoder"
            lines += ["", f"On a GPU: not measured yet (`gpu/fullsize.sh`; {goal})."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "speed.md").write_text(page(RESULTS))
