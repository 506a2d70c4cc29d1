"""The training commands: each runs a recipe with changes to its keys; the same command again resumes the run."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .common import BadUsage, Json, Minutes, hide_loading_bars, print_json, shows_progress, spinner, usage_errors

DISTILL_EXAMPLE = "Example: codi distill smoke --out runs/mine --data photos --images 20000"
PRETRAIN_EXAMPLE = "Example: codi pretrain mini --out runs/mini --ldm-images 500000"
DECODER_EXAMPLE = "Example: codi distill-decoder sd-decoder --model path/to/model --data photos --out runs/decoder"
FREE_KEYS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

INTERRUPTED = 130

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [--key value]...",
        help="A YAML file or a shipped recipe's name, then changes to its keys.",
        show_default=False,
    ),
]
Keys = Annotated[bool, typer.Option("--keys", help="Show every key, its default and meaning, and exit.")]


def distill(
    words: Words = None,
    minutes: Minutes = None,
    keys: Keys = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameter counts, memory, updates and data; load no weights."),
    ] = False,
    json_: Json = False,
) -> None:
    """Adapt and distil a model in one stage. The same command again resumes."""
    with spinner("starting"):
        from ..tasks import get_task
        from ..training.distill import DistillRecipe
        from ..training.distill import distill as run

    if keys:
        return _show_keys(DistillRecipe)
    recipe = read(DistillRecipe, words)
    with usage_errors():
        recipe.validate()
        get_task(recipe.task)
    hide_loading_bars()
    if dry_run:
        return _show_dry_run(recipe, json_)
    out = _run(run, recipe, minutes)
    images = _trained_images(out / "checkpoints")
    _report(out, images, recipe.images, minutes, json_, _metrics(out))


def pretrain(words: Words = None, minutes: Minutes = None, keys: Keys = False, json_: Json = False) -> None:
    """Train your own backbone: the VAE, then text-to-image diffusion. The same command again resumes."""
    with spinner("starting"):
        from ..training.pretrain import PretrainRecipe
        from ..training.pretrain import pretrain as run

    if keys:
        return _show_keys(PretrainRecipe)
    recipe = read(PretrainRecipe, words)
    hide_loading_bars()
    out = _run(run, recipe, minutes)
    _report(out, _trained_images(out / "training" / "ldm" / "checkpoints"), recipe.ldm_images, minutes, json_, {})


def distill_decoder(words: Words = None, minutes: Minutes = None, keys: Keys = False, json_: Json = False) -> None:
    """Train a tiny, fast decoder for any model's VAE. The same command again resumes."""
    with spinner("starting"):
        from ..training.decoder import RECORD, DecoderRecipe
        from ..training.decoder import distill_decoder as run

    if keys:
        return _show_keys(DecoderRecipe)
    recipe = read(DecoderRecipe, words)
    with usage_errors():
        recipe.validate()
    hide_loading_bars()
    out = run(recipe, quiet=not shows_progress(), minutes=minutes)
    record = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    _report(out, _trained_images(out / "checkpoints"), recipe.images, minutes, json_, record.get("metrics", {}))


def _run(train: Callable[..., Path], recipe: Any, minutes: float | None) -> Path:
    """Train, then shut down the process group if a launcher started several processes."""
    from ..training import processes

    out = train(recipe, quiet=not shows_progress(), minutes=minutes)
    processes.shut_down()
    return out


def read(cls: Callable[..., Any], words: list[str] | None) -> Any:
    """Parse ["smoke", "--images", "64", ...] to a recipe. Raises BadUsage for a bad command line, else UserError."""
    from ..training.recipe import build, parse_overrides

    name, *changes = words or [""]
    if not name or name.startswith("-"):
        raise BadUsage("RECIPE: give its name first, then the changes: codi distill smoke --images 64")
    values = read_values(cls, name)
    with usage_errors():
        overrides = parse_overrides(changes)
        build(cls, {"out": "", **overrides}, "command line")  # type: ignore[arg-type]
    return build(cls, {**values, **overrides}, name)  # type: ignore[arg-type]


def read_values(cls: Callable[..., Any], name: str) -> dict[str, Any]:
    """Read a recipe's keys and values. Raises UserError for the recipe of another command than that of `cls`."""
    from ..training.decoder import DecoderRecipe
    from ..training.distill_recipe import DistillRecipe
    from ..training.pretrain_recipe import PretrainRecipe
    from ..training.recipe import read_recipe

    values = read_recipe(name)
    commands = {"distill": DistillRecipe, "pretrain": PretrainRecipe, "distill-decoder": DecoderRecipe}
    fitting = [command for command, kind in commands.items() if values.keys() <= {field.name for field in fields(kind)}]
    own = next(command for command, kind in commands.items() if kind is cls)
    if fitting and own not in fitting:
        raise UserError(f"{name}: not a recipe of codi {own}: run codi {fitting[0]} {name}")
    return values


def _trained_images(folder: Path) -> int:
    from ..training.checkpoint import complete, read_state

    checkpoints = complete(folder)
    return read_state(checkpoints[-1])[0].images if checkpoints else 0


def _metrics(out: Path) -> dict[str, float]:
    config = out / "config.json"
    return (json.loads(config.read_text()).get("info") or {}).get("metrics", {}) if config.is_file() else {}


def _report(out: Path, images: int, total: int, minutes: float | None, json_: bool, metrics: dict[str, float]) -> None:
    finished = images >= total
    if json_:
        print_json({"out": str(out), "images": images, "of": total, "finished": finished, "metrics": metrics})
    elif finished:
        summary = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{out}: finished after {images:,} images{f': {summary}' if summary else ''}")
    else:
        print(f"{out}: stopped after {images:,} of {total:,} images: the same command resumes")
    if not finished and minutes is None:  # Ctrl-C or SIGTERM, which the trainer turned into a checkpoint
        raise typer.Exit(INTERRUPTED)


def _show_dry_run(recipe: Any, json_: bool) -> None:
    with spinner("building the model without weights"):
        from ..training.dry_run import dry_run

        plan = dry_run(recipe)
    if json_:
        return print_json(plan)
    count, memory, data = plan["parameters"], plan["memory_gb"], plan["data"]
    print(f"model      {plan['model']} ({plan['family']})")
    print(f"parameters {count['trained'] / 1e6:,.1f}M trained, {count['frozen'] / 1e6:,.1f}M frozen")
    parts = ", ".join(f"{name} {memory[name]:.1f}" for name in ("weights", "training", "activations"))
    print(f"memory     about {memory['total']:.1f} GB: {parts}; allow a tenth more for workspaces")
    if plan["cache_saves_gb"]:
        print(f"cache      {plan['cache_saves_gb']:.1f} GB less, and less to compute, after `codi data cache`")
    print(f"updates    {plan['updates']:,} of {plan['images_an_update']} images, {plan['passes']:,.0f} network passes")
    print(f"data       {data['source']}: {data['pictures']:,} pictures, {data['epochs']:.1f} times over")


def _show_keys(cls: type) -> None:
    """Print the recipe's keys with their defaults and the strings that document them in its class."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, note in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(note, ast.Expr):
                notes[line.target.id] = str(ast.literal_eval(note.value))
    for field in fields(cls):
        default: Any = "(needed)" if field.default is MISSING else field.default
        if callable(field.default_factory):
            default = field.default_factory()
        print(f"--{field.name.replace('_', '-')} {default}")
        if field.name in notes:
            print(textwrap.indent(textwrap.fill(" ".join(notes[field.name].split()), 100), "    "))
