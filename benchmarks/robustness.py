"""Tries to break what reads files and what trains: damaged files of ten formats, and trainings that are killed.

    python benchmarks/robustness.py --out benchmarks/results/robustness.json

Fuzz: of each format a whole file is damaged in many ways (seeded), then read as the commands read it. It must be read
or refused by a UserError of one line, within --limit seconds; any other exception, or a hang, is a fault.
Kills: a tiny training is killed (SIGKILL) at --kills random moments, and right after every rename that it does; then
the same training is started again. Its final weights must be those of the undisturbed training, bit for
bit, and nothing half-written may be left. Exit code 1 where anything failed. The paragraph of docs/scale.md is written
from the JSON.
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
from torch.utils import tensorboard  # noqa: F401 - so that forks have it

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
    """One to four changes: bytes flipped, cut off, dropped, doubled or replaced by what no reader expects."""
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
        elif kind == 4:  # a word of text, or as many bytes
            end = next((i for i in range(at, len(out)) if out[i] in b" ,:}]\n"), at)
            out[at : min(end, at + 64)] = rng.choice(HOSTILE)
        else:
            head = rng.randrange(min(len(out), 64)) if kind == 5 and out else at  # headers decide most
            for i in range(head, min(len(out), head + rng.randint(1, 4))):
                out[i] = rng.randrange(256)
    return bytes(out)


# --- what is read ----------------------------------------------------------------------------------------------------

Case = tuple[bytes, Path, Callable[[], Any]]
"""A whole file, where its damaged copies go, and what reads them."""


def picture(kind: str, **options: Any) -> bytes:
    """A small picture in a format of Pillow."""
    pixels, buffer = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def cases(folder: Path) -> dict[str, list[Case]]:
    """Readers by format, on files below `folder`."""
    found: dict[str, list[Case]] = {}
    for suffix, kind, options in (("png", "PNG", {}), ("jpg", "JPEG", {}), ("webp", "WEBP", {"lossless": True}),
                                  ("tiff", "TIFF", {"compression": "tiff_lzw"})):  # fmt: skip
        path = folder / f"a.{suffix}"
        found[suffix] = [(picture(kind, **options), path, lambda path=path: read_image(path))]
    array, buffer = np.linspace(1, 9, 12 * 16).reshape(12, 16), io.BytesIO()
    np.save(buffer, array)
    found["npy"] = [(buffer.getvalue(), folder / "a.npy", lambda: read_depth(folder / "a.npy", "dark"))]
    found |= model_cases(folder)
    found |= data_cases(folder)
    recipe = "out: there\nmodel: mini\ntask: depth\nsize: 64\nlearning_rate: 1e-4\nguidance: {text: [1, 4]}\n"
    recipe += "train_backbone: false\nlora_rank: 4\nobjective_options:\n  dt: 20\nzoom: [1, 2]\n"

    def validate() -> None:
        build(DistillRecipe, read_recipe(folder / "a.yaml"), "a.yaml").validate()

    found["yaml"] = [(recipe.encode(), folder / "a.yaml", validate)]
    return found


def model_cases(folder: Path) -> dict[str, list[Case]]:
    """An adapter without a list of its files (else the list would refuse all), a model, and a training's state."""
    model, adapter = tiny_checkpoint(folder / "model"), folder / "adapter"
    backbone = load_backbone(model).freeze()
    made: Any = FusedAdapter.from_backbone(backbone.network, backbone.vae)
    made.register_to_config(info={"task": "depth", "guidance": {}, "guidance_scale": 2.0, "shift": 1.0, "recipe": {}})
    save_adapter(adapter, made, backbone.network, full=False, half=False)
    info = json.loads((adapter / "config.json").read_text())["info"]
    edit_json(adapter / "config.json", info={key: value for key, value in info.items() if key != "files"})
    state = folder / CHECKPOINTS / "step-00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"progress": {"updates": 1, "images": 2, "seconds": 3.0}, "recipe": {"size": 64}}))

    def opened() -> None:
        load_adapter(adapter, "depth", None, backbone.network)

    weights, unet = "diffusion_pytorch_model.safetensors", model / "unet"
    read = {
        "safetensors": [(adapter / weights, opened), (unet / weights, lambda: load_backbone(model))],
        "json": [
            (adapter / "config.json", opened), (state, lambda: read_state(state.parent)),
            (model / "model_index.json", lambda: load_backbone(model)),
            (unet / "config.json", lambda: load_backbone(model)),
        ],
    }  # fmt: skip
    return {kind: [(path.read_bytes(), path, run) for path, run in pairs] for kind, pairs in read.items()}


def data_cases(folder: Path) -> dict[str, list[Case]]:
    """A folder of pictures with metadata.jsonl, and a WebDataset tar."""
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
    """Without what libraries say of damaged files, in C too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Hang(BaseException):
    """It took longer than it may."""


def attempt(read: Callable[[], Any], limit: float) -> tuple[str, float]:
    """How one reading ended ("read", "refused", or a fault), and its seconds."""

    def late(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    began = time.monotonic()
    try:
        with silence():
            read()
        end = "read"
    except UserError as error:
        message = str(error)
        end = (
            "refused" if "\n" not in message and len(message) <= UserError.MAX_LENGTH else f"message: {message[:200]!r}"
        )
    except Hang:
        end = f"hang: more than {limit:g} s: {traceback.format_exc().splitlines()[-3].strip()}"
    except BaseException as error:
        end = f"{type(error).__name__}: {str(error)[:200]}: {traceback.format_exc().splitlines()[-3].strip()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return end, time.monotonic() - began


def fuzz(folder: Path, count: int, seed: int, limit: float) -> dict[str, Any]:
    """`count` damaged files, shared evenly by the formats."""
    formats: dict[str, dict[str, Any]] = {}
    faults: list[dict[str, Any]] = []
    found = cases(folder)
    for kind, readers in found.items():
        ends = formats[kind] = {"tried": 0, "read": 0, "refused": 0, "slowest_s": 0.0}
        for number in range(-(-count // len(found))):
            data, path, read = readers[number % len(readers)]
            path.write_bytes(damage(data, random.Random(f"{seed} {kind} {number}")))
            end, seconds = attempt(read, limit)
            path.write_bytes(data)  # others read it too
            ends["tried"] += 1
            ends["slowest_s"] = max(ends["slowest_s"], round(seconds, 2))
            if end in ends:
                ends[end] += 1
            else:
                faults.append({"format": kind, "number": number, "file": path.name, "fault": end})
        print(kind, ends, flush=True)
    return {"formats": formats, "tried": sum(ends["tried"] for ends in formats.values()), "faults": faults}


# --- the kills -------------------------------------------------------------------------------------------------------


def training(folder: Path) -> DistillRecipe:
    """Three updates of a full adapter, a checkpoint after each, one of them kept."""
    return DistillRecipe(
        out=str(folder), model=str(folder.parent / "model"), data="scenes:train:8", held_out="scenes:held-out:2",
        size=32, images=6, batch_size=2, warmup=2, learning_rate=1e-2, log_every=4, preview_every=100,
        checkpoint_every=2, keep=1, device="cpu", degradation="bicubic",
    )  # fmt: skip


def start(folder: Path, at: int | None = None) -> int:
    """Trains in a process of its own, a fork, which spares it the imports; returns its number. `at`: the rename after
    which it is killed."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with silence():
            renames = count_renames(at)
            distill(training(folder), quiet=True)
            (folder.parent / "renames").write_text(str(len(renames)))
            code = 0
    finally:
        os._exit(code)


def count_renames(at: int | None) -> list[int]:
    """Has every rename of this process counted in a list, and the process killed after one of them."""
    seen: list[int] = []

    def wrapped(real: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            seen.append(1)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        return rename

    os.rename, os.replace = wrapped(os.rename), wrapped(os.replace)
    return seen


def ended(child: int) -> int:
    """Waits; returns the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(folder: Path) -> dict[str, bytes]:
    """The finished adapter's files of weights."""
    files = (*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def leftovers(folder: Path) -> list[str]:
    """What a run should not leave: hidden names, checkpoints that are none, more of them than are kept."""
    hidden = [p.name for p in folder.rglob(".*")]
    root = folder / CHECKPOINTS
    steps = complete(root)
    return [*hidden, *(p.name for p in root.iterdir() if p not in steps[-1:])]


def resumed(folder: Path, expected: dict[str, bytes]) -> str | None:
    """Trains to the end after a kill; returns what is wrong with the result."""
    if code := ended(start(folder)):
        return f"the next start ended with {code}"
    if weights(folder) != expected:
        return "other weights than the undisturbed training's"
    left = leftovers(folder)
    return f"left behind: {', '.join(left)}" if left else None


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A training for each kill; what happened."""
    load_backbone(tiny_checkpoint(folder / "model"))  # imports once what every fork would import
    whole, out, rng = folder / "whole", folder / "killed", random.Random(seed)
    began = time.monotonic()
    if ended(start(whole)):
        raise SystemExit("the undisturbed training failed")
    length, expected = time.monotonic() - began, weights(whole)
    renames = int((folder / "renames").read_text())
    plans: list[tuple[str, Any]] = [("moment", rng.uniform(0, length)) for _ in range(count)]
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
            ended(child)
        elif ended(start(out, plan)) != -signal.SIGKILL:
            faults.append({"kill": f"{kind} {plan}", "fault": "was not killed"})
            continue
        result["random" if kind == "moment" else "at_renames"] += 1
        if fault := resumed(out, expected):
            faults.append({"kill": f"{kind} {plan}", "fault": fault})
        else:
            result["bit_equal"] += 1
    print({key: value for key, value in result.items()}, flush=True)
    return result


# --- docs ------------------------------------------------------------------------------------------------------------


def paragraph(result: dict[str, Any]) -> str:
    """What docs/scale.md says of it."""
    f, k = result["fuzz"], result["kills"]
    slowest = max(ends["slowest_s"] for ends in f["formats"].values())
    refused = sum(ends["refused"] for ends in f["formats"].values())
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
    """Puts the paragraph between its marks."""
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text(before + BEGIN + paragraph(result) + END + rest.partition(END)[2])


def main() -> int:
    """Runs both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1_500)
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that reading one file may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; without it docs/scale.md stays as it is too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for name in ("fuzz", "kills"):
            (Path(root) / name).mkdir()
        killed = kills(Path(root) / "kills", options.kills, options.seed)  # forks: before anything starts threads
        fuzzed = fuzz(Path(root) / "fuzz", options.mutations, options.seed, options.limit)
    result = {
        "fuzz": fuzzed, "kills": killed, "seed": options.seed, "seconds": round(time.monotonic() - began),
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
