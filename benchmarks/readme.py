"""Writes the README's figures from the committed results: python benchmarks/readme.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by benchmarks/readme.py -->\n", "<!-- end of figures -->\n"

# What stands for obedience in tasks.json: in words, and how it is written.
OBEDIENCE: dict[str, tuple[str, str]] = {
    "input_psnr": ("dB PSNR of the downscaled result to the input", ".1f"),
    "hole_objects": ("share of the objects asked for in the hole that are there, in colour and shape", ".0%"),
    "depth_db": ("dB PSNR of the re-read disparity to the given one", ".1f"),
    "edge_f1": ("F1 of the result's edges at 1 px", ".3f"),
    "psnr_inside": ("dB PSNR to the exact edit inside / outside the change", ".1f"),
    "caption_all": ("share of pictures with every object of the caption: count, colours, shapes, materials", ".0%"),
}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A GitHub-flavoured Markdown table; the first column is text, the others are numbers."""
    rules = ["---", *["--:"] * (len(heads) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (heads, rules, *rows)]


def tasks_lines(result: dict[str, Any]) -> list[str]:
    """All tasks, few steps beside many; how the two compare; then adapters composed."""
    entries = {name: entry for name, entry in result["tasks"].items() if name != "composition"}
    composed = result["tasks"].get("composition")
    rows, compared = [], []
    for name, entry in entries.items():
        form = OBEDIENCE[entry["obedience"]][1]
        for r in entry["rows"]:
            obeys = _figure(r["obedience"], form)
            if "psnr_outside" in r["measures"]:
                obeys += f" / {r['measures']['psnr_outside']:.1f}"
            cells = [f"{r['fd']:.1f}", f"{r['distance']:.4f}", obeys, f"{r['latency_ms']:.0f}"]
            rows.append([name, r["method"], f"{r['steps'] or '-'}", *cells])
        if (truth := entry["judge_on_truth"].get(entry["obedience"])) is not None:
            rows.append([name, "truth, by the same judge", "-", "-", "-", _figure(truth, form), "-"])
        for method, steps in entry["ratios"].items():
            adapter, against = entry["adapters"][method], next(iter(steps.values()))["against"]
            told = [f"{adapter['images']:,}", f"{adapter['bytes'] / 1e6:.1f}", against]
            compared.append([name, method, *told, *map(_ratio, steps.values()), _goal(steps["4"])])
    lines: list[str] = []
    if entries:
        counts = dict.fromkeys(f"{entry['count']}" for entry in entries.values())
        machines = dict.fromkeys(_machine(entry) for entry in entries.values())
        said: dict[str, list[str]] = {}
        for name, entry in entries.items():
            said.setdefault(OBEDIENCE[entry["obedience"]][0] + _judged(entry), []).append(name)
        what = "; ".join(f"{', '.join(names)}: {words}" for words, names in said.items())
        heads = ["task", "method", "steps", "FD-ENLite0 ↓", "ENLite0 distance ↓", "obedience ↑", "ms"]
        lines += [
            f"{' or '.join(counts)} held-out scenes a row, latency of one picture on {' or '.join(machines)}. "
            f"Obedience is, for {what}.",
            "",
            *table(heads, rows),
            "",
        ]
    if compared:
        heads = ["task", "method", "images", "MB", "against", "1 step", "2 steps", "4 steps", "goal"]
        lines += [
            "Adapters, the images they were trained on and their size, in few steps against 50 of the many-step model "
            "with the better FD: its FD times so much (x1 or less: no worse), its obedience so many dB more (0 or "
            "more: no worse) or, where it is no dB, times so much (x1 or more: no worse), and so many times faster. "
            "The goal: in 4 steps at most x1.03 of the FD, and obedience no worse.",
            "",
            *table(heads, compared),
            "",
        ]
    if composed:
        heads = ["adapters", "steps", "FD-ENLite0 ↓", "objects in the hole ↑", "dB of the disparity in the hole ↑"]
        rows = [
            [r["method"], f"{r['steps']}", f"{r['fd']:.1f}", f"{r['measures']['hole_objects']:.0%}"]
            + [f"{r['measures']['hole_depth_db']:.1f}"]
            for r in composed["rows"]
        ]
        told = f"{composed['count']} held-out scenes{_judged(composed)}"
        lines += [f"Two adapters at once, on {told}:", "", *table(heads, rows), ""]
    for command in dict.fromkeys(entry["command"] for entry in result["tasks"].values()):
        lines += [f"`{command}`", ""]
    return lines


def _ratio(ratio: dict[str, Any]) -> str:
    """One cell: FD, obedience, speed."""
    if "obedience_db" in ratio:
        obedience = _figure(ratio["obedience_db"], "+.1f", after=" dB")
    else:
        obedience = _figure(ratio["obedience"], ".2f", before="x")
    return f"x{ratio['fd']:.2f} · {obedience} · x{ratio['speed']:.0f}"


def _goal(ratio: dict[str, Any]) -> str:
    """Whether 4 steps are as good as many: FD within x1.03, obedience no worse."""
    worse = ratio["obedience_db"] < 0 if "obedience_db" in ratio else (ratio["obedience"] or 1) < 1
    missed = ["FD"] * (ratio["fd"] > 1.03) + ["obedience"] * worse
    return f"missed: {', '.join(missed)}" if missed else "met"


def _machine(entry: dict[str, Any]) -> str:
    """Where a task was measured."""
    machine = entry["machine"]
    return machine["gpu"] if entry["device"] == "cuda" else f"{machine['threads']} of {machine['cpus']} CPU cores"


def _judged(entry: dict[str, Any]) -> str:
    """How many scenes the headline was measured on, where some have nothing to measure."""
    judged = entry["judged"].get(entry["obedience"], entry["count"])
    return f" ({judged} of the scenes ask for any)" if judged < entry["count"] else ""


def finetune_lines(result: dict[str, Any]) -> list[str]:
    """The adapter on a fine-tune of its backbone."""
    form, truth = "{:.0%} ({:.0%})", result["judge_on_truth"]
    rows = [
        [r["method"], f"{r['steps']}", f"{r['fd']:.1f}"]
        + [form.format(r["measures"][name], truth[name]) for name in ("night", "caption_all")]
        + [f"{r['latency_ms']:.0f}"]
        for r in result["rows"]
    ]
    heads = ["method", "steps", "FD-ENLite0 ↓", "night ↑", "captions right ↑", "ms"]
    return [
        f"The adapter `generate` on a fine-tune that it never saw: `{result['model']}`, trained for "
        f"{result['updates']} updates of {result['batch']} on night scenes under captions without the time of day. "
        f"{result['count']} held-out night scenes, asked for by such captions; the fine-tune itself with guidance "
        f"{result['guidance_scale']:g}, two passes a step (in brackets: what the judge says of true renders):",
        "",
        *table(heads, rows),
        "",
        f"`{result['command']}`",
        "",
    ]


def backbone_lines(result: dict[str, Any]) -> list[str]:
    """What the backbone can do with a caption alone."""
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
        f"FD-ENLite0 to true renders {row['fd']:.1f} (of the codec alone {result['fd_codec']:.1f}). What "
        f"{result['prompts']} pictures for held-out captions show, {result['steps']} steps, guidance "
        f"{result['guidance_scale']:g}, as the scene reader sees it (in brackets: what it says of true renders):",
        "",
        *table(heads, rows),
        "",
    ]


def decoder_lines(result: dict[str, Any]) -> list[str]:
    """The tiny decoder beside the full one."""
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
    faster = " and ".join(f"{row['ratio']:.1f} times at {side} px" for side, row in result["decode"].items())
    parameters = result["decoder_parameters"]
    return [
        f"`--decoder tiny`: {parameters['tiny'] / 1e6:.2f}M parameters in place of {parameters['full'] / 1e6:.2f}M, "
        f"faster {faster} (one thread). FD-ENLite0 of the {result['count']} held-out scenes after the codec is "
        f"{quality['scenes']['fd_tiny']:.1f}, with the full decoder {quality['scenes']['fd_full']:.1f}. PSNR in dB:",
        "",
        *table(["latents of", "tiny to full", "tiny to truth", "full to truth"], rows),
        "",
        f"`{result['command']}`",
        "",
    ]


def reader_lines(result: dict[str, Any]) -> list[str]:
    """How far the judge can be trusted."""
    held, soft = result["held_out"], result["held_out_through_codec"]
    said = ", ".join(f"{name} {held[name]:.1%} ({soft[name]:.1%})" for name in ("colour", "shape", "material", "count"))
    return [
        f"The scene reader, which judges, reads held-out renders right in: {said}; its disparity is off by "
        f"{held['disparity_error']:.3f} ({soft['disparity_error']:.3f}) of the range on average. In brackets: renders "
        "that went through the codec, with noise.",
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
    """Replaces what stands between the two markers."""
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
