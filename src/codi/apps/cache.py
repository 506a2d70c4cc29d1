"""`codi data cache`: latents and text features of a training's data, computed once."""

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
    variants: Annotated[int, typer.Option(min=1, help="Crops of each picture.")] = 1,
    exact: Annotated[bool, typer.Option("--exact", help="Keep float32: twice the space.")] = False,
    json_: Json = False,
) -> None:
    """Compute what a distillation would compute of its data each time: latents and text features.

    The same command again goes on where it was cut off. `codi distill` takes the folder as `--cache`.
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
        told = make_cache(
            recipe, out, variants, exact, progress=lambda done, total: bar.update(line, completed=done, total=total)
        )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if json_:
        return print_json({"out": str(out), "bytes": size, **told})
    unread = f", {told['unread']:,} could not be read" if told["unread"] else ""
    print(f"{out}: {told['samples']:,} samples of {told['size']} px, {size / 1e9:.2f} GB{unread}")
