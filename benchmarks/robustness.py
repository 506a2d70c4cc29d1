"""Test robustness: read damaged files of ten formats, and kill and resume trainings.

    python benchmarks/robustness.py --out benchmarks/results/robustness.json

Fuzz: a valid file of each format is damaged in many ways (seeded), then read by the code that the commands use. It must
be read or refused with a one-line UserError within --limit seconds; any other exception, or a hang, is a fault.
Kills: a tiny training is killed (SIGKILL) at --kills random times, and right after each of its renames; then the same
training is started again. Its final weights must equal those of an uninterrupted training bit for bit, and no partial
files may remain. The exit code is 1 if anything failed. The paragraph of docs/scale.md is written from the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command_line
from PIL import Image
from torch.utils import tensorboard  # noqa: F401 - imported once, before forks

from codi.data.images import read_image
from codi.data.sources import open_source
from codi.errors import UserError
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.report import write_json
from codi.models.adapter import FusedAdapter
from codi.models.adapter_files import load_adapter
from codi.models.backbones import load_backbone
from codi.tasks.depth import read_depth
from codi.training.checkpoint import CHECKPOINTS, complete, edit_json, read_state
from codi.training.distill import DistillRecipe, distill
from codi.training.recipe import build, read_recipe
from codi.training.saving import save_adapter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from tiny import tiny_checkpoint  # type: ignore[import-not-found]  # noqa: E402 - the tests' tiny model

DOCS, BEGIN, END = ROOT / "docs" / "scale.md", "<!-- robustness.py: begin -->\n", "<!-- robustness.py: end -->\n"
HOSTILE = (
    b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"9" * 40, b"9" * 5_000, b"a" * 5_000,
    b"\xff\xfe", b"\0", b"[" * 2_000, b'"\\ud800"', b"../../x", b"&a [*a, *a]", b"!!python/object/apply:os.system [id]",
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return data with one to four changes: bytes flipped, cut off, dropped, doubled or replaced by hostile values."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) + 1), rng.randint(1, 64)
        kind = rng.randrange(7)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.choice(HOSTILE)
        elif kind == 4:  # a word of text, at most 64 bytes
            end = next((i for i in range(at, len(out)) if out[i] in b" ,:}]\n"), at)
            out[at : min(end, at + 64)] = rng.choice(HOSTILE)
        else:
            head = (
                rng.randrange(min(len(out), 64)) if kind == 5 and out else at
            )  # half of the time in the header, where changes have most effect
            for i in range(head, min(len(out), head + rng.randint(1, 4))):
                out[i] = rng.randrange(256)
    return bytes(out)


# --- formats ---------------------------------------------------------------------------------------------------------

Case = tuple[bytes, Path, Callable[[], Any]]
"""A valid file's bytes, the path of its damaged copies, and the function that reads them."""


def picture(kind: str, **options: Any) -> bytes:
    """Return a small image in a format of Pillow."""
    pixels, buffer = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def cases(folder: Path) -> dict[str, list[Case]]:
    """Return cases by format, with files in `folder`."""
    cases_by_format: dict[str, list[Case]] = {}
    for suffix, kind, options in (("png", "PNG", {}), ("jpg", "JPEG", {}), ("webp", "WEBP", {"lossless": True}),
                                  ("tiff", "TIFF", {"compression": "tiff_lzw"})):  # fmt: skip
        path = folder / f"a.{suffix}"
        cases_by_format[suffix] = [(picture(kind, **options), path, lambda path=path: read_image(path))]
    array, buffer = np.linspace(1, 9, 12 * 16).reshape(12, 16), io.BytesIO()
    np.save(buffer, array)
    cases_by_format["npy"] = [(buffer.getvalue(), folder / "a.npy", lambda: read_depth(folder / "a.npy", "dark"))]
    cases_by_format |= model_cases(folder)
    cases_by_format |= data_cases(folder)
    recipe = "out: there\nmodel: mini\ntask: depth\nsize: 64\nlearning_rate: 1e-4\nguidance: {text: [1, 4]}\n"
    recipe += "train_backbone: false\nlora_rank: 4\nobjective_options:\n  dt: 20\nzoom: [1, 2]\n"

    def validate() -> None:
        build(DistillRecipe, read_recipe(folder / "a.yaml"), "a.yaml").validate()

    cases_by_format["yaml"] = [(recipe.encode(), folder / "a.yaml", validate)]
    return cases_by_format


def model_cases(folder: Path) -> dict[str, list[Case]]:
    """Return cases of an adapter, a model and a training's state. The adapter has no list of files, whose check would
    refuse all changes."""
    model, adapter = tiny_checkpoint(folder / "model"), folder / "adapter"
    backbone = load_backbone(model).freeze()
    new_adapter: Any = FusedAdapter.from_backbone(backbone.network, backbone.vae)
    new_adapter.register_to_config(
        info={"task": "depth", "guidance": {}, "guidance_scale": 2.0, "shift": 1.0, "recipe": {}}
    )
    save_adapter(adapter, new_adapter, backbone.network, full=False, half=False)
    info = json.loads((adapter / "config.json").read_text())["info"]
    edit_json(adapter / "config.json", info={key: value for key, value in info.items() if key != "files"})
    state = folder / CHECKPOINTS / "step-00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"progress": {"updates": 1, "images": 2, "seconds": 3.0}, "recipe": {"size": 64}}))

    def open_adapter() -> None:
        load_adapter(adapter, "depth", None, backbone.network)

    weights, unet = "diffusion_pytorch_model.safetensors", model / "unet"
    readers = {
        "safetensors": [(adapter / weights, open_adapter), (unet / weights, lambda: load_backbone(model))],
        "json": [
            (adapter / "config.json", open_adapter), (state, lambda: read_state(state.parent)),
            (model / "model_index.json", lambda: load_backbone(model)),
            (unet / "config.json", lambda: load_backbone(model)),
        ],
    }  # fmt: skip
    return {kind: [(path.read_bytes(), path, run) for path, run in pairs] for kind, pairs in readers.items()}


def data_cases(folder: Path) -> dict[str, list[Case]]:
    """Return cases of a folder of images with metadata.jsonl, and a WebDataset tar."""
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture("PNG"))
    metadata, tar = pictures / "metadata.jsonl", folder / "a.tar"
    rows = [{"file_name": "a.png", "text": "a cat", "conditioning_image": "a.png", "mask": "a.png"}] * 3
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(tar, "w") as archive:
        for name, data in (("0.png", picture("PNG")), ("0.json", b'{"text": "a cat"}'), ("1.jpg", picture("JPEG"))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

    def read(spec: Path, columns: tuple[str, ...]) -> None:
        source = open_source(str(spec), columns)
        source.read(range(min(3, len(source))), 16)

    return {
        "jsonl": [(metadata.read_bytes(), metadata, lambda: read(pictures, ("conditioning_image",)))],
        "tar": [(tar.read_bytes(), tar, lambda: read(tar, ()))],
    }


# --- the fuzz --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress messages of libraries about damaged files, including those of C code."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


class Hang(BaseException):
    """Raised when a read exceeds its time limit."""


def attempt(read: Callable[[], Any], limit: float) -> tuple[str, float]:
    """Run one read and return its outcome ("read", "refused", or a fault) and seconds."""

    def on_timeout(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, on_timeout)
    signal.setitimer(signal.ITIMER_REAL, limit)
    started = time.monotonic()
    try:
        with silence():
            read()
        outcome = "read"
    except UserError as error:
        message = str(error)
        outcome = (
            "refused" if "\n" not in message and len(message) <= UserError.MAX_LENGTH else f"message: {message[:200]!r}"
        )
    except Hang:
        outcome = f"hang: more than {limit:g} s: {traceback.format_exc().splitlines()[-3].strip()}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}: {traceback.format_exc().splitlines()[-3].strip()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, time.monotonic() - started


def fuzz(folder: Path, count: int, seed: int, limit: float) -> dict[str, Any]:
    """Read `count` damaged files, the same number of each format, and return outcomes and faults."""
    formats: dict[str, dict[str, Any]] = {}
    faults: list[dict[str, Any]] = []
    cases_by_format = cases(folder)
    for kind, readers in cases_by_format.items():
        counts = formats[kind] = {"tried": 0, "read": 0, "refused": 0, "slowest_s": 0.0}
        for number in range(-(-count // len(cases_by_format))):
            data, path, read = readers[number % len(readers)]
            path.write_bytes(damage(data, random.Random(f"{seed} {kind} {number}")))
            outcome, seconds = attempt(read, limit)
            path.write_bytes(data)  # other readers use it too
            counts["tried"] += 1
            counts["slowest_s"] = max(counts["slowest_s"], round(seconds, 2))
            if outcome in counts:
                counts[outcome] += 1
            else:
                faults.append({"format": kind, "number": number, "file": path.name, "fault": outcome})
        print(kind, counts, flush=True)
    return {"formats": formats, "tried": sum(counts["tried"] for counts in formats.values()), "faults": faults}


# --- the kills -------------------------------------------------------------------------------------------------------


def training_recipe(folder: Path) -> DistillRecipe:
    """Return a recipe of three updates of a full adapter with a checkpoint after each, of which one is kept."""
    return DistillRecipe(
        out=str(folder), model=str(folder.parent / "model"), data="scenes:train:8", held_out="scenes:held-out:2",
        size=32, images=6, batch_size=2, warmup=2, learning_rate=1e-2, log_every=4, preview_every=100,
        checkpoint_every=2, keep=1, device="cpu", degradation="bicubic",
    )  # fmt: skip


def start(folder: Path, at: int | None = None) -> int:
    """Start the training in a forked process, which saves the imports, and return its pid. `at`: the rename after which
    it is killed."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with silence():
            renames = count_renames(at)
            distill(training_recipe(folder), quiet=True)
            (folder.parent / "renames").write_text(str(len(renames)))
            code = 0
    finally:
        os._exit(code)


def count_renames(at: int | None) -> list[int]:
    """Count every rename of this process in the returned list, and kill the process after rename number `at`."""
    renames: list[int] = []

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: Any, **options: Any) -> None:
            function(*arguments, **options)
            renames.append(1)
            if len(renames) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        return rename

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    return renames


def exit_code_of(child: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(folder: Path) -> dict[str, bytes]:
    """Return the finished adapter's weight files."""
    files = (*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def leftovers(folder: Path) -> list[str]:
    """Return files that a run should not leave: hidden ones, incomplete checkpoints, and more checkpoints than kept."""
    hidden = [p.name for p in folder.rglob(".*")]
    root = folder / CHECKPOINTS
    steps = complete(root)
    return [*hidden, *(p.name for p in root.iterdir() if p not in steps[-1:])]


def fault_after_resume(folder: Path, expected: dict[str, bytes]) -> str | None:
    """Finish the training after a kill and return what is wrong with the result, or None."""
    if code := exit_code_of(start(folder)):
        return f"the next start ended with {code}"
    if weights(folder) != expected:
        return "other weights than the undisturbed training's"
    remaining = leftovers(folder)
    return f"left behind: {', '.join(remaining)}" if remaining else None


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill and resume a training many times and return counts and faults."""
    load_backbone(tiny_checkpoint(folder / "model"))  # import everything once, before forking
    uninterrupted, out, rng = folder / "whole", folder / "killed", random.Random(seed)
    started = time.monotonic()
    if exit_code_of(start(uninterrupted)):
        raise SystemExit("the undisturbed training failed")
    duration, expected = time.monotonic() - started, weights(uninterrupted)
    renames = int((folder / "renames").read_text())
    plans: list[tuple[str, Any]] = [("moment", rng.uniform(0, duration)) for _ in range(count)]
    plans += [("rename", number) for number in range(1, renames + 1)]
    result: dict[str, Any] = {"updates": 3, "renames": renames, "random": 0, "at_renames": 0, "bit_equal": 0}
    faults = result["faults"] = []
    for kind, plan in plans:
        shutil.rmtree(out, ignore_errors=True)
        if kind == "moment":
            child = start(out)
            time.sleep(plan)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            exit_code_of(child)
        elif exit_code_of(start(out, plan)) != -signal.SIGKILL:
            faults.append({"kill": f"{kind} {plan}", "fault": "was not killed"})
            continue
        result["random" if kind == "moment" else "at_renames"] += 1
        if fault := fault_after_resume(out, expected):
            faults.append({"kill": f"{kind} {plan}", "fault": fault})
        else:
            result["bit_equal"] += 1
    print({key: value for key, value in result.items()}, flush=True)
    return result


# --- docs ------------------------------------------------------------------------------------------------------------


def paragraph(result: dict[str, Any]) -> str:
    """Return the paragraph of docs/scale.md."""
    f, k = result["fuzz"], result["kills"]
    slowest = max(counts["slowest_s"] for counts in f["formats"].values())
    refused = sum(counts["refused"] for counts in f["formats"].values())
    others = f["tried"] - refused - len(f["faults"])
    lines = (
        f"Measured by `benchmarks/robustness.py`: a training killed {k['random']} times at random moments and "
        f"once after each of its {k['renames']} renames, then started again, ended {k['bit_equal']} of "
        f"{k['random'] + k['at_renames']} times with the undisturbed training's weights, bit for bit, and nothing "
        f"half-written left. Of {f['tried']:,} damaged files ({', '.join(f['formats'])}) {refused:,} were refused in "
        f"one line and {others:,} could still be read, the slowest in {slowest:.1f} s; "
        f"{len(f['faults'])} ended otherwise."
    )
    return textwrap.fill(lines, 116, break_on_hyphens=False) + "\n"


def write_docs(result: dict[str, Any]) -> None:
    """Write the paragraph between its markers."""
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text(before + BEGIN + paragraph(result) + END + rest.partition(END)[2])


def main() -> int:
    """Run both tests and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1_500)
    parser.add_argument("--kills", type=int, default=20, help="kills at random times")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that reading one file may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; without it docs/scale.md is not changed either")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for name in ("fuzz", "kills"):
            (Path(root) / name).mkdir()
        killed = kills(
            Path(root) / "kills", options.kills, options.seed
        )  # forks, so it runs before anything starts threads
        fuzzed = fuzz(Path(root) / "fuzz", options.mutations, options.seed, options.limit)
    result = {
        "fuzz": fuzzed, "kills": killed, "seed": options.seed, "seconds": round(time.monotonic() - started),
        "machine": describe_machine(), "command": command_line(),
    }  # fmt: skip
    if options.out:
        write_json(result, options.out)
        write_docs(result)
    for fault in (*fuzzed["faults"], *killed["faults"]):
        print(fault)
    return int(bool(fuzzed["faults"] or killed["faults"]))


if __name__ == "__main__":
    sys.exit(main())
