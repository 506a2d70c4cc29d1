"""Write docs/photographs.md from the committed results of photographs.py: python benchmarks/photo_page.py"""

from __future__ import annotations

import json
from typing import Any

from readme import RESULTS, ROOT, table

SETS = {"set14": "Set14", "bsd100": "BSD100", "val": "held-out photographs"}
KINDS = {
    "bicubic": "downscaled bicubically (classical)",
    "real": "downscaled with blur, noise and JPEG (real-world)",
    "boxes": "holes: boxes",
    "strokes": "holes: strokes",
}
GOALS = {"1": 0.95, "4": 0.85}  # ratio to Real-ESRGAN's distance, by step count
INTRODUCTION = """\
# Photographs

Written by `benchmarks/photo_page.py` from `benchmarks/results/photographs*.json`, measured by
`benchmarks/photographs.py`.

`photo · N` is what `codi upscale` does by default in N steps, `photo-real · N` the same with `--adapter upscale-real`.
Distance: ENLite0 distance to the true image, smaller is better; of patches: the same for patches of 224 px, where
texture counts more. Ratio: median over the images of the distance divided by the reference's (Real-ESRGAN; Telea for
inpainting). CPU s: seconds of one core per image.

`photo` was trained on photographs of several collections, some of them for non-commercial research only or without a
stated licence: [what it was trained on](../src/codi/weights/photo/README.md).

Names in the commands below: `set14` and `bsd100` are folders of the published test sets; `models` and `x4` hold the
weights of Real-ESRGAN and ESRGAN (`benchmarks/baselines.py` says where to get them). `photos-val-00.tar`, the held-out
photographs, comes from the same collections and is not published: use a folder of your own images instead.
`photo-ft-bp` and `photo-inpaint2` are adapters that are not in the package: train them by `codi distill photo-upscale
--objective finetune` and `codi distill photo-inpaint`, with `--data` of your own.
"""


PARTS = {
    "photographs": "# Upscaling",
    "photographs-finetuned": """# Compared with 50 steps of a fine-tuned model

`finetuned · N`: the same network and start, trained for the task by the ordinary diffusion loss (`objective: finetune`)
on 7,944 crops only, sampled in N steps.""",
    "photographs-inpaint": """# Inpainting

`mini` is what `codi inpaint` does by default; `full` an adapter of `photo` (recipe `photo-inpaint`) that is not in the
package: neither fills large holes of photographs convincingly.""",
}


GRAIN = """\
## Grain in flat areas

Part of the sampler's noise stays in its result: about 3 % of a latent's standard deviation, for any number of
steps. Neither the VAE nor the tiles cause it: encoding and decoding the enlarged input leaves a wall as flat as before.
Decoded, it is a pattern of one level of 255 at the scale of latent cells, visible on walls and skies as soon as
contrast is raised. So detail that the model adds is multiplied by v / (v + g^2), with v the local variance of the
input, or of the added detail where that is clearly more than grain, and g two levels (`sampling/colour.py`). Below, by
`benchmarks/grain.py`: power at periods of one to three latent cells in levels^2, of a wall; and photographs (20 of
BSD100, the middle 256 px, enlarged four times), without and with the removal. The other figures of this page were
measured before it.
"""


def grain_rows() -> list[list[str]]:
    """Return a row for each adapter and number of steps of grain.json."""
    rows = []
    for row in json.loads((RESULTS / "grain.json").read_text())["rows"]:
        wall, shown = row["wall"], row["photographs"]
        figures = [f"{wall['input']:.3f}", f"{wall['before']:.2f}", f"{wall['after']:.3f}"]
        figures += [" -> ".join(f"{value:.2f}" for value in shown["psnr_db"])]
        figures += [" -> ".join(f"{value:.3f}" for value in shown["enlite0_distance"])]
        rows.append([row["adapter"], str(row["steps"]), *figures, f"{100 * shown['texture_power_kept']:.1f} %"])
    return rows


def rows_of(entry: dict[str, Any]) -> list[list[str]]:
    """Return a table row for each method of a contest."""
    rows = []
    for row in entry["rows"]:
        ratio = (row.get("ratios", {}).get("distance") or {}).get("median")
        figures = [f"{row['psnr']:.2f}", f"{row['ssim']:.3f}", f"{row['distance']:.3f}", f"{row['patch_distance']:.3f}"]
        goal = (
            GOALS.get(row["method"].split(" · ")[-1]) if " · " in row["method"] and entry["task"] == "upscale" else None
        )
        goal_met = "" if goal is None or ratio is None else ("met" if ratio <= goal else "missed")
        cells = [row["method"], str(row["count"]), *figures, f"{ratio:.2f}" if ratio else "", goal_met]
        rows.append([*cells, f"{row['cpu_seconds']:.1f}"])
    return rows


def sort_key(name: str) -> tuple[int, int]:
    """Return the sort key of a contest `set/kind` on the page: by kind, then by set."""
    set_name, kind = name.split("/")
    return list(KINDS).index(kind), list(SETS).index(set_name)


def page() -> str:
    """Return the text of docs/photographs.md."""
    lines = [INTRODUCTION]
    heads = ["method", "images", "PSNR dB", "SSIM", "distance", "of patches", "ratio", "goal", "CPU s"]
    for path in sorted(RESULTS.glob("photographs*.json"), key=lambda path: path.stem):  # photographs.json first
        results = json.loads(path.read_text())
        lines += [f"#{PARTS[path.stem]}", ""]
        for name, entry in sorted(results["contests"].items(), key=lambda item: sort_key(item[0])):
            set_name, kind = name.split("/")
            lines += [f"### {SETS[set_name]}, {KINDS[kind]}", "", *table(heads, rows_of(entry)), ""]
        lines += ["Measured by:", "", *(f"    {command}" for command in results["commands"]), ""]
    lines.append(
        "Goals: at most 0.85 of Real-ESRGAN's distance at 4 steps, the ratio of the paper's LPIPS, and 0.95 at 1 step."
    )
    heads = ["adapter", "steps", "wall: input", "without", "with", "PSNR dB", "ENLite0 distance", "texture kept"]
    lines += ["", GRAIN, *table(heads, grain_rows())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "photographs.md").write_text(page())
