"""`codi data cache`: compute the latents and text features of a training's data once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, hide_loading_bars, print_json, progress, spinner, usage_errors
from .train import Words, read

EXAMPLE = (
    "Example: codi data cache sd15-pe --data pictures -o cached && codi distill sd15-pe --data pictures --cache cached"
)


def cache(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    words: Words = None,
    variants: Annotated[int, typer.Option(min=1, help="Crops per picture.")] = 1,
    exact: Annotated[bool, typer.Option("--exact", help="Keep float32: twice the space.")] = False,
    json_: Json = False,
) -> None:
    """Compute the latents and text features that a distillation would otherwise compute at each step.

    The same command again resumes an interrupted run. `codi distill` takes the folder as `--cache`.
    """
    with spinner("starting"):
        from ..training.cache import make_cache
        from ..training.distill_recipe import DistillRecipe

    recipe = read(DistillRecipe, [*(words or []), "--out", str(out)])
    with usage_errors():
        recipe.validate()
    hide_loading_bars()
    with progress("samples") as bar:
        line = bar.add_task("encoding", total=None)
        result = make_cache(
            recipe, out, variants, exact, progress=lambda done, total: bar.update(line, completed=done, total=total)
        )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if json_:
        return print_json({"out": str(out), "bytes": size, **result})
    unread = f", {result['unread']:,} could not be read" if result["unread"] else ""
    print(f"{out}: {result['samples']:,} samples of {result['size']} px, {size / 1e9:.2f} GB{unread}")
