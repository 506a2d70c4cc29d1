"""Writes the README's figures from the committed results: python benchmarks/readme.py"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by benchmarks/readme.py -->\n", "<!-- end of figures -->\n"


def upscale_table(result: dict) -> list[str]:
    """One row a method and step count."""
    lines = [
        f"x4 upscaling of {result['count']} held-out scenes (seed {result['seed']}), the same backbone, adapter and "
        "image budget for both models (ldm: plain fine-tuning); latency of one picture on "
        f"{result['machine']['cpus']} CPU cores:",
        "",
        "| method | steps | PSNR dB ↑ | SSIM ↑ | ENLite0 distance ↓ | FD-ENLite0 ↓ | obedience dB ↑ | ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['method']} | {r['steps'] or '-'} | {r['psnr']:.2f} | {r['ssim']:.3f} | {r['distance']:.4f} "
            f"| {r['fd']:.1f} | {r['obedience']:.1f} | {r['latency_ms']:.0f} |"
        )
    return [*lines, "", f"`{result['command']}`", ""] if result.get("command") else [*lines, ""]


def backbone_lines(result: dict) -> list[str]:
    """What `mini` can do."""
    row = result["rows"][-1]
    return [
        f"`mini`, the embedded backbone: codec reconstruction {result['codec_psnr_db']:.1f} dB on held-out scenes; of "
        f"{result['prompts']} held-out prompts with one object, {row['object_present']:.0%} show an object and "
        f"{row['colour_as_asked']:.0%} show it in the colour asked for (the judge scores "
        f"{result['judge_on_true_renders']:.0%} on true renders).",
        "",
    ]


def main() -> None:
    """Replaces what stands between the two markers."""
    lines: list[str] = []
    for name, table in (("upscale.json", upscale_table), ("backbone.json", backbone_lines)):
        if (RESULTS / name).is_file():
            lines += table(json.loads((RESULTS / name).read_text()))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
