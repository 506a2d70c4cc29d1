"""Code that the picture commands share: options, batches, writing of files, rows of output."""

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

Out = Annotated[  # a string, because a Path would drop the final slash that marks a folder
    str,
    typer.Option("--out", "-o", metavar="PATH", help="The file to write, or a folder/ for it.", show_default=False),
]
ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.", show_default=False)]


@dataclass(frozen=True)
class Settings:
    """The options of every picture command; the decorator `shared` adds them."""

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
        """Return the model of --model, else the task's default."""
        if self.model is not None:
            return self.model
        from ..models.adapter_files import default_model

        return default_model(self.adapter or task)


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of Settings to `command`, which receives them as its parameter `settings`."""
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
    """One picture to make. `given`: its tensor arguments for the pipeline, without a batch axis."""

    target: Path
    seed: int
    given: dict[str, Tensor]
    source: str | None = None
    like: Picture | None = None  # its grey, 16 bits and metadata are kept; None: 8-bit colour
    alpha: Tensor | None = None  # (1, h, w)
    alone: bool = False  # too large to share a batch


@dataclass(frozen=True)
class Request:
    """Settings that all pictures of one command share. `arguments`: further arguments of the pipeline; `notes`: for the
    files' metadata; `fit`: resizes a result (C, H, W) to the size of its file; `rows`: for an item that is made and
    written row by row, returns a function that gives rows a to b of its alpha, (1, b - a, W) or None, else None."""

    task: str
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    fit: Callable[[Tensor, Item], Tensor] = lambda image, item: image
    rows: Callable[[Item], Callable[[int, int], Tensor | None] | None] = lambda item: None


def open_pipeline(task: str, settings: Settings) -> CoDiPipeline:
    """Load the pipeline that the options name. Raises BadUsage for more steps than the model has."""
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
        raise BadUsage(f"--steps {settings.steps}: the model has {horizon} noise levels: use fewer")
    return pipe


def variants(job: Job, settings: Settings, given: dict[str, Tensor], **item_fields: Any) -> Iterator[Item]:
    """Yield the items of one job, with seeds settings.seed, + 1, ...; `item_fields` are further fields of Item."""
    source = None if job.source is None else str(job.source)
    for number, target in enumerate(job.targets):
        yield Item(target, settings.seed + number, given, source, **item_fields)


def write_pictures(pipe: CoDiPipeline, items: Iterable[Item | UserError], request: Request, settings: Settings) -> None:
    """Make and write all pictures, printing a line for each or, at the end, JSON; then exit with 1 if any failed."""
    errors = []

    def report(error: UserError) -> None:
        errors.append(error)
        print_error(error)

    rows = []
    for row in make_pictures(pipe, items, request, settings, report):
        rows.append(row)
        if not settings.json_:
            arrow = f"{row['input']} -> " if row["input"] else ""
            summary = f"{row['width']} x {row['height']} px, {row['seconds']:.2f} s, by {_public(row['model'])}"
            print(f"{arrow}{row['output']}  {summary}")
    if settings.json_:
        print_json(rows)
    if errors:
        raise typer.Exit(1)


def make_pictures(
    pipe: CoDiPipeline,
    items: Iterable[Item | UserError],
    request: Request,
    settings: Settings,
    report: Callable[[UserError], None],
) -> Iterator[dict[str, Any]]:
    """Make and write the pictures; yield a row for each one written. An error of one picture, or in its place among the
    items, goes to `report`, and the others follow. A picture depends on its seed, not on the rest of its batch."""
    from ..data.writing import write_image, write_png_bands

    scales, model = _scales(pipe, request, settings), settings.model_for(request.task)
    arguments = {**request.arguments, "guidance_scale": scales["text"], "image_guidance_scale": scales.get("image")}
    notes = {
        "Software": f"codi {__version__}",
        "codi model": _public(model),
        **{f"codi lora {i}": _public(lora) for i, lora in enumerate(settings.lora or [])},
        "codi adapter": _public(settings.adapter or request.task),
        **({"codi decoder": _public(settings.decoder or "tiny")} if pipe.tiny_vae is not None else {}),
        "codi task": request.task,
        "codi steps": str(settings.steps),
        "codi guidance": f"{scales['text']:g}",
        **({"codi image guidance": f"{scales['image']:g}"} if "image" in scales else {}),
        **({"codi strength": f"{settings.strength:g}"} if settings.strength != 1 else {}),
        **{f"codi {name}": value for name, value in request.notes.items()},
    }
    bar: dict[str, Any] = getattr(pipe, "_progress_bar_config", {})
    for group in _batches(items, settings.batch, report):
        start = time.perf_counter()
        pipe.set_progress_bar_config(**{**bar, "desc": group[0].target.name})
        rows = request.rows(group[0])
        try:
            images: Any = pipe(
                **{name: _stack([item.given[name] for item in group]) for name in group[0].given},
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
        seconds = (time.perf_counter() - start) / len(group)
        for item, image in zip(group, images, strict=True):
            extra: dict[str, Any] = {
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
                    write_png_bands(item.target, _with_alpha(image, rows), height, width, **extra)
                    seconds = time.perf_counter() - start
                else:
                    rgb = request.fit(image, item)
                    height, width = rgb.shape[-2:]
                    write_image(
                        item.target, rgb, None if item.alpha is None else request.fit(item.alpha, item), **extra
                    )
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
                "adapter": settings.adapter or request.task,
            }


def _stack(tensors: list[Tensor]) -> Tensor:
    """Stack tensors to (n, ...); a single one, which may be large, is not copied."""
    import torch

    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _with_alpha(
    bands: Iterator[Tensor], alpha: Callable[[int, int], Tensor | None]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    end = 0
    for band in bands:
        start, end = end, end + band.shape[2]
        yield band, alpha(start, end)
        _release_memory()


def _release_memory() -> None:
    """Return to the system the freed memory that glibc holds, which grows over thousands of tiles."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # C libraries other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _scales(pipe: CoDiPipeline, request: Request, settings: Settings) -> dict[str, float]:
    """Return the guidance scales by name, as the pipeline applies them. Raises BadUsage, with the names of the command
    line's options, for scales that it refuses."""
    image_scale = request.arguments.get("image_guidance_scale")
    try:
        return pipe.guidance(settings.guidance, image_scale, settings.strength).scales
    except UserError as error:
        message = str(error).replace("image_guidance_scale", "--image-guidance").replace("guidance_scale", "--guidance")
        message = f"--{message}" if message.startswith("strength") else message
        raise BadUsage(message) from error


def _public(name: str) -> str:
    """Return a model's name for the metadata of files that may be shared: of a path the last part only."""
    path = Path(name)
    return path.name if path.exists() else name


def _batches(items: Iterable[Item | UserError], most: int, report: Callable[[UserError], None]) -> Iterator[list[Item]]:
    """Yield batches of items of one size, at most `most`; errors among the items go to `report`."""
    group: list[Item] = []
    for item in items:
        if isinstance(item, UserError):
            report(item)
            continue
        shapes = [{name: tensor.shape for name, tensor in member.given.items()} for member in (item, *group[:1])]
        if group and (len(group) >= most or item.alone or group[0].alone or shapes[0] != shapes[1]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
