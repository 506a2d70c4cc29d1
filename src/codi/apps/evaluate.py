"""`codi evaluate`: measure adapters, the fine-tuned many-step reference and bicubic on the same pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .common import (
    BadUsage,
    Batch,
    Decoder,
    Device,
    DType,
    Guidance,
    Json,
    ModelOrDefault,
    Overwrite,
    Seed,
    check_seed,
    load_pipeline,
    parse_steps,
    print_json,
    progress,
    spinner,
    usage_errors,
)

if TYPE_CHECKING:
    from ..evaluation.evaluate import Method
    from ..sampling.pipeline import CoDiPipeline

EXAMPLE = "Example: codi evaluate --task upscale --data scenes:held-out:100 --steps 1,2,4 --json"
HELD_OUT = "scenes:held-out:500"
MAX_SEED = 2**46  # samples' seeds are about 100,000 times as large, and have at most 63 bits
WIDTH = 120  # of the table in characters, where stdout is no terminal
MANY_STEPS = (1, 2, 4, 50)  # of the fine-tuned reference: few steps, and the many that it needs


def evaluate(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe: its adapter, model, task, size and held-out data.", show_default=False),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task; by default the recipe's.")] = None,
    model: ModelOrDefault = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An embedded adapter's name or a folder. May be repeated.")
    ] = None,
    finetuned: Annotated[
        str | None,
        typer.Option(help="The fine-tuned reference, run at 1, 2, 4 and 50 steps: a name, a folder or none."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Held-out pictures: a folder, tars or scenes:SPLIT:COUNT; by default {HELD_OUT}."),
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Maximum number of pictures.")] = None,
    steps: Annotated[str, typer.Option(help="Step counts of the adapters.")] = "1,2,4",
    degradation: Annotated[str | None, typer.Option(help="Degradation of upscaling's inputs: real or bicubic.")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the pictures in pixels.")] = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    batch: Batch = 16,
    decoder: Decoder = None,
    device: Device = "auto",
    dtype: DType = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file too (.json).")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the first pictures, side by side (.png).")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Measure adapters over steps: PSNR, SSIM, ENLite0 distance, FD-ENLite0, obedience, latency."""
    counts = parse_steps(steps)
    check_seed(seed, MAX_SEED)
    adapters = list(adapter or [])
    options: dict[str, Any] = {}
    loras: dict[str, float] = {}
    with spinner("starting"):
        from ..data.sources import open_source
        from ..data.writing import check_writable
        from ..evaluation import contact_sheet, pipeline_method, rich_table, write_json
        from ..evaluation import evaluate as measure
        from ..models.adapter_files import default_model
        from ..tasks import get_task

        if recipe is not None:
            recipe_values = _recipe(recipe)
            task, model, options = recipe_values.task, model or recipe_values.model, dict(recipe_values.task_options)
            data, size = data or recipe_values.held_out, size or recipe_values.size
            degradation = degradation or recipe_values.degradation
            adapters, loras = adapters or [recipe_values.out], recipe_values.loras
        if task is None:
            raise BadUsage("give a recipe or --task: codi evaluate --task upscale")
        adapters = adapters or [task]
        models = {model or default_model(name) for name in adapters}
        if len(models) > 1:
            raise BadUsage(f"--adapter {', '.join(adapters)}: of different models: name one with --model")
        model = models.pop()
        with usage_errors():
            get_task(task, **options)
            if degradation is not None:
                get_task(task, degradation=degradation)
        for path, suffix in ((out, ".json"), (sheet, ".png")):
            if path is not None:
                check_writable(path, overwrite, extensions=(suffix,))

    methods: list[Method] = []
    reference = None
    for name in adapters:
        pipe = load_pipeline(model, task, name, device, dtype, loras, decoder)
        reference = reference or pipe
        methods.append(pipeline_method(pipe, counts, _name(pipe, name, methods), guidance))
    assert reference is not None
    if (name := _reference(task, finetuned, reference, model)) is not None:
        pipe = load_pipeline(model, task, name, device, dtype, loras, decoder)
        methods.append(pipeline_method(pipe, MANY_STEPS, _name(pipe, name, methods), guidance))
    assert reference.task is not None
    for method in methods:
        if max(method.steps) > reference.schedule.horizon:
            raise BadUsage(
                f"--steps {max(method.steps)}: the model has {int(reference.schedule.horizon)} noise levels: use fewer"
            )

    if degradation is not None:
        options["degradation"] = degradation
    measured = get_task(task, **{**reference.task.config(), **options}).measured()
    with spinner("opening the pictures"):
        source = open_source(data or HELD_OUT, measured.columns)  # the adapter's options may need more columns
    with progress("pictures") as bar:
        line = bar.add_task("measuring", total=None)
        results = measure(
            methods,
            measured,
            source,
            count or len(source),
            seed=seed,
            batch=batch,
            size=size or _info(reference).get("recipe", {}).get("size") or 64,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
            command=" ".join(["codi", *sys.argv[1:]]),
        )
    if out is not None:
        write_json(results, out)
    if sheet is not None:
        _write_sheet(contact_sheet(results.pictures), sheet, overwrite)
    if json_:
        print_json(results.to_json())
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else WIDTH
        Console(width=width, emoji=False, markup=False).print(rich_table(results))  # names must not be read as markup


def _recipe(name: str) -> Any:
    from ..training.distill import DistillRecipe
    from ..training.recipe import build
    from .train import read_values

    return build(DistillRecipe, read_values(DistillRecipe, name), name)


def _reference(task: str, finetuned: str | None, pipe: CoDiPipeline, model: str) -> str | None:
    """Return the fine-tuned adapter to compare with: `finetuned`, else the model's own if it fits the backbone."""
    from ..models.adapter_files import find_adapter

    if finetuned is not None:
        return None if finetuned == "none" else finetuned
    name = f"{task}-finetuned"
    config = find_adapter(name, model) / "config.json"
    if not config.is_file():
        return None
    fits = json.loads(config.read_text())["info"]["family"] == pipe.kind.fingerprint(
        pipe.network, pipe.vae, pipe.scheduler
    )
    return name if fits else None


def _info(pipe: CoDiPipeline) -> dict[str, Any]:
    return (pipe.adapter.config["info"] if pipe.adapter is not None else None) or {}


def _name(pipe: CoDiPipeline, adapter: str, previous: list[Method]) -> str:
    """Return an adapter's name in the table: its objective, with its folder where that name is taken."""
    from ..objectives import OBJECTIVES
    from ..training.recipe import current_names

    info = _info(pipe)
    folder = Path(adapter).name or adapter
    objective = OBJECTIVES.get(current_names(info["recipe"])["objective"]) if info.get("recipe") else None
    label = objective.label if objective else ""
    form = "" if info.get("full", True) else "pe-"
    name = f"{form}{label}" if label else folder
    taken = {method.name for method in previous}
    if name in taken:
        name = f"{name} ({folder})"
    if name in taken:
        raise UserError(f"{adapter}: measured already under the name {name}: name each adapter once")
    return name


def _write_sheet(image: Any, path: Path, overwrite: bool) -> None:
    import numpy as np
    import torch

    from ..data.writing import write_png

    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
    write_png(path, pixels, overwrite=overwrite)
