"""Benchmark results as plots and as Markdown tables in the paper's layout, next to the paper's ratios."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..tasks import get_task
from .report import write_text
from .suite import Suite

Rows = Sequence[dict[str, Any]]
Cell = tuple[str, int]  # method, steps

# The paper's FID (tables 1 to 4). We measure another distance on other images: only ratios can be compared.
PAPER: dict[str, dict[Cell, float]] = {
    "upscale": {
        ("ldm", 250): 19.200, ("ldm", 50): 19.231, ("ldm", 20): 20.510, ("ldm", 8): 24.493, ("ldm", 6): 26.338,
        ("ldm", 4): 29.266, ("ldm/dpm-solver", 4): 28.936, ("ldm/dpm-solver++", 4): 28.937, ("controlnet", 4): 34.56,
        ("gd-i", 4): 27.806, ("gd-ii", 4): 23.675, ("cm-ii-frozen", 4): 28.088, ("cm-ii", 4): 27.810,
        ("pe-codi", 4): 25.214, ("codi", 4): 19.637, ("codi/teacher-ode", 4): 20.307,
        ("codi/no-noise-consistency", 4): 25.728,
    },
    "inpaint": {
        ("controlnet", 50): 14.895, ("controlnet", 4): 20.205, ("cm-ii", 4): 17.710, ("gd-ii", 4): 15.950,
        ("pe-codi", 4): 14.700,
    },
    "depth": {
        ("controlnet", 250): 20.884, ("controlnet", 4): 29.780, ("cm-ii", 4): 27.640, ("gd-ii", 4): 26.513,
        ("pe-codi", 4): 23.047,
    },
}  # fmt: skip
for values in PAPER.values():  # `codi-tuned` uses the paper's loss with three changes
    values |= {(f"{name}-tuned", 4): values[name, 4] for name in ("codi", "pe-codi") if (name, 4) in values}
# The row by whose FD the FD of a task's other rows is divided.
REFERENCE: dict[str, Cell] = {
    "upscale": ("ldm", 250), "inpaint": ("controlnet", 50), "depth": ("controlnet", 250), "edit": ("ldm", 50)
}  # fmt: skip
OURS = "pe-decoupled"
BOUND: Cell = ("autoencoder", 0)

# (task, figure, numerator, denominator, the paper's ratio or None, goal)
RATIOS: tuple[tuple[str, str, Cell, Cell, float | None, float], ...] = (
    *(
        ratio
        for codi, pe in (("codi", "pe-codi"), ("codi-tuned", "pe-codi-tuned"))
        for ratio in (
            ("upscale", "fd", (codi, 4), ("ldm", 250), 1.023, 1.00),
            ("upscale", "distance", (codi, 4), ("ldm", 250), 1.006, 1.00),
            ("upscale", "fd", (codi, 4), ("ldm", 4), 0.671, 0.60),
            ("upscale", "fd", (codi, 4), ("gd-ii", 4), 0.829, 0.75),
            ("upscale", "fd", (codi, 4), ("cm-ii", 4), 0.706, 0.65),
            ("upscale", "fd", (pe, 4), ("ldm", 250), 1.313, 1.10),
            ("inpaint", "fd", (pe, 4), ("controlnet", 50), 0.987, 0.95),
            ("depth", "fd", (pe, 4), ("controlnet", 250), 1.104, 1.02),
        )
    ),
    ("upscale", "fd", ("decoupled/one-step", 1), ("ldm", 250), None, 1.10),
    ("upscale", "fd", (OURS, 4), ("ldm", 4), None, 1.00),
    ("depth", "fd", (OURS, 4), ("ldm", 4), None, 1.00),
)
FIGURES = (("fd", ".2f"), ("distance", ".4f"), ("psnr", ".2f"), ("obedience", ".3f"))
NAMES = ("FD-ENLite0 ↓", "ENLite0 distance ↓", "PSNR dB ↑", "obedience ↑")


def ratio_rows(rows: Rows) -> list[list[str]]:
    """Return [task, label, measured ratio (median over common seeds), bound by perfect latents, paper, goal] for each
    entry of RATIOS."""
    lines = []
    for task, figure, few, many, paper, goal in RATIOS:
        ratio, bound = (_ratio(rows, task, figure, cell, many) for cell in (few, BOUND))
        values = [f"{v:.3f}" if v else "-" for v in (bound, paper)]
        measured = f"{ratio:.3f}" if ratio else "not measured"
        lines.append([task, f"{figure} of {few[0]} {few[1]} / {many[0]} {many[1]}", measured, *values, f"{goal:.2f}"])
    return lines


def task_table(rows: Rows, task: str, times: Rows = ()) -> str:
    """Return the Markdown table of a task: one line for each method and step count, in the order of measurement.

    FD is also divided by the FD of the task's REFERENCE, next to the same ratio of the paper. Further columns are the
    time per image, from `times`, and the cost of training.
    """
    task_rows = [row for row in rows if row["task"] == task]
    ms = {(time["method"], time["steps"]): time["ms"] for time in times}
    reference = REFERENCE.get(task)
    lines = []
    for method, steps in sorted({(row["method"], row["steps"]) for row in task_rows}, key=_order(task_rows)):
        runs = [row for row in task_rows if (row["method"], row["steps"]) == (method, steps)]
        line = [method, str(steps), *(_spread([row[name] for row in runs], form) for name, form in FIGURES)]
        if reference:
            ratio, paper_fid = _ratio(rows, task, "fd", (method, steps), reference), PAPER.get(task, {})
            paper = paper_fid.get((method, steps))
            line += [f"{ratio:.3f}" if ratio else "-", f"{paper / paper_fid[reference]:.3f}" if paper else "-"]
        line.append(_spread([ms.get((method, steps))], ".0f"))
        cost = [statistics.median(row[name] for row in runs) for name in ("images", "passes", "seconds")]
        lines.append([*line, *(f"{value:,.0f}" for value in cost)])
    ratios = [f"FD / {reference[0]} {reference[1]}", "paper"] if reference else []
    return markdown(["method", "steps", *NAMES, *ratios, "ms ↓", "images", "passes", "seconds"], lines)


def missing(rows: Rows, suite: Suite) -> dict[str, list[str]]:
    """Return, for each task of the suite, the methods and step counts that `rows` lacks."""
    measured = {(row["task"], row["method"], row["steps"]) for row in rows}
    missing_steps: dict[str, list[str]] = {task: [] for task in suite.tasks}
    for plan in replace(suite, seeds=1).plans():
        step_counts = [str(n) for n in plan.steps if (plan.task, plan.method, n) not in measured]
        if step_counts:
            missing_steps[plan.task].append(f"{plan.method} {'/'.join(step_counts)}")
    return {task: names for task, names in missing_steps.items() if names}


def markdown(heads: list[str], lines: Iterable[list[str]]) -> str:
    """Return a table in GitHub-flavored Markdown; all columns but the first are right-aligned."""
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *lines)) + "\n"


def _order(rows: Rows) -> Any:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return lambda cell: (methods.index(cell[0]), cell[1])


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean


def _ratio(rows: Rows, task: str, figure: str, few: Cell, many: Cell) -> float | None:
    """Return the median of `few` / `many` over their common training seeds; None if they have none in common."""
    by_seed: dict[Cell, dict[int, float]] = {few: {}, many: {}}
    for row in rows:
        if row["task"] == task and (row["method"], row["steps"]) in by_seed:
            by_seed[row["method"], row["steps"]][row["seed"]] = row[figure]
    ratios = [by_seed[few][seed] / by_seed[many][seed] for seed in by_seed[few] if seed in by_seed[many]]
    return statistics.median(ratios) if ratios else None


def write_report(results: dict[str, Any], suite: Suite, out: Path) -> None:
    """Write `out`/benchmark.md and one file of plots per task."""
    rows: Rows = results["rows"]
    write_text(report(results, suite), out / "benchmark.md")
    for task in dict.fromkeys(row["task"] for row in rows):
        plots(
            [row for row in rows if row["task"] == task], times_of(results, task), task, out / f"benchmark-{task}.png"
        )


def times_of(results: dict[str, Any], task: str) -> Rows:
    """Return [{method, steps, ms, machine}] for the timed methods of a task."""
    return results.get("times", {}).get(task, [])


def report(results: dict[str, Any], suite: Suite) -> str:
    """Return the content of results.json as Markdown."""
    rows: Rows = results["rows"]
    seeds = len({row["seed"] for row in rows})
    parts = [
        "# The paper's comparison\n",
        f"`codi benchmark --suite {results['suite']} --out DIR` trains and measures all of it, and writes this page. "
        f"Each figure is measured on the same {results['count']:,} held-out pictures. "
        + (
            "**Each method was trained with one seed**: a difference of a few per cent between two rows shows nothing."
            if seeds == 1
            else "Mean ± standard deviation of several trainings; without ±, of one."
        )
        + f"\n\n{suite.about}\n\n"
        "`passes`: network passes of the training, a backward pass counted as two. `ms`: one picture, all rows of a "
        "task timed in turns (`--time`); `seconds`: of the training, on machines that were busy with other work.\n",
        "## Ratios\n",
        "Medians over the seeds of both rows. The paper measures FID and LPIPS on other pictures, so only ratios can "
        "be compared. `bound`: the same ratio with the true pictures, sent through the latent codec, in place of the "
        "first row's: what perfect latents would reach.\n",
        markdown(["task", "ratio", "here", "bound", "paper", "goal"], ratio_rows(rows)),
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        times = times_of(results, task)
        unit = get_task(task).obedience_unit
        parts += [f"## {task}\n", f"Obedience: {unit}.\n" if unit else "", task_table(rows, task, times)]
        parts += [f"![{task}: FD over steps, over latency, and of each method at 4 steps](benchmark-{task}.png)\n"]
    unmeasured = missing(rows, suite)
    if unmeasured:
        parts.append("## Not measured yet\n")
        parts += [f"- {task}: {', '.join(names)}" for task, names in unmeasured.items()]
        parts.append("")
    return "\n".join(part for part in parts if part or part is parts[-1])


def plots(rows: Rows, times: Rows, task: str, out: Path) -> None:
    """Plot FD over steps, FD over latency where `times` has it, and bars of FD at 4 steps, ablations in orange."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    by_method: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_method[row["method"]][row["steps"]].append(row)
    ms = {(time["method"], time["steps"]): time["ms"] for time in times}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for method, by_steps in by_method.items():
        if 0 in by_steps:  # a bound, which has no steps
            for axis in (left, middle):
                axis.axhline(by_steps[0][0]["fd"], color="grey", linestyle=":", label=method)
        elif "/" not in method:
            steps = sorted(by_steps)
            fd = {n: statistics.mean(row["fd"] for row in by_steps[n]) for n in steps}
            (line,) = left.plot(steps, fd.values(), "o-", label=method, markersize=4)
            timed = [(ms[method, n], fd[n]) for n in steps if (method, n) in ms]
            middle.plot(*zip(*timed, strict=True), "o-", markersize=4, color=line.get_color()) if timed else None
    for axis, label in ((left, "steps"), (middle, "latency, ms")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="FD-ENLite0")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    left.set_xticks(sorted({row["steps"] for row in rows if row["steps"]}), minor=False)
    left.xaxis.set_minor_locator(NullLocator())
    left.legend(fontsize=7)
    bars = {
        method: statistics.mean(r["fd"] for r in by_steps[4]) for method, by_steps in by_method.items() if 4 in by_steps
    }
    colors = ["tab:orange" if "/" in method else "tab:blue" for method in bars]
    right.barh(list(bars)[::-1], list(bars.values())[::-1], color=colors[::-1])
    right.tick_params(labelsize=7)
    right.set(xlabel="FD-ENLite0 at 4 steps (orange: one change)", title=task)
    figure.savefig(out, dpi=90, metadata={"Software": None})
    plt.close(figure)
