"""Code that the commands share: options, terminal output and loading a model.

Nothing here or in a command's module imports torch before a command runs, so that `codi --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError, one_line

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..sampling.pipeline import CoDiPipeline

_MODEL, _SAMPLING, _OUTPUT = "Model", "Sampling", "Output"

Model = Annotated[
    str,
    typer.Option(
        help="mini, photo, a diffusers folder, a .safetensors file or a hub id\\[@revision].", rich_help_panel=_MODEL
    ),
]
ModelOrDefault = Annotated[
    str | None,
    typer.Option(
        help="mini, photo, a diffusers folder, a .safetensors file or a hub id\\[@revision]; by default photo for "
        "upscale, mini for other tasks and its own adapters.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="An embedded adapter's name or a folder; by default the task's own.", rich_help_panel=_MODEL),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[=WEIGHT]", help="Low-rank updates to add to the model; may be repeated.", rich_help_panel=_MODEL
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|ID",
        help="For a --model that is one .safetensors file: a diffusers model of that kind, for configs and tokenizers.",
        rich_help_panel=_MODEL,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="full, tiny (faster) or an AutoencoderTiny folder; by default the one saved with the model, else full.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.", rich_help_panel=_MODEL)]
DType = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="Precision of the model.", rich_help_panel=_MODEL)
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="torch.compile the networks: a slow start, then faster on a GPU.", rich_help_panel=_MODEL
    ),
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="Lay out the weights for fast convolutions.", rich_help_panel=_MODEL)
]
VaeTiling = Annotated[
    bool,
    typer.Option(
        "--vae-tiling",
        help="Encode and decode in tiles of the VAE's size: less memory for large pictures.",
        rich_help_panel=_MODEL,
    ),
]
Steps = Annotated[
    int,
    typer.Option(min=1, max=1000, help="Sampling steps; adapters are trained for 1 to 4.", rich_help_panel=_SAMPLING),
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="How closely to follow the prompt; 1: no guidance.", rich_help_panel=_SAMPLING),
]
Strength = Annotated[float, typer.Option(min=0, help="The adapter's influence; 0 is none.", rich_help_panel=_SAMPLING)]
Prompt = Annotated[str, typer.Option(help="Description of the picture.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.", rich_help_panel=_SAMPLING)]
Count = Annotated[
    int, typer.Option(min=1, help="Variants of each picture, with seeds SEED, SEED + 1, ...", rich_help_panel=_SAMPLING)
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures or tiles per batch.", rich_help_panel=_SAMPLING)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=_OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.", rich_help_panel=_OUTPUT)]
Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="Stop after this time, with a checkpoint.", rich_help_panel=_OUTPUT)
]


class BadUsage(UserError):
    """A command line that is wrong in itself, independent of any file: exit code 2 instead of 1."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a UserError raised in the context into BadUsage."""
    try:
        yield
    except UserError as error:
        raise BadUsage(str(error)) from error


def check_seed(seed: int, most: int) -> None:
    """Raise BadUsage for a seed above `most`."""
    if seed > most:
        raise BadUsage(f"--seed {seed}: too large: use at most {most}")


def is_first_process(machine: bool = False) -> bool:
    """Return True on a launcher's first process (`machine`: its first on this machine), and without a launcher."""
    return os.environ.get("LOCAL_RANK" if machine else "RANK", "0") == "0"


@contextlib.contextmanager
def silence_other_processes() -> Iterator[None]:
    """Discard stdout on all of a launcher's processes but the first."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield


def print_error(error: object) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {one_line(error, UserError.MAX_LENGTH)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print JSON on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    print(text.encode(errors="backslashreplace").decode())  # file names may be invalid Unicode


def shows_progress() -> bool:
    """Return True where progress should be shown: on the first process, if stderr is a terminal."""
    return is_first_process() and sys.stderr.isatty()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence torch, diffusers, transformers and the hub's client; print codi's own warnings as one line each. Does
    nothing where CODI_DEBUG is set."""
    if os.environ.get("CODI_DEBUG"):
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read on import
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read on import too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"codi\.")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner with `text` on stderr, if that is a terminal."""
    if not shows_progress():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{text} ..."):
        yield


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Progress]:
    """Show a progress bar with the time left on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shows_progress()
    ) as bar:
        yield bar


def hide_loading_bars() -> None:
    """Turn off the bars that diffusers and transformers draw while loading, which appear without a terminal too."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def parse_steps(text: str) -> tuple[int, ...]:
    """Parse "1,2,4" to (1, 2, 4), without repetitions. Raises BadUsage for other than whole numbers from 1 to 1000."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise BadUsage(f"--steps {text}: not step counts: write whole numbers from 1 to 1000, such as 1,2,4")
    return tuple(dict.fromkeys(int(word) for word in words))


def choose_device(device: str) -> str:
    """Return cpu or cuda for auto, cpu or cuda. Raises UserError for cuda on a machine without it."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here: use --device cpu")
    return device


def parse_loras(words: list[str] | None) -> dict[str, float]:
    """Parse ["style.safetensors=0.8", "other"] to {file: weight}, weight 1 by default. Raises BadUsage for a weight
    that is not a number."""
    loras: dict[str, float] = {}
    for word in words or []:
        name, _, weight = word.rpartition("=")
        try:
            loras[name or weight] = float(weight) if name else 1.0
        except ValueError as error:
            raise BadUsage(f"--lora {word}: {weight!r} is not a number: write FILE=0.8") from error
    return loras


def load_pipeline(
    model: str,
    task: str,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    loras: Mapping[str, float] | None = None,
    decoder: str | None = None,
    channels_last: bool = False,
    compiled: bool = False,
    config: str | None = None,
) -> CoDiPipeline:
    """Load the pipeline of a model, adapter and decoder onto its device. Raises UserError as CoDiPipeline does."""
    with spinner(f"loading {model}"):
        import torch

        from ..sampling.pipeline import CoDiPipeline

        hide_loading_bars()
        place = choose_device(device)
        precision = getattr(torch, dtype)
        options: Any = {"config": config} if config else {}
        pipe = CoDiPipeline.from_pretrained(
            model, task=task, adapter=adapter, dtype=precision, loras=loras, decoder=decoder, **options
        )
        pipe.to(place, memory_format=torch.channels_last if channels_last else None).fuse_lora()
        if compiled:
            pipe.compile()
    pipe.set_progress_bar_config(disable=not shows_progress(), leave=False, delay=1)
    return pipe
