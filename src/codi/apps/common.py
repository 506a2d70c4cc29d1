"""What the commands share: their options, their manners on the terminal, and loading a model.

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
        metavar="FILE[=WEIGHT]", help="Low-rank updates to add to the model; several times.", rich_help_panel=_MODEL
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|ID",
        help="Of a --model that is one .safetensors file: a diffusers model of its kind, for configs and tokenizers.",
        rich_help_panel=_MODEL,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="full, tiny (faster) or an AutoencoderTiny folder; by default as the model was saved, else full.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.", rich_help_panel=_MODEL)]
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
    bool, typer.Option("--channels-last", help="Weights laid out for convolutions.", rich_help_panel=_MODEL)
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
    int, typer.Option(min=1, max=1000, help="Sampling steps; adapters are made for 1 to 4.", rich_help_panel=_SAMPLING)
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="How closely to follow the prompt; 1: no guidance.", rich_help_panel=_SAMPLING),
]
Strength = Annotated[float, typer.Option(min=0, help="The adapter's influence; 0 is none.", rich_help_panel=_SAMPLING)]
Prompt = Annotated[str, typer.Option(help="What the picture shows.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.", rich_help_panel=_SAMPLING)]
Count = Annotated[
    int, typer.Option(min=1, help="Variants of each picture, of seeds SEED, SEED + 1, ...", rich_help_panel=_SAMPLING)
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures or tiles at a time.", rich_help_panel=_SAMPLING)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.", rich_help_panel=_OUTPUT)]
Json = Annotated[
    bool, typer.Option("--json", help="Machine output, and only that, on stdout.", rich_help_panel=_OUTPUT)
]
Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="Stop after so long, with a checkpoint.", rich_help_panel=_OUTPUT)
]


class BadUsage(UserError):
    """A command line that could not work whatever the files hold: exit code 2 instead of 1."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Within it, a UserError is the command line's fault."""
    try:
        yield
    except UserError as error:
        raise BadUsage(str(error)) from error


def check_seed(seed: int, most: int) -> None:
    """Raises BadUsage for a seed above `most`."""
    if seed > most:
        raise BadUsage(f"--seed {seed}: too large: use at most {most}")


def leads(machine: bool = False) -> bool:
    """Whether this is the first of the processes that a launcher started (of this `machine`), or the only one."""
    return os.environ.get("LOCAL_RANK" if machine else "RANK", "0") == "0"


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of the processes that a launcher started, only the first has a stdout."""
    if leads():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def say_error(error: object) -> None:
    """The one line of an error, on stderr."""
    print(f"error: {one_line(error, UserError.MOST)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Machine output on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    print(text.encode(errors="backslashreplace").decode())  # names of files may be no text


def watched() -> bool:
    """Whether somebody looks at stderr: progress is shown to people only."""
    return leads() and sys.stderr.isatty()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps torch, diffusers, transformers and the hub's client from talking past the user; our own warnings become one
    line each."""
    if os.environ.get("CODI_DEBUG"):
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as this
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"codi\.")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr, for the seconds that loading takes."""
    if not watched():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Progress]:
    """A progress bar with the time left on stderr; draws nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not watched()) as bar:
        yield bar


def hide_loading_bars() -> None:
    """Turns off the bars that diffusers and transformers draw, terminal or not, for every model that they open."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def parse_steps(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4). Raises BadUsage for anything but whole numbers from 1 to 1000."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise BadUsage(f"--steps {text}: not step counts: write whole numbers from 1 to 1000, such as 1,2,4")
    return tuple(dict.fromkeys(int(word) for word in words))


def choose_device(device: str) -> str:
    """auto, cpu or cuda -> cpu or cuda. Raises UserError for cuda where there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here: use --device cpu")
    return device


def parse_loras(words: list[str] | None) -> dict[str, float]:
    """["style.safetensors=0.8", "other"] -> files and their weights, 1 by default. Raises BadUsage for a weight that is
    no number."""
    loras: dict[str, float] = {}
    for word in words or []:
        name, _, weight = word.rpartition("=")
        try:
            loras[name or weight] = float(weight) if name else 1.0
        except ValueError as error:
            raise BadUsage(f"--lora {word}: {weight!r} is no weight: write FILE=0.8") from error
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
    """The pipeline of a model, adapter and decoder, on its device. Raises UserError as CoDiPipeline does."""
    with working(f"loading {model}"):
        import torch

        from ..sampling.pipeline import CoDiPipeline

        hide_loading_bars()
        where = choose_device(device)
        kind = getattr(torch, dtype)
        hub: Any = {"config": config} if config else {}
        pipe = CoDiPipeline.from_pretrained(
            model, task=task, adapter=adapter, dtype=kind, loras=loras, decoder=decoder, **hub
        )
        pipe.to(where, memory_format=torch.channels_last if channels_last else None).fuse_lora()
        if compiled:
            pipe.compile()
    pipe.set_progress_bar_config(disable=not watched(), leave=False, delay=1)
    return pipe
