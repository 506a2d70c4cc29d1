"""A benchmark's results as Markdown tables in the paper's layout, beside the paper's own ratios, and as plots."""

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
Which = tuple[str, int]  # method, steps

# The paper's FID (tables 1 to 4). Ours is another distance on other pictures: only ratios of either compare.
PAPER: dict[str, dict[Which, float]] = {
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
for theirs in PAPER.values():  # `codi-tuned` is its loss with three changes
    theirs |= {(f"{name}-tuned", 4): theirs[name, 4] for name in ("codi", "pe-codi") if (name, 4) in theirs}
# What a task's figures are told as shares of.
REFERENCE: dict[str, Which] = {
    "upscale": ("ldm", 250), "inpaint": ("controlnet", 50), "depth": ("controlnet", 250), "edit": ("ldm", 50)
}  # fmt: skip
OURS = "pe-decoupled"
BOUND: Which = ("autoencoder", 0)

# (row, steps) / (row, steps) on a task, the paper's value (None: it has none), the goal
RATIOS: tuple[tuple[str, str, Which, Which, float | None, float], ...] = (
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
    """[task, what, ours (median over seeds both have), what perfect latents would reach, paper, goal] of RATIOS."""
    told = []
    for task, figure, few, many, paper, goal in RATIOS:
        ratio, least = (_ratio(rows, task, figure, which, many) for which in (few, BOUND))
        values = [f"{v:.3f}" if v else "-" for v in (least, paper)]
        here = f"{ratio:.3f}" if ratio else "not measured"
        told.append([task, f"{figure} of {few[0]} {few[1]} / {many[0]} {many[1]}", here, *values, f"{goal:.2f}"])
    return told


def task_table(rows: Rows, task: str, times: Rows = ()) -> str:
    """Methods down in the order in which they were measured, with steps; FD also as a share of the task's REFERENCE,
    beside the same share in the paper; the time of a picture, from `times`; what the training cost."""
    mine = [row for row in rows if row["task"] == task]
    ms = {(time["method"], time["steps"]): time["ms"] for time in times}
    reference = REFERENCE.get(task)
    lines = []
    for method, steps in sorted({(row["method"], row["steps"]) for row in mine}, key=_order(mine)):
        same = [row for row in mine if (row["method"], row["steps"]) == (method, steps)]
        line = [method, str(steps), *(_spread([row[name] for row in same], form) for name, form in FIGURES)]
        if reference:
            here, theirs = _ratio(rows, task, "fd", (method, steps), reference), PAPER.get(task, {})
            paper = theirs.get((method, steps))
            line += [f"{here:.3f}" if here else "-", f"{paper / theirs[reference]:.3f}" if paper else "-"]
        line.append(_spread([ms.get((method, steps))], ".0f"))
        cost = [statistics.median(row[name] for row in same) for name in ("images", "passes", "seconds")]
        lines.append([*line, *(f"{value:,.0f}" for value in cost)])
    shares = [f"FD / {reference[0]} {reference[1]}", "paper"] if reference else []
    return markdown(["method", "steps", *NAMES, *shares, "ms ↓", "images", "passes", "seconds"], lines)


def missing(rows: Rows, suite: Suite) -> dict[str, list[str]]:
    """For each task of the suite the methods, with steps, that `rows` lack."""
    there = {(row["task"], row["method"], row["steps"]) for row in rows}
    told: dict[str, list[str]] = {task: [] for task in suite.tasks}
    for plan in replace(suite, seeds=1).plans():
        lacking = [str(n) for n in plan.steps if (plan.task, plan.method, n) not in there]
        if lacking:
            told[plan.task].append(f"{plan.method} {'/'.join(lacking)}")
    return {task: names for task, names in told.items() if names}


def markdown(heads: list[str], lines: Iterable[list[str]]) -> str:
    """A GitHub-flavoured table; all columns but the first to the right."""
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *lines)) + "\n"


def _order(rows: Rows) -> Any:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return lambda which: (methods.index(which[0]), which[1])


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean


def _ratio(rows: Rows, task: str, figure: str, few: Which, many: Which) -> float | None:
    """The median over the training seeds that both have; None where they have none in common."""
    over: dict[Which, dict[int, float]] = {few: {}, many: {}}
    for row in rows:
        if row["task"] == task and (row["method"], row["steps"]) in over:
            over[row["method"], row["steps"]][row["seed"]] = row[figure]
    ratios = [over[few][seed] / over[many][seed] for seed in over[few] if seed in over[many]]
    return statistics.median(ratios) if ratios else None


def write_report(told: dict[str, Any], suite: Suite, out: Path) -> None:
    """`out`/benchmark.md and, for each task, its plots beside it."""
    rows: Rows = told["rows"]
    write_text(report(told, suite), out / "benchmark.md")
    for task in dict.fromkeys(row["task"] for row in rows):
        plots([row for row in rows if row["task"] == task], times_of(told, task), task, out / f"benchmark-{task}.png")


def times_of(told: dict[str, Any], task: str) -> Rows:
    """[{method, steps, ms, machine}] of the rows of a task whose time was taken."""
    return told.get("times", {}).get(task, [])


def report(told: dict[str, Any], suite: Suite) -> str:
    """The Markdown of results.json."""
    rows: Rows = told["rows"]
    seeds = len({row["seed"] for row in rows})
    parts = [
        "# The paper's comparison\n",
        f"`codi benchmark --suite {told['suite']} --out DIR` trains and measures all of it, and writes this page. Each "
        f"figure is measured on the same {told['count']:,} held-out pictures. "
        + (
            "**Each method was trained with one seed**: a difference of a few per cent between two rows shows nothing."
            if seeds == 1
            else "Mean ± standard deviation of several trainings; without ±, of one."
        )
        + f"\n\n{suite.about}\n\n"
        "`passes`: network passes of the training, a backward pass counted as two. `ms`: one picture, all rows of a "
        "task timed in turns (`--time`); `seconds`: of the training, on machines that were busy with other work.\n",
        "## Ratios\n",
        "Medians over the seeds of both rows. The paper measures FID and LPIPS of other pictures, so that figures "
        "never compare, ratios do. `bound`: the same with the true pictures, sent through the latent codec, in place "
        "of the first row's: what perfect latents would reach.\n",
        markdown(["task", "ratio", "here", "bound", "paper", "goal"], ratio_rows(rows)),
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        times = times_of(told, task)
        unit = get_task(task).obedience_unit
        parts += [f"## {task}\n", f"Obedience: {unit}.\n" if unit else "", task_table(rows, task, times)]
        parts += [f"![{task}: FD over steps, over latency, and of each method at 4 steps](benchmark-{task}.png)\n"]
    lacking = missing(rows, suite)
    if lacking:
        parts.append("## Not measured yet\n")
        parts += [f"- {task}: {', '.join(names)}" for task, names in lacking.items()]
        parts.append("")
    return "\n".join(part for part in parts if part or part is parts[-1])


def plots(rows: Rows, times: Rows, task: str, out: Path) -> None:
    """FD over steps and, where `times` are known, over latency; bars at 4 steps of all, ablations in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    seen: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        seen[row["method"]][row["steps"]].append(row)
    ms = {(time["method"], time["steps"]): time["ms"] for time in times}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for method, by_steps in seen.items():
        if 0 in by_steps:  # a bound
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
        axis.xaxis.set_minor_formatter(NullFormatter())  # too near one another
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    left.set_xticks(sorted({row["steps"] for row in rows if row["steps"]}), minor=False)
    left.xaxis.set_minor_locator(NullLocator())
    left.legend(fontsize=7)
    bars = {method: statistics.mean(r["fd"] for r in by[4]) for method, by in seen.items() if 4 in by}
    colours = ["tab:orange" if "/" in method else "tab:blue" for method in bars]
    right.barh(list(bars)[::-1], list(bars.values())[::-1], color=colours[::-1])
    right.tick_params(labelsize=7)
    right.set(xlabel="FD-ENLite0 at 4 steps (orange: one change)", title=task)
    figure.savefig(out, dpi=90, metadata={"Software": None})
    plt.close(figure)
