"""What the commands that make pictures share: their options, batches, writing, rows of figures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .. import __version__
from ..errors import UserError
from .common import (
    Adapter,
    BadUsage,
    Batch,
    ChannelsLast,
    Compile,
    Config,
    Count,
    Decoder,
    Device,
    DType,
    Guidance,
    Json,
    Lora,
    ModelOrDefault,
    Overwrite,
    Seed,
    Steps,
    Strength,
    VaeTiling,
    check_seed,
    load_pipeline,
    parse_loras,
    print_error,
    print_json,
)
from .planning import Job

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.images import Picture
    from ..sampling.pipeline import CoDiPipeline

Out = Annotated[  # a string: a Path would lose the slash that a folder's name may end in
    str,
    typer.Option("--out", "-o", metavar="PATH", help="The file to write, or a folder/ for it.", show_default=False),
]
ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.", show_default=False)]


@dataclass(frozen=True)
class Settings:
    """The options that every command which makes pictures has; `shared` adds them to one."""

    model: ModelOrDefault = None
    adapter: Adapter = None
    lora: Lora = None
    config: Config = None
    decoder: Decoder = None
    steps: Steps = 4
    guidance: Guidance = None
    strength: Strength = 1.0
    seed: Seed = 0
    count: Count = 1
    batch: Batch = 4
    device: Device = "auto"
    dtype: DType = "float32"
    channels_last: ChannelsLast = False
    vae_tiling: VaeTiling = False
    compile: Compile = False
    overwrite: Overwrite = False
    json_: Json = False

    def __post_init__(self) -> None:
        check_seed(self.seed, 2**63 - 1 - self.count)

    def model_for(self, task: str) -> str:
        """The model that is named, else the task's default."""
        if self.model is not None:
            return self.model
        from ..models.adapter_files import default_model

        return default_model(self.adapter or task)


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of Settings as its own, which it gets packed in its parameter `settings`."""
    own, options = (get_type_hints(c, include_extras=True) for c in (command, Settings))
    parameters = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=own[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.name != "settings"
    ] + [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=options[f.name])
        for f in fields(Settings)
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        command(settings=Settings(**{f.name: values.pop(f.name) for f in fields(Settings)}), **values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@dataclass(frozen=True)
class Item:
    """One picture to make: its own arguments for the pipeline, tensors without a batch, and what the file is like."""

    target: Path
    seed: int
    given: dict[str, Tensor]
    source: str | None = None
    like: Picture | None = None  # whose grey and 16 bits are kept; None: colour of 8 bits
    alpha: Tensor | None = None  # (1, h, w)
    alone: bool = False  # too large to share a batch


@dataclass(frozen=True)
class Order:
    """What all pictures of one command share: the pipeline's further arguments, notes for the files' metadata, and
    `fit`, which brings a result (C, H, W) to the size of its file; `rows`, for an item that is made and written row by
    row what gives rows a to b of its alpha, (1, b - a, W) or None."""

    task: str
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    fit: Callable[[Tensor, Item], Tensor] = lambda image, item: image
    rows: Callable[[Item], Callable[[int, int], Tensor | None] | None] = lambda item: None


def open_pipeline(task: str, settings: Settings) -> CoDiPipeline:
    """The pipeline that the options name. Raises BadUsage for steps that it cannot take."""
    s = settings
    pipe = load_pipeline(
        s.model_for(task),
        task,
        s.adapter,
        s.device,
        s.dtype,
        parse_loras(s.lora),
        s.decoder,
        s.channels_last,
        s.compile,
        s.config,
    )
    if s.vae_tiling:
        for vae in filter(None, (pipe.vae, pipe.tiny_vae)):
            vae.enable_tiling()
    horizon = int(pipe.schedule.horizon)
    if settings.steps > horizon:
        raise BadUsage(f"--steps {settings.steps}: the model has {horizon}: use fewer")
    return pipe


def variants(job: Job, settings: Settings, given: dict[str, Tensor], **kept: Any) -> Iterator[Item]:
    """The items of one job, of seeds settings.seed, + 1, ...; `kept` are further fields of Item."""
    source = None if job.source is None else str(job.source)
    for number, target in enumerate(job.targets):
        yield Item(target, settings.seed + number, given, source, **kept)


def deliver(pipe: CoDiPipeline, items: Iterable[Item | UserError], order: Order, settings: Settings) -> None:
    """`make`s, and prints a line a picture or, in the end, JSON rows; exits with 1 in the end if anything failed."""
    faults = []

    def report(error: UserError) -> None:
        faults.append(error)
        print_error(error)

    rows = []
    for row in make(pipe, items, order, settings, report):
        rows.append(row)
        if not settings.json_:
            arrow = f"{row['input']} -> " if row["input"] else ""
            told = f"{row['width']} x {row['height']} px, {row['seconds']:.2f} s, by {_public(row['model'])}"
            print(f"{arrow}{row['output']}  {told}")
    if settings.json_:
        print_json(rows)
    if faults:
        raise typer.Exit(1)


def make(
    pipe: CoDiPipeline,
    items: Iterable[Item | UserError],
    order: Order,
    settings: Settings,
    report: Callable[[UserError], None],
) -> Iterator[dict[str, Any]]:
    """Makes and writes; yields a row for each picture written. What is wrong with one, or stands in its place among the
    items, goes to `report`, and the others follow. A picture depends on its seed, not on what else is in the run."""
    from ..data.writing import write_image, write_png_bands

    scales, model = _scales(pipe, order, settings), settings.model_for(order.task)
    arguments = {**order.arguments, "guidance_scale": scales["text"], "image_guidance_scale": scales.get("image")}
    notes = {
        "Software": f"codi {__version__}",
        "codi model": _public(model),
        **{f"codi lora {i}": _public(word) for i, word in enumerate(settings.lora or [])},
        "codi adapter": _public(settings.adapter or order.task),
        **({"codi decoder": _public(settings.decoder or "tiny")} if pipe.tiny_vae is not None else {}),
        "codi task": order.task,
        "codi steps": str(settings.steps),
        "codi guidance": f"{scales['text']:g}",
        **({"codi image guidance": f"{scales['image']:g}"} if "image" in scales else {}),
        **({"codi strength": f"{settings.strength:g}"} if settings.strength != 1 else {}),
        **{f"codi {name}": value for name, value in order.notes.items()},
    }
    bar: dict[str, Any] = getattr(pipe, "_progress_bar_config", {})
    for group in _groups(items, settings.batch, report):
        began = time.perf_counter()
        pipe.set_progress_bar_config(**{**bar, "desc": group[0].target.name})
        rows = order.rows(group[0])
        try:
            made: Any = pipe(
                **{name: _stacked([item.given[name] for item in group]) for name in group[0].given},
                steps=settings.steps,
                strength=settings.strength,
                seed=[item.seed for item in group],
                batch_size=settings.batch,
                output_type="bands" if rows else "pt",
                **arguments,
            ).images  # type: ignore[union-attr]
        except UserError as error:
            report(UserError(f"{group[0].source}: {error}") if group[0].source else error)
            continue
        seconds = (time.perf_counter() - began) / len(group)
        for item, one in zip(group, made, strict=True):
            kept: dict[str, Any] = {
                "metadata": {**notes, "codi seed": str(item.seed)},
                "bits": item.like.bits if item.like else 8,
                "grey": item.like is not None and item.like.grey,
                "overwrite": settings.overwrite,
                "exif": item.like.exif if item.like else None,
                "icc": item.like.icc if item.like else None,
            }
            try:
                if rows:
                    height, width = (pipe.task.scale * side for side in item.given["image"].shape[-2:])  # type: ignore[union-attr]
                    write_png_bands(item.target, _with_alpha(one, rows), height, width, **kept)
                    seconds = time.perf_counter() - began
                else:
                    rgb = order.fit(one, item)
                    height, width = rgb.shape[-2:]
                    write_image(item.target, rgb, None if item.alpha is None else order.fit(item.alpha, item), **kept)
            except UserError as error:
                report(error)
                continue
            yield {
                "input": item.source,
                "output": str(item.target),
                "width": width,
                "height": height,
                "seconds": round(seconds, 4),
                "seed": item.seed,
                "steps": settings.steps,
                "model": model,
                "adapter": settings.adapter or order.task,
            }


def _stacked(tensors: list[Tensor]) -> Tensor:
    """(n, ...); a single one, which may be large, is not copied."""
    import torch

    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _with_alpha(
    bands: Iterator[Tensor], alpha: Callable[[int, int], Tensor | None]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    done = 0
    for band in bands:
        first, done = done, done + band.shape[2]
        yield band, alpha(first, done)
        _give_back_memory()


def _give_back_memory() -> None:
    """To the system what glibc keeps of freed tensors in pieces: over thousands of tiles it would add up."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems' libraries
        ctypes.CDLL(None).malloc_trim(0)


def _scales(pipe: CoDiPipeline, order: Order, settings: Settings) -> dict[str, float]:
    """Guidance by name, as the pipeline will take it. Raises BadUsage, in the options' own names, where it cannot."""
    asked = order.arguments.get("image_guidance_scale")
    try:
        return pipe.guidance(settings.guidance, asked, settings.strength).scales
    except UserError as error:
        told = str(error).replace("image_guidance_scale", "--image-guidance").replace("guidance_scale", "--guidance")
        told = f"--{told}" if told.startswith("strength") else told
        raise BadUsage(told) from error


def _public(name: str) -> str:
    """A model's name for a picture that may be passed on: of a path its last part, not where the user keeps it."""
    path = Path(name)
    return path.name if path.exists() else name


def _groups(items: Iterable[Item | UserError], most: int, report: Callable[[UserError], None]) -> Iterator[list[Item]]:
    """In batches of one size."""
    group: list[Item] = []
    for item in items:
        if isinstance(item, UserError):
            report(item)
            continue
        shapes = [{name: tensor.shape for name, tensor in one.given.items()} for one in (item, *group[:1])]
        if group and (len(group) >= most or item.alone or group[0].alone or shapes[0] != shapes[1]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
