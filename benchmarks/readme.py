"""Write the README's figures from the committed results: python benchmarks/readme.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by benchmarks/readme.py -->\n", "<!-- end of figures -->\n"

# Measures of obedience in tasks.json: (description, number format).
OBEDIENCE: dict[str, tuple[str, str]] = {
    "input_psnr": ("dB PSNR of the downscaled result to the input", ".1f"),
    "hole_objects": ("share of the objects belonging in the hole that are there, by colour and shape", ".0%"),
    "depth_db": ("dB PSNR of the result's disparity to the input's", ".1f"),
    "edge_f1": ("F1 of the result's edges at 1 px", ".3f"),
    "psnr_inside": ("dB PSNR to the exact edit inside / outside the change", ".1f"),
    "caption_all": ("share of pictures with every object of the caption: count, colours, shapes, materials", ".0%"),
}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a GitHub-flavored Markdown table; the first column is text, the others are numbers."""
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (heads, rules, *rows)]


def tasks_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of all tasks, few steps and many; their comparison; and composed adapters."""
    entries = {name: entry for name, entry in result["tasks"].items() if name != "composition"}
    composed = result["tasks"].get("composition")
    rows, ratio_rows = [], []
    for name, entry in entries.items():
        form = OBEDIENCE[entry["obedience"]][1]
        for r in entry["rows"]:
            obedience = _figure(r["obedience"], form)
            if "psnr_outside" in r["measures"]:
                obedience += f" / {r['measures']['psnr_outside']:.1f}"
            cells = [f"{r['fd']:.1f}", f"{r['distance']:.4f}", obedience, f"{r['latency_ms']:.0f}"]
            rows.append([name, r["method"], f"{r['steps'] or '-'}", *cells])
        if (truth := entry["judge_on_truth"].get(entry["obedience"])) is not None:
            rows.append([name, "truth, by the same judge", "-", "-", "-", _figure(truth, form), "-"])
        for method, steps in entry["ratios"].items():
            adapter, against = entry["adapters"][method], next(iter(steps.values()))["against"]
            text = [f"{adapter['images']:,}", f"{adapter['bytes'] / 1e6:.1f}", against]
            ratio_rows.append([name, method, *text, *map(_ratio, steps.values()), _goal(steps["4"])])
    lines: list[str] = []
    if entries:
        counts = dict.fromkeys(f"{entry['count']}" for entry in entries.values())
        machines = dict.fromkeys(_machine(entry) for entry in entries.values())
        entries_by_measure: dict[str, list[str]] = {}
        for name, entry in entries.items():
            entries_by_measure.setdefault(OBEDIENCE[entry["obedience"]][0] + _judged(entry), []).append(name)
        measures = "; ".join(f"{', '.join(names)}: {words}" for words, names in entries_by_measure.items())
        heads = ["task", "method", "steps", "FD-ENLite0 ↓", "ENLite0 distance ↓", "obedience ↑", "ms"]
        lines += [
            f"{' or '.join(counts)} held-out scenes per row; latency of one image on {' or '.join(machines)}. "
            f"Obedience is, for {measures}.",
            "",
            *table(heads, rows),
            "",
        ]
    if ratio_rows:
        heads = ["task", "method", "images", "MB", "against", "1 step", "2 steps", "4 steps", "goal"]
        lines += [
            "Adapters in few steps, with the number of their training images and their size, compared with 50 steps of "
            "the many-step model of lower FD: ratio of FD (x1 or less: no worse), difference of obedience in dB (0 or "
            "more: no worse) or, for other units, its ratio (x1 or more: no worse), and speed-up. The goal: in 4 steps "
            "at most x1.03 of the FD, and obedience no worse.",
            "",
            *table(heads, ratio_rows),
            "",
        ]
    if composed:
        heads = ["adapters", "steps", "FD-ENLite0 ↓", "objects in the hole ↑", "dB of the disparity in the hole ↑"]
        rows = [
            [r["method"], f"{r['steps']}", f"{r['fd']:.1f}", f"{r['measures']['hole_objects']:.0%}"]
            + [f"{r['measures']['hole_depth_db']:.1f}"]
            for r in composed["rows"]
        ]
        text = f"{composed['count']} held-out scenes{_judged(composed)}"
        lines += [f"Two adapters combined, on {text}:", "", *table(heads, rows), ""]
    for command in dict.fromkeys(entry["command"] for entry in result["tasks"].values()):
        lines += [f"`{command}`", ""]
    return lines


def _ratio(ratio: dict[str, Any]) -> str:
    """Return one table cell: FD, obedience, speed."""
    if "obedience_db" in ratio:
        obedience = _figure(ratio["obedience_db"], "+.1f", after=" dB")
    else:
        obedience = _figure(ratio["obedience"], ".2f", before="x")
    return f"x{ratio['fd']:.2f} · {obedience} · x{ratio['speed']:.0f}"


def _goal(ratio: dict[str, Any]) -> str:
    """Return whether 4 steps meet the goal: FD within x1.03 of the many-step model, obedience no worse."""
    worse = ratio["obedience_db"] < 0 if "obedience_db" in ratio else (ratio["obedience"] or 1) < 1
    missed = ["FD"] * (ratio["fd"] > 1.03) + ["obedience"] * worse
    return f"missed: {', '.join(missed)}" if missed else "met"


def _machine(entry: dict[str, Any]) -> str:
    """Return the machine that a task was measured on."""
    machine = entry["machine"]
    return machine["gpu"] if entry["device"] == "cuda" else f"{machine['threads']} of {machine['cpus']} CPU cores"


def _judged(entry: dict[str, Any]) -> str:
    """Return how many scenes obedience was measured on, if some have nothing to measure."""
    judged = entry["judged"].get(entry["obedience"], entry["count"])
    return f" ({judged} of the scenes have any)" if judged < entry["count"] else ""


def finetune_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of the adapter on a fine-tune of its backbone."""
    form, truth = "{:.0%} ({:.0%})", result["judge_on_truth"]
    rows = [
        [r["method"], f"{r['steps']}", f"{r['fd']:.1f}"]
        + [form.format(r["measures"][name], truth[name]) for name in ("night", "caption_all")]
        + [f"{r['latency_ms']:.0f}"]
        for r in result["rows"]
    ]
    heads = ["method", "steps", "FD-ENLite0 ↓", "night ↑", "correct captions ↑", "ms"]
    return [
        f"The adapter `generate` on a fine-tune that it was not trained with: `{result['model']}`, trained for "
        f"{result['updates']} updates of {result['batch']} on night scenes with captions that omit the time of day. "
        f"{result['count']} held-out night scenes with such captions; the fine-tune itself with guidance "
        f"{result['guidance_scale']:g}, two passes per step (in brackets: the judge on true renders):",
        "",
        *table(heads, rows),
        "",
        f"`{result['command']}`",
        "",
    ]


def backbone_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of the backbone with a caption alone."""
    row, truth = result["rows"][-1], result["judge_on_true_renders"]
    names = ("all", "count", "colour", "shape", "material")
    heads = ["objects in the caption", "all right", "count", "colour", "shape", "material"]
    rows = [
        [n, *(f"{figures[name]:.0%} ({truth['by_count'][n][name]:.0%})" for name in names)]
        for n, figures in row["by_count"].items()
    ]
    rows.append(["1 to 4", *(f"{row[name]:.0%} ({truth[name]:.0%})" for name in names)])
    return [
        f"`mini`, the embedded backbone: codec reconstruction {result['codec_psnr_db']:.1f} dB on held-out scenes, "
        f"FD-ENLite0 to true renders {row['fd']:.1f} (of the codec alone {result['fd_codec']:.1f}). Caption "
        f"accuracy of {result['prompts']} images for held-out captions, {result['steps']} steps, guidance "
        f"{result['guidance_scale']:g}, by the scene reader (in brackets: the reader on true renders):",
        "",
        *table(heads, rows),
        "",
    ]


def decoder_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of the tiny decoder against the full one."""
    size, quality = result["size"], result["psnr_db"]
    names = {
        "scenes": f"held-out scenes, {size} px",
        "large_scenes": f"held-out scenes, {4 * size} px",
        "photographs": f"photographs, {4 * size} px",
        "samples": f"samples of `generate`, {size} px",
    }
    rows = [
        [names[name], *(_figure(row.get(key), ".1f") for key in ("to_full", "tiny", "full"))]
        for name, row in quality.items()
    ]
    speedups = " and ".join(f"{row['ratio']:.1f} times at {side} px" for side, row in result["decode"].items())
    parameters = result["decoder_parameters"]
    return [
        f"`--decoder tiny`: {parameters['tiny'] / 1e6:.2f}M parameters instead of {parameters['full'] / 1e6:.2f}M, "
        f"speed-up {speedups} (one thread). FD-ENLite0 of the {result['count']} held-out scenes after the codec is "
        f"{quality['scenes']['fd_tiny']:.1f}, with the full decoder {quality['scenes']['fd_full']:.1f}. PSNR in dB:",
        "",
        *table(["latents of", "tiny to full", "tiny to truth", "full to truth"], rows),
        "",
        f"`{result['command']}`",
        "",
    ]


def reader_lines(result: dict[str, Any]) -> list[str]:
    """Return the section of the scene reader's accuracy."""
    held, soft = result["held_out"], result["held_out_through_codec"]
    accuracies = ", ".join(
        f"{name} {held[name]:.1%} ({soft[name]:.1%})" for name in ("colour", "shape", "material", "count")
    )
    return [
        f"Accuracy of the scene reader, the judge, on held-out renders: {accuracies}; the mean error of its disparity "
        f"is {held['disparity_error']:.3f} ({soft['disparity_error']:.3f}) of the range. In brackets: renders "
        "decoded from their latents with added noise.",
        "",
    ]


def _figure(value: float | None, form: str, before: str = "", after: str = "") -> str:
    return "-" if value is None else f"{before}{value:{form}}{after}"


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "tasks.json": tasks_lines,
    "finetune.json": finetune_lines,
    "backbone.json": backbone_lines,
    "decoder.json": decoder_lines,
    "reader.json": reader_lines,
}


def main() -> None:
    """Replace the text between the two markers of the README."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        if (RESULTS / name).is_file():
            lines += section(json.loads((RESULTS / name).read_text()))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
