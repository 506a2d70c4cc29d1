"""The page of `codi demo`: one HTML file, no network, pictures by relative links."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..errors import UserError

VERSIONS = {
    "input": "input",
    "bicubic": "bicubic",
    "steps-1": "1 step",
    "steps-2": "2 steps",
    "steps-4": "4 steps",
    "truth": "truth",
}
"""Folder below the page -> what it shows."""
COLOURS = ("#2f6fde", "#d9762b", "#3a9a5b", "#9a4fc4")


def write(path: Path, text: str) -> None:
    """The page, whole or not at all. Raises UserError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): name another folder") from error


def build(pictures: Sequence[tuple[str, str, str]], told: dict[str, Any]) -> str:
    """The page's HTML. `pictures`: (file name without .png, title, group) of each; `told`: what timings.json holds."""
    machine = told["machine"]
    where = machine.get("gpu") or f"{machine.get('cpus')} CPU cores, {machine.get('threads')} threads"
    groups = list(dict.fromkeys(group for _, _, group in pictures))
    sections = [
        f'<h2>{escape(group.capitalize())}</h2>\n<div class="grid {escape(group)}">'
        + "".join(_slider(name, title) for name, title, mine in pictures if mine == group)
        + "</div>"
        for group in groups
    ]
    return _PAGE.substitute(
        summary=f"{len(pictures)} picture files, enlarged {told['scale']} times by "
        f"<code>{escape(told['model'])}</code> in 1, 2 and 4 steps. "
        f"Made in {told['seconds']:.0f} s on {escape(str(where))}.",
        note=f'<p class="note">{escape(told["note"])}</p>' if told["note"] else "",
        left=_choice("left", "bicubic"),
        right=_choice("right", "steps-4"),
        sections="\n".join(sections),
        figures=_table(told["figures"]),
        strips="".join(_strip(name, title) for name, title, _ in pictures),
        heads="".join(f"<th>{escape(title)}</th>" for title in VERSIONS.values()),
        training=_training(told["training"]) if told["training"] else "",
    )


def _choice(side: str, chosen: str) -> str:
    options = "".join(
        f'<option value="{key}"{" selected" if key == chosen else ""}>{title}</option>'
        for key, title in VERSIONS.items()
    )
    return f'<label>{side} <select id="{side}">{options}</select></label>'


def _slider(name: str, title: str) -> str:
    safe = escape(name)
    return (
        f'<figure><div class="pair" data-name="{safe}"><img class="left" src="bicubic/{safe}.png" alt="bicubic">'
        f'<img class="right" src="steps-4/{safe}.png" alt="4 steps"><span class="bar"></span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="compare"></div>'
        f"<figcaption>{escape(title)}</figcaption></figure>\n"
    )


def _strip(name: str, title: str) -> str:
    cells = "".join(
        f'<td><img loading="lazy" src="{folder}/{escape(name)}.png" alt="{what} of {escape(title)}"></td>'
        for folder, what in VERSIONS.items()
    )
    return f"<tr>{cells}</tr>\n"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        method = f"{row['steps']} step{'s' * (row['steps'] > 1)}" if row["steps"] else row["method"]
        ms = "" if row["ms"] is None else f"{row['ms']:.0f}"
        numbers = (
            f"<td>{row['psnr']:.2f}</td><td>{row['obedience']:.1f}</td><td>{row['distance']:.4f}</td><td>{ms}</td>"
        )
        lines.append(f"<tr><th>{escape(row['group'])}</th><th>{escape(method)}</th>{numbers}</tr>")
    return "\n".join(lines)


def _training(training: dict[str, Any]) -> str:
    curve, previews = training["curve"], training["previews"]
    known = {key for row in curve for key in row} - {"images", "seconds", "learning_rate", "gradient_norm"}
    obedience = sorted(key for key in known if key.startswith("obedience"))
    losses = sorted(known - set(obedience))

    def series(keys: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        return {
            key.replace("obedience_", "steps: "): [(row["images"], row[key]) for row in curve if key in row]
            for key in keys
        }

    charts = _chart("loss", series(losses)) + _chart("obedience, dB", series(obedience))
    shown = [previews[0], previews[-1]] if len(previews) > 1 else previews
    sheets = "".join(
        f'<figure><img class="sheet" src="{escape(path)}" alt="preview">'
        f"<figcaption>after {int(Path(path).stem):,} images: input, 1, 2, 4 steps, truth</figcaption></figure>"
        for path in shown
    )
    return (
        f"<h2>Training</h2><p>A fresh adapter, adapted and distilled in one stage ({escape(training['objective'])}): "
        f"{training['images']:,} of {training['of']:,} images in {training['seconds']:.0f} s. "
        "The same command again goes on from there.</p>"
        f'<div class="charts">{charts}</div><div class="grid sheets">{sheets}</div>'
    )


def _chart(title: str, series: dict[str, list[tuple[float, float]]], width: int = 460, height: int = 200) -> str:
    """Lines over training images, as SVG; nothing for no points."""
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


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>codi: upscaling in 1 to 4 steps</title>
<style>
:root { color-scheme: light dark; --paper: #fbfbf9; --ink: #1c1d1f; --soft: #6a6d73; --line: #dcdcd6; --panel: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e9e9e6; --soft: #9a9da3; --line: #34363a; --panel: #1f2023; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .9rem; }
p { max-width: 44rem; margin: .5rem 0; }
.note, figcaption, caption, .soft { color: var(--soft); font-size: .875rem; }
.controls { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 1.25rem; padding: .7rem 0;
  background: var(--paper); border-bottom: 1px solid var(--line); margin-top: 1.2rem; }
select { font: inherit; padding: .15rem .4rem; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: .35rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem; }
.grid.photographs { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
.grid.sheets { grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
figure { margin: 0; }
figcaption { padding: .35rem .1rem; }
img { display: block; width: 100%; image-rendering: pixelated; }
.pair { --at: 50%; position: relative; aspect-ratio: 1; overflow: hidden; border-radius: .5rem;
  background: var(--line); }
.pair img { position: absolute; inset: 0; height: 100%; }
.pair .right { clip-path: inset(0 0 0 var(--at)); }
.pair .bar { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 4px rgb(0 0 0 / .5); }
.pair input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.pair:focus-within { outline: 2px solid #2f6fde; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.figures td, .figures th { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: 400; white-space: nowrap; }
.figures th { text-align: left; }
.figures thead th { color: var(--soft); font-size: .875rem; text-align: right; }
.strips { width: 100%; table-layout: fixed; min-width: 40rem; }
.strips td { padding: 2px; }
.strips th { font-weight: 400; font-size: .875rem; color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0; }
.chart { flex: 1 1 20rem; }
.chart span { margin-left: .6rem; }
svg polyline { fill: none; stroke-width: 1.8; }
svg .axis { fill: none; stroke: var(--line); }
svg text { fill: var(--soft); font-size: 11px; }
.sheet { border-radius: .4rem; }
summary { cursor: pointer; }
code { font-size: .92em; }
</style>
</head>
<body>
<h1>Upscaling in 1 to 4 steps</h1>
<p>$summary</p>
$note
<div class="controls" aria-label="what the sliders compare">$left $right</div>
$sections
<h2>Figures</h2>
<div class="scroll"><table class="figures">
<thead><tr><th></th><th></th><th>PSNR dB ↑</th><th>obedience dB ↑</th><th>ENLite0 distance ↓</th><th>ms a picture ↓</th>
</tr></thead>
<tbody>
$figures
</tbody></table></div>
<p class="soft">PSNR is to the truth; it favours blur, which is why bicubic does well in it. Obedience is the PSNR
of the result, made small again, to the input. The ENLite0 distance compares features of an image network, as LPIPS
does.</p>
<details><summary>Everything side by side</summary>
<div class="scroll"><table class="strips"><thead><tr>$heads</tr></thead><tbody>
$strips</tbody></table></div></details>
$training
<script>
for (const pair of document.querySelectorAll(".pair")) {
  const slider = pair.querySelector("input");
  slider.addEventListener("input", () => pair.style.setProperty("--at", slider.value + "%"));
}
for (const side of ["left", "right"]) {
  const select = document.getElementById(side);
  const show = () => {
    for (const pair of document.querySelectorAll(".pair")) {
      const image = pair.querySelector("." + side);
      image.src = select.value + "/" + pair.dataset.name + ".png";
      image.alt = select.selectedOptions[0].text;
    }
  };
  select.addEventListener("change", show);
  show();
}
</script>
</body>
</html>
""")
