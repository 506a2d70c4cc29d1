"""The page of `codi demo`: one HTML file, from the template page.html, that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

LAYOUT = Path(__file__).with_name("page.html")
FIGURES = {  # key of a figure -> (heading, decimals)
    "psnr": ("PSNR dB ↑", 2),
    "input_psnr": ("PSNR to the input, dB ↑", 1),
    "jumps_shown": ("depth jumps shown ↑", 2),
    "edge_f1": ("edge F1 ↑", 2),
    "hole_psnr": ("PSNR in the hole, dB ↑", 1),
    "psnr_inside": ("PSNR inside the change, dB ↑", 1),
    "psnr_outside": ("PSNR outside it, dB ↑", 1),
    "distance": ("ENLite0 distance ↓", 3),
    "ms": ("ms a picture ↓", 0),
}
COLOURS = ("#2f6fde", "#d9762b", "#3a9a5b", "#9a4fc4")


def build(result: dict[str, Any]) -> str:
    """Return the page's HTML from the content of timings.json."""
    machine, sections = result["machine"], result["sections"]
    machine_name = machine.get("gpu") or f"{machine.get('cpus')} CPU cores, {machine.get('threads')} threads"
    number = len(result["adapters"])
    links = [*((s["name"], s["title"]) for s in sections), ("timings", "Timings")]
    links += [("training", "Training")] if result["training"] else []
    return Template(LAYOUT.read_text(encoding="utf-8")).substitute(
        title="One backbone, " + (f"{_count(number)} tasks" if number > 1 else "one task") + ", 1 to 4 steps",
        summary=f"<p>Every picture was made by <code>{escape(result['model'])}</code> on this machine "
        f"({escape(str(machine_name))}), {result['size']} px wide. The scenes are the first {result['count']} held-out "
        f"ones of seed {result['seed']}: not cherry-picked, and never trained on. This page took "
        f"{result['seconds']:.0f} s.</p>",
        notes=_notes(result),
        links="".join(f'<a href="#{escape(name)}">{escape(title)}</a>' for name, title in links),
        sections="\n".join(map(_section, sections)),
        timings=_timings(result),
        training=_training(result["training"]) if result["training"] else "",
        command=escape(result["command"]),
    )


def _count(number: int) -> str:
    return ("no", "one", "two", "three", "four", "five", "six")[number] if number < 7 else str(number)


def _notes(result: dict[str, Any]) -> str:
    lines = [f"<b>{escape(name)}</b> is not shown: {_text(reason)}" for name, reason in result["skipped"].items()]
    lines += [_text(result["note"])] if result["note"] else []
    return f'<div class="note"><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></div>' if lines else ""


def _text(plain: str) -> str:
    """Return the HTML of a line in which backticks mark code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(plain))


def _section(section: dict[str, Any]) -> str:
    columns, rows = section["columns"], section["rows"]
    choice = " and ".join(
        _choice(side, key, columns) for side, key in zip(("left", "right"), section["sides"], strict=True)
    )
    few = " few" if len(rows) < 4 else ""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns.values())
    note = f'<p class="soft">{escape(section["note"])}</p>' if section["note"] else ""
    return (
        f'<section id="{escape(section["name"])}" data-name="{escape(section["name"])}" '
        f'data-columns="{escape(json.dumps(columns))}">\n<h2>{escape(section["title"])}</h2>\n'
        f"<p>{escape(section['about'])}</p>{note}\n"
        f'<div class="choice">Slide between {choice}</div>\n'
        f'<div class="pairs{few}">{"".join(_pair(row, section) for row in rows)}</div>\n'
        "<h3>Side by side</h3>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(section["title"])}, side by side">'
        f'<table class="strips"><thead><tr>{head}</tr></thead>\n<tbody>'
        f"{''.join(_strip(row, columns) for row in rows)}</tbody></table></div>\n"
        f'<div class="under">{_figures(section)}{_commands(section)}</div>\n</section>'
    )


def _choice(side: str, chosen: str, columns: dict[str, str]) -> str:
    options = "".join(
        f'<option value="{escape(key)}"{" selected" if key == chosen else ""}>{escape(title)}</option>'
        for key, title in columns.items()
    )
    return f'<select class="{side}" aria-label="{side} side">{options}</select>'


def _pair(row: dict[str, Any], section: dict[str, Any]) -> str:
    columns, (left, right) = section["columns"], section["sides"]
    title, pictures = escape(row["title"]), row["pictures"]
    images = "".join(
        f'<img class="{side}{_coarse(key)}" src="{escape(pictures[key])}" alt="{escape(columns[key])}: {title}">'
        for side, key in (("left", left), ("right", right))
    )
    return (
        f'<figure><div class="pair" data-name="{escape(row["name"])}" data-title="{title}">{images}'
        f'<span class="bar"></span><b class="l">{escape(columns[left])}</b><b class="r">{escape(columns[right])}</b>'
        f'<input type="range" min="0" max="100" value="50" aria-label="slide between two versions of: {title}"></div>'
        f"<figcaption>{title}</figcaption></figure>\n"
    )


def _coarse(key: str) -> str:
    """Return the CSS class that shows the input with visible pixels, so that its low resolution is seen."""
    return " coarse" if key == "given" else ""


def _strip(row: dict[str, Any], columns: dict[str, str]) -> str:
    title = escape(row["title"])
    cells = "".join(
        f'<td><img class="{_coarse(key).strip()}" loading="lazy" src="{escape(row["pictures"][key])}" '
        f'alt="{escape(heading)}: {title}"></td>'
        for key, heading in columns.items()
    )
    return f'<tr class="cap"><th colspan="{len(columns)}"><span>{title}</span></th></tr><tr>{cells}</tr>\n'


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of figures; the first cell of each row is its heading. Cells are escaped here."""
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    ]
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figures(section: dict[str, Any]) -> str:
    keys = [key for key in FIGURES if any(row.get(key) is not None for row in section["figures"])]
    rows = [[section["columns"][r["column"]], *(_figure(r.get(k), k) for k in keys)] for r in section["figures"]]
    table = _table(["", *(FIGURES[key][0] for key in keys)], rows)
    return f"<div><h3>Means over these {len(section['rows'])} pictures</h3>{table}</div>"


def _figure(value: float | None, key: str) -> str:
    return "" if value is None else f"{value:.{FIGURES[key][1]}f}"


def _commands(section: dict[str, Any]) -> str:
    first, *rest = section["commands"]
    more = "\n".join(map(escape, rest))
    fold = f"<details><summary>The other rows</summary><pre><code>{more}</code></pre></details>" if rest else ""
    steps = "; <code>--steps</code> chooses the column" if "many" in section["columns"] else ""
    return (
        '<div class="commands"><h3>Make it yourself</h3>'
        f'<p class="soft">In the folder of this page{steps}.</p>'
        f"<pre><code>{escape(first)}</code></pre>{fold}</div>"
    )


def _timings(result: dict[str, Any]) -> str:
    """Return a table with one row per task: milliseconds by step count, size of the adapter."""
    rows = []
    for section in result["sections"]:
        if section["name"] not in result["adapters"]:
            continue
        adapter = result["adapters"][section["name"]]
        ms = {row["column"]: row for row in section["figures"]}
        kind = "full" if adapter["full"] else "backbone shared"
        milliseconds = [f"{ms[f'steps-{n}']['ms']:.0f}" for n in (1, 2, 4)]
        many = f"{ms['many']['ms']:.0f} ({section['columns']['many']})"
        rows.append([section["title"], *milliseconds, many, f"{adapter['bytes'] / 1e6:.1f}", kind])
    swap = result["swap_ms"]
    swapping = "" if swap is None else f" Setting another adapter on the loaded backbone takes {swap:.2g} ms."
    head = ["", "1 step", "2 steps", "4 steps", "many steps", "adapter MB", "kind"]
    return (
        f"<p>Milliseconds a picture, one at a time, reading the prompt and decoding included (median).{swapping}</p>"
        f"{_table(head, rows)}"
        '<p class="soft">PSNR is to the truth and favours blur; it is shown only where one result is right. The '
        "ENLite0 distance compares features of an image network, as LPIPS does. Figures over a handful of pictures "
        "are noisy: <code>codi evaluate</code> measures as many pictures as you like.</p>"
    )


def _training(training: dict[str, Any]) -> str:
    curve, previews = training["curve"], training["previews"]
    known = {key for row in curve for key in row} - {"images", "seconds", "learning_rate", "gradient_norm"}
    losses = sorted(key for key in known if not key[-1].isdigit())
    obedience = sorted(key for key in known if key.startswith("obedience_"))

    def series(keys: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        return {
            key.replace("obedience_", "steps: "): [(row["images"], row[key]) for row in curve if key in row]
            for key in keys
        }

    charts = _chart("loss", series(losses)) + _chart("obedience, dB", series(obedience))
    shown = [previews[0], previews[-1]] if len(previews) > 1 else previews
    sheets = "".join(
        f'<figure><img class="coarse" src="{escape(path)}" alt="preview of the training" loading="lazy">'
        f"<figcaption>after {int(Path(path).stem):,} images: input, 1, 2, 4 steps, truth</figcaption></figure>"
        for path in shown
    )
    return (
        f'<section id="training"><h2>Training</h2><p>A new upscaling adapter, trained in one stage '
        f"({escape(training['objective'])}): {training['images']:,} of {training['of']:,} images in "
        f"{training['seconds']:.0f} s. The same command resumes from there; <code>codi distill</code> runs full "
        f'trainings.</p><div class="charts">{charts}</div><div class="sheets">{sheets}</div></section>'
    )


def _chart(title: str, series: dict[str, list[tuple[float, float]]], width: int = 460, height: int = 200) -> str:
    """Return an SVG chart of lines over training images; an empty string without points."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, bottom, right, top = 44, 24, 8, 10
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        across = (x - x0) / ((x1 - x0) or 1) * (width - left - right) + left
        return f"{across:.1f},{height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - bottom - top):.1f}"

    lines, names = "", ""
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        lines += f'<polyline points="{" ".join(place(x, y) for x, y in line)}" stroke="{colour}"/>'
        names += f'<span style="color:{colour}">{escape(name)}</span> '
    axes = (
        f'<path class="axis" d="M{left},{top}V{height - bottom}H{width - right}"/>'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{y1:.3g}</text>'
        f'<text x="{left - 6}" y="{height - bottom}" text-anchor="end">{y0:.3g}</text>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end">{x1:,.0f} images</text>'
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)} {names}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{axes}{lines}</svg></figure>'
    )
