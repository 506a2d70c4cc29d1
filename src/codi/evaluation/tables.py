"""A benchmark's results as Markdown tables in the paper's layout, and as plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .report import write_text

Rows = list[dict[str, Any]]

# name -> (row and steps) / (row and steps), the paper's value (None: it has none), the goal; on which task
RATIOS = (
    ("upscale", "fd", ("codi", 4), ("ldm", 250), 1.023, 1.00),
    ("upscale", "distance", ("codi", 4), ("ldm", 250), 1.006, 1.00),
    ("upscale", "fd", ("codi", 4), ("ldm", 4), 0.671, 0.60),
    ("upscale", "fd", ("codi", 4), ("gd-ii", 4), 0.829, 0.75),
    ("upscale", "fd", ("codi", 4), ("cm-ii", 4), 0.706, 0.65),
    ("upscale", "fd", ("pe-codi", 4), ("ldm", 250), 1.313, 1.10),
    ("inpaint", "fd", ("pe-codi", 4), ("controlnet", 50), 0.987, 0.95),
    ("depth", "fd", ("pe-codi", 4), ("controlnet", 250), 1.104, 1.02),
)


def ratio_rows(rows: Rows) -> list[list[str]]:
    """[task, what, ours (median over seeds both have), paper, goal] of each of RATIOS that both rows are there for."""
    told = []
    for task, figure, few, many, paper, goal in RATIOS:
        over = [_by_seed(rows, task, *which, figure) for which in (few, many)]
        ratios = [over[0][seed] / over[1][seed] for seed in over[0] if seed in over[1]]
        if ratios:
            name = f"{figure} of {few[0]} {few[1]} / {many[0]} {many[1]}"
            told.append([task, name, f"{statistics.median(ratios):.3f}", f"{paper:.3f}", f"{goal:.2f}"])
    return told


def task_table(rows: Rows, task: str) -> str:
    """Methods down, in the order in which they were measured, with steps: FD, distance, obedience, cost."""
    mine = [row for row in rows if row["task"] == task]
    keys = list(dict.fromkeys((row["method"], row["steps"]) for row in mine))
    lines = []
    for method, steps in keys:
        same = [row for row in mine if (row["method"], row["steps"]) == (method, steps)]
        spread = [_spread([row[name] for row in same], form) for name, form in FIGURES]
        cost = [f"{same[0]['images']:,}", f"{statistics.median(row['seconds'] for row in same):,.0f}"]
        lines.append([method, str(steps), *spread, *cost])
    heads = ["method", "steps", "FD-ENLite0 ↓", "ENLite0 distance ↓", "PSNR dB ↑", "obedience ↑", "ms ↓"]
    return markdown([*heads, "images", "seconds"], lines)


FIGURES = (("fd", ".2f"), ("distance", ".4f"), ("psnr", ".2f"), ("obedience", ".3f"), ("latency_ms", ".0f"))


def markdown(heads: list[str], lines: Iterable[list[str]]) -> str:
    """A GitHub-flavoured table; all columns but the first to the right."""
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *lines)) + "\n"


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean


def _by_seed(rows: Rows, task: str, method: str, steps: int, figure: str) -> dict[int, float]:
    wanted = (task, method, steps)
    return {row["seed"]: row[figure] for row in rows if (row["task"], row["method"], row["steps"]) == wanted}


def write_report(told: dict[str, Any], out: Path) -> None:
    """`out`/benchmark.md and, for each task, its plots beside it."""
    rows: Rows = told["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = [
        "# The paper's comparison\n",
        f"Suite `{told['suite']}`: {told['images']:,} training images a method, {told['count']:,} held-out pictures "
        "a figure. Mean ± standard deviation over training seeds where there are several.\n",
        "## Ratios\n",
        markdown(["task", "ratio", "here", "paper", "goal"], ratio_rows(rows)),
    ]
    for task in tasks:
        parts += [f"## {task}\n", task_table(rows, task)]
        plots(rows, task, out)
        parts += [f"![{task}: quality over steps and over latency]({task}.png)\n"]
    write_text("\n".join(parts), out / "benchmark.md")


def plots(rows: Rows, task: str, out: Path) -> None:
    """`out`/TASK.png: FD over steps, FD over latency, and bars of every method at 4 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mine = [row for row in rows if row["task"] == task]
    methods = list(dict.fromkeys(row["method"] for row in mine))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    means: dict[str, dict[int, tuple[float, float]]] = {}
    for method in methods:
        by_steps: dict[int, list[tuple[float, float]]] = {}
        for row in mine:
            if row["method"] == method:
                by_steps.setdefault(row["steps"], []).append((row["fd"], row["latency_ms"]))
        mean: Callable[[list[tuple[float, float]], int], float] = lambda v, k: statistics.mean(x[k] for x in v)  # noqa: E731
        means[method] = {steps: (mean(v, 0), mean(v, 1)) for steps, v in sorted(by_steps.items())}
        curve = means[method]
        left.plot(list(curve), [fd for fd, _ in curve.values()], "o-", label=method, markersize=4)
        middle.plot([ms for _, ms in curve.values()], [fd for fd, _ in curve.values()], "o-", markersize=4)
    for axis, label in ((left, "steps"), (middle, "latency, ms")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="FD-ENLite0")
    left.legend(fontsize=7)
    at_four = [(method, means[method][4][0]) for method in methods if 4 in means[method]]
    right.barh([method for method, _ in at_four][::-1], [fd for _, fd in at_four][::-1])
    right.set(xlabel="FD-ENLite0 at 4 steps")
    figure.savefig(out / f"{task}.png", dpi=90)
    plt.close(figure)
