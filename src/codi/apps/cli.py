"""The command `codi`: its sub-commands and exit codes. 0 done, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import UserError, one_line
from . import (
    benchmark,
    cache,
    canny,
    data,
    demo,
    depth,
    edit,
    evaluate,
    export,
    generate,
    inpaint,
    models,
    train,
    upscale,
)
from .common import BadUsage, is_first_process, print_error, quiet_libraries, silence_other_processes

INTERRUPTED = 130

app = typer.Typer(
    name="codi",
    help="Image-conditioned latent diffusion in 1 to 4 steps: use it, train it, measure it.",
    epilog="Example: codi upscale photo.jpg -o photo-x4.png",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(show: bool) -> None:
    if show:
        print(f"codi {__version__}")
        raise typer.Exit


@app.callback()
def _codi(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("upscale", epilog=upscale.EXAMPLE)(upscale.upscale)
app.command("inpaint", epilog=inpaint.EXAMPLE)(inpaint.inpaint)
app.command("depth", epilog=depth.EXAMPLE)(depth.depth)
app.command("canny", epilog=canny.EXAMPLE)(canny.canny)
app.command("edit", epilog=edit.EXAMPLE)(edit.edit)
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("distill", epilog=train.DISTILL_EXAMPLE, context_settings=train.FREE_KEYS)(train.distill)
app.command("pretrain", epilog=train.PRETRAIN_EXAMPLE, context_settings=train.FREE_KEYS)(train.pretrain)
app.command("distill-decoder", epilog=train.DECODER_EXAMPLE, context_settings=train.FREE_KEYS)(train.distill_decoder)
app.command("evaluate", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("benchmark", epilog=benchmark.EXAMPLE)(benchmark.benchmark)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("models", epilog=models.EXAMPLE)(models.models)
data.app.command("cache", epilog=cache.EXAMPLE, context_settings=train.FREE_KEYS)(cache.cache)
app.add_typer(data.app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Every failure is one line on stderr; a failure that all processes
    of a launcher share is printed once per machine."""
    try:
        with quiet_libraries(), silence_other_processes():
            code = app(None if arguments is None else list(arguments), prog_name="codi", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UserError as error:
        if error.alone or is_first_process(machine=True):
            print_error(error)
        return 2 if isinstance(error, BadUsage) else 1
    except Exception as error:
        return _report_unexpected(error)
    if code == INTERRUPTED and is_first_process(machine=True):
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def _report_unexpected(error: Exception) -> int:
    if hasattr(error, "format_message"):  # an error of the command line's parser, whose classes typer does not export
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "codi"
        if message := error.format_message():  # type: ignore[attr-defined]
            print_error(f"{message} (see {command} --help)")
        return getattr(error, "exit_code", 2)
    if os.environ.get("CODI_DEBUG"):
        traceback.print_exception(error)
    text = one_line(error, 300)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        print_error("not enough memory: use a smaller --batch or --tile, or smaller pictures")
    elif isinstance(error, OSError) and error.strerror:
        print_error(
            f"{error.filename or 'a file'}: {error.strerror}: check its name, its permissions and the space left"
        )
    else:
        print_error(f"{type(error).__name__}: {text} (unexpected: run with CODI_DEBUG=1 for the traceback)")
    return 1


if __name__ == "__main__":
    sys.exit(main())
