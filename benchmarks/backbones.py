"""Measure full-size backbones: one forward pass through the adapted model, on any machine that can hold the weights.

    python benchmarks/backbones.py                       # every checkpoint, each in its own process
    python benchmarks/backbones.py --only sana-0.6b      # adds to the existing results

Weights are random, of the published configuration, in bfloat16. For each checkpoint and form of adapter: parameter
counts, whether the untrained adapter leaves the backbone's output exactly unchanged at 256 px, seconds per pass, and
peak memory of the process. The largest are built on the meta device, where a pass has shapes but no values. Results go
to benchmarks/results/backbones.json; docs/backbones.md is written from them and from those of family_parity.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from published import CHECKPOINTS, build

from codi.models import codec
from codi.models.adapter import FORMS
from codi.models.backbones import family_of
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student
from codi.models.text import FEATURES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
PARITY = RESULTS.with_name("family_parity.json")
PAGE = ROOT / "docs" / "backbones.md"
HEAD = """# Backbones

`codi` adapts these families of text-to-image models, as diffusers folders, hub ids, fp16 variants, sharded weights, and
single files where diffusers reads them. Fine-tunes of them work too; your LoRA files can be merged first (`loras`).
Edit, fill, control and video variants are refused, and so are families that are not listed.

| family | checkpoints | guidance | ControlNet form |
| --- | --- | --- | --- |
| Stable Diffusion | 1.5, 2.1, XL, pruned and distilled ones | classifier-free | yes |
| Stable Diffusion 3 | 3, 3.5 medium and large | classifier-free | yes |
| FLUX.1 | dev, schnell | dev: an input (`embedded_guidance`); classifier-free | yes, for image conditions |
| FLUX.2 | klein base and distilled, dev | klein base: classifier-free; dev: an input | no |
| Z-Image | base, Turbo | classifier-free; scale g of the stock pipeline is g + 1 here | yes |
| Qwen-Image | Qwen-Image | classifier-free, with the stock pipeline's rescaling | yes |
| SANA | 1.0, 1.5 | classifier-free | 1.0: yes, for image conditions |

Distilled guidance is plain classifier-free guidance in every family, without Qwen-Image's rescaling.

Every family takes all forms of adapter: `fused` (CoDi's own: a copy of the first half of the blocks reads the condition
once per image, and its tokens are mixed into the backbone's after each of these blocks), `hint` (the condition's latent
is added to the input tokens: the sequence gets no longer, and no second network runs), `controlnet` where diffusers has
a class, and `lora`. Recipes: `codi distill FAMILY/depth` and `FAMILY/generate`, FAMILY one of sd3, flux, flux2, zimage,
qwen, sana; `--dry-run` reports what they need without reading any weights. A new family is one file:
[CONTRIBUTING.md](../CONTRIBUTING.md#a-new-backbone-is-one-file).
"""
SIDE = 256
TOKENS = 64  # prompt length
RANK = 16
# (checkpoint, form of adapter) pairs to run; checkpoints in META are built without weights.
RUNS = [
    ("sana-0.6b", "hint"), ("sana-0.6b", "fused"), ("sd35-medium", "hint"), ("sd35-medium", "fused"),
    ("flux2-klein-4b", "hint"), ("flux2-klein-4b", "fused"), ("zimage", "hint"), ("flux", "hint"), ("flux", "fused"),
    ("qwen-image", "hint"), ("qwen-image", "fused"),
]  # fmt: skip
META = ("flux", "qwen-image")


@torch.no_grad()
def measure(checkpoint: str, form: str) -> dict[str, Any]:
    """Run one forward pass and return its row of the results."""
    meta = checkpoint in META
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    device = torch.device("meta" if meta else "cpu")
    with device:
        network, vae = build(checkpoint, "transformer").eval(), build(checkpoint, "vae").eval()
        adapter = FORMS[form].from_backbone(network, vae, 3, guidance_scales=1).eval()
        adapted = Student(add_lora(network, RANK, "lora"), adapter)
        family, latent_size = family_of(network), SIDE // codec.downscale(vae)
        z = torch.randn(1, codec.channels(vae), latent_size, latent_size)
        added = {name: torch.randn(1, *shape) for name, shape in family.condition_shapes(network.config).items()}
        text, noise_level = added.pop(FEATURES)[:, :TOKENS], torch.tensor([600.0], dtype=torch.float32)
        added = {k: torch.ones(1, TOKENS, dtype=torch.bool) if k == "mask" else v for k, v in added.items()}
        condition = adapter.read(torch.rand(1, 3, SIDE, SIDE), vae)
        conditioning = Conditioning(text, condition, added=added or None, guidance=torch.full((1, 1), 3.0))
    expected = Student(network)(z, noise_level, conditioning)
    started = time.perf_counter()
    output = adapted(z, noise_level, conditioning)
    seconds = time.perf_counter() - started
    adapter_parameters = sum(p.numel() for p in adapter.parameters())
    lora_parameters = sum(p.numel() for name, p in adapted.network.named_parameters() if "lora_" in name)
    assert output.shape == z.shape
    return {
        "checkpoint": checkpoint, "form": form, "network": sum(p.numel() for p in network.parameters()),
        "adapter": adapter_parameters, "lora": lora_parameters, "device": device.type,
        "neutral": None if meta else bool(torch.equal(output, expected)),
        "finite": None if meta else bool(output.isfinite().all()),
        "seconds": None if meta else seconds,
        "peak_gib": None if meta else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def parity(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of differences to the stock pipelines."""
    lines = [
        "## Equal to the stock pipelines", "",
        "Without an adapter `CoDiPipeline` gives the stock pipeline's image. The largest difference of a pixel in "
        "[0, 1], on tiny random models in float32, same noise, same sigmas (`benchmarks/family_parity.py`):", "",
        "| family | model | guidance | 4 steps | 20 steps |", "| --- | --- | --- | --: | --: |",
    ]  # fmt: skip
    for row in rows:
        four, twenty = (f"{row['largest'][steps]:.1e}" for steps in ("4", "20"))
        lines.append(f"| {row['family']} | {row['model']} | {row['guidance']} | {four} | {twenty} |")
    return [*lines, ""]


def page(rows: list[dict[str, Any]], parity_rows: list[dict[str, Any]]) -> str:
    """Return docs/backbones.md."""
    lines = [
        *parity(parity_rows),
        "## At full size", "",
        "Written by `benchmarks/backbones.py`: random weights of the published configurations in bfloat16, one pass at "
        f"{SIDE} px with a prompt of {TOKENS} tokens, low-rank updates of rank {RANK} beside the adapter. \"Neutral\": "
        "the untrained adapter leaves the backbone's output unchanged, bit for bit. Peak memory is that of the whole "
        "process, the VAE included. Seconds were measured on a machine with other load. Rows without figures were "
        "built on the meta device.", "",
        "| checkpoint | adapter | network | adapter's own | LoRA | neutral | s a pass | peak memory |",
        "| --- | --- | --: | --: | --: | --- | --: | --: |",
    ]  # fmt: skip
    for row in rows:
        neutral = {True: "yes", False: "NO", None: "-"}[row["neutral"]]
        measured = row["peak_gib"] is not None
        cost = f"{row['seconds']:.1f} | {row['peak_gib']:.1f} GiB" if measured else "- | -"
        lines.append(
            f"| {row['checkpoint']} | {row['form']} | {row['network'] / 1e9:.2f}B | {row['adapter'] / 1e6:.1f}M | "
            f"{row['lora'] / 1e6:.1f}M | {neutral} | {cost} |"
        )
    return HEAD + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CHECKPOINTS))
    parser.add_argument("--page", action="store_true", help="only write the page, from the existing results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for checkpoint, form in [] if args.page else RUNS:
        if args.only and checkpoint not in args.only:
            continue
        command = [sys.executable, __file__, "--one", checkpoint, form]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            print(f"{checkpoint} {form}: failed: {process.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows = [row for row in rows if (row["checkpoint"], row["form"]) != (checkpoint, form)]
        rows.append(json.loads(process.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        rows.sort(key=lambda row: RUNS.index((row["checkpoint"], row["form"])))
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "side": SIDE, "rows": rows}, indent=1) + "\n")
    PAGE.write_text(page(rows, json.loads(PARITY.read_text())["rows"]))


if __name__ == "__main__":
    main()
