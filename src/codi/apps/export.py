"""`codi export`: write an adapter in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UserError
from .common import (
    BadUsage,
    Config,
    Json,
    Lora,
    ModelOrDefault,
    Steps,
    hide_loading_bars,
    parse_loras,
    print_json,
    spinner,
)
from .generate import parse_size

EXAMPLE = "Example: codi export runs/my-depth --to diffusers -o my-depth-diffusers"


def export(
    adapter: Annotated[str, typer.Argument(help="An embedded adapter's name or a folder.")],
    to: Annotated[
        Literal["diffusers", "ldm", "onnx"],
        typer.Option(
            help="diffusers: a folder; for Stable Diffusion also ldm, a .safetensors file for programs like ComfyUI, "
            "and onnx."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write; it must not exist yet.")],
    model: ModelOrDefault = None,
    lora: Lora = None,
    config: Config = None,
    steps: Steps = 4,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="Precision of the weights, not for ONNX; by default as the adapter is stored.", show_default=False
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="ONNX: size of the pictures; by default the model's own.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write an adapter in a form that other programs use: stock diffusers, ComfyUI, onnxruntime."""
    width, height = parse_size(size)
    if size and to != "onnx":
        raise BadUsage(f"--size {size}: only ONNX fixes the size: leave it out")
    if dtype and to == "onnx":
        raise BadUsage(f"--dtype {dtype}: --to onnx writes float32 alone: leave it out")
    if to == "ldm" and out.suffix != ".safetensors":
        raise BadUsage(f"{out}: --to ldm writes a .safetensors file: call it {out.name}.safetensors")
    if to != "ldm" and out.suffix == ".safetensors":
        raise BadUsage(f"{out}: --to {to} writes a folder: leave the .safetensors out")
    with spinner(f"exporting {adapter}"):
        hide_loading_bars()
        pixels = (height, width) if height and width else None
        from ..models.adapter_files import default_model

        model = model or default_model(adapter)
        files, facts = _write(adapter, to, out, model, parse_loras(lora), config, steps, pixels, dtype)
    sizes = [{"path": str(path), "bytes": path.stat().st_size} for path in files]
    if json_:
        print_json(
            {"adapter": adapter, "model": model, "to": to, "out": str(out), "steps": steps, **facts, "files": sizes}
        )
        return
    for row in sizes:
        print(f"{row['path']}  {row['bytes'] / 1e6:.1f} MB")


def _write(
    adapter: str,
    to: str,
    out: Path,
    model: str,
    loras: dict[str, float],
    config: str | None,
    steps: int,
    size: tuple[int, int] | None,
    dtype: str | None,
) -> tuple[list[Path], dict[str, Any]]:
    """Export the adapter; return the files written and facts about them."""
    from ..export.diffusers import export_diffusers
    from ..export.ldm import beside, export_ldm
    from ..export.onnx import export_onnx, require_packages
    from ..export.source import load_source

    targets = beside(out) if to == "ldm" else [out]
    if existing := [path for path in targets if path.exists()]:
        raise UserError(f"{existing[0]}: exists already: delete it, or give another --out")
    if to == "onnx":
        require_packages()  # fail before loading the model
    source = load_source(adapter, model, loras, config)
    if steps > (horizon := int(source.backbone.schedule.horizon)):
        raise BadUsage(f"--steps {steps}: the model has {horizon} noise levels: use 1 to 4")
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "onnx":
        facts = export_onnx(source, out, steps, size)
    else:
        import torch

        write = export_ldm if to == "ldm" else export_diffusers
        facts = write(source, out, steps, getattr(torch, dtype) if dtype else None)
    return [file for path in targets for file in [path, *sorted(path.rglob("*"))] if file.is_file()], facts
