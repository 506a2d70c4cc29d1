"""Invalid user input: a one-line error, the right exit code, and no partial output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from codi.apps import models as embedded
from codi.data.samples import CorruptSample
from codi.data.sources import open_source
from codi.errors import UserError
from codi.training.checkpoint import complete
from codi.training.decoder import DecoderRecipe
from codi.training.distill_recipe import DistillRecipe
from codi.training.pretrain_recipe import PretrainRecipe
from codi.training.recipe import read_recipe, shipped_recipes
from shell import Models, make_adapter, picture
from tiny import tiny_checkpoint


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- images ----------------------------------------------------------------------------------------------------------


def huge_header() -> bytes:
    """Return a PNG whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def truncated(folder: Path) -> bytes:
    return picture(folder / "whole.jpg", 64, 64).read_bytes()[:700]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (lambda folder: b"", "empty (0 bytes)"),
        (lambda folder: b"%PDF-1.7 but named .png", "is not an image"),
        (truncated, "truncated or damaged"),
        (lambda folder: huge_header(), "100000 x 100000 pixels"),
    ],
    ids=["missing", "0-byte", "non-image", "truncated", "huge header"],
)
def test_unreadable_image_is_refused(shell, tiny, tmp_path, content, message):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    if content is not None:
        source.write_bytes(content(tmp_path))
    before = files(tmp_path)
    shell("upscale", source, "-o", out, *tiny.options).failed(1, str(source), message)
    assert files(tmp_path) == before


def test_empty_folder_is_refused(shell, tiny, tmp_path):
    (tmp_path / "in").mkdir()
    shell("upscale", tmp_path / "in", "-o", tmp_path / "out", *tiny.options).failed(1, "no pictures in this folder")
    shell("data", "check", tmp_path / "in").failed(1, str(tmp_path / "in"), "no pictures")
    shell("distill", "smoke", "--out", tmp_path / "run", "--data", tmp_path / "in").failed(1, "no pictures")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_mask_with_another_aspect_ratio_is_corrupt(tmp_path):
    for name, size in (("a.png", (40, 30)), ("m.png", (30, 40)), ("half.png", (20, 15))):
        picture(tmp_path / name, *size)
    rows = [{"file_name": "a.png", "mask": "m.png"}, {"file_name": "a.png", "mask": "half.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong, coarser = open_source(tmp_path, columns=("mask",)).read([0, 1], 32)
    assert isinstance(wrong, CorruptSample) and "mask has another shape: 30 x 40 px, the picture 40 x 30" in wrong.why
    assert not isinstance(coarser, CorruptSample) and coarser.extras["mask"].shape == (1, 32, 32)


# --- output files ----------------------------------------------------------------------------------------------------


def test_existing_output_is_kept_without_overwrite(shell, tiny, tmp_path):
    source, out = picture(tmp_path / "in.png"), tmp_path / "out.png"
    out.write_bytes(b"mine")
    command = ("upscale", source, "-o", out, *tiny.options, "--steps", 1)
    shell(*command).failed(1, str(out), "exists already", "--overwrite")
    assert out.read_bytes() == b"mine"
    assert shell(*command, "--overwrite").code == 0
    assert Image.open(out).size == (28, 20)


def test_unwritable_output_is_refused(shell, tiny, adapters, tmp_path):
    source = picture(tmp_path / "in.png")
    for target, message in (
        (source / "out.png", "is a file, not a folder"),
        (tmp_path / "out.psd", "cannot write .psd"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
    ):
        shell("upscale", source, "-o", target, *tiny.options).failed(1, message)
    shell("data", "render", 2, "-o", source / "scenes").failed(1, str(source / "scenes"))
    out = ("--out", source / "figures.json")
    shell("evaluate", "--task", "upscale", "--data", "scenes:held-out:2", *out).failed(1, "is a file, not a folder")
    library = adapters["depth"].adapter.parent
    ran = shell("demo", "--out", source / "demo", "--model", tiny.model, "--adapters", library, "--device", "cpu")
    ran.failed(1, str(source))
    assert files(tmp_path) == ["in.png"]


def test_full_disk_leaves_existing_files_unchanged(shell, tiny, tmp_path, monkeypatch):
    source = picture(tmp_path / "in.png")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("codi.data.writing.os.replace", full)
    shell("upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--steps", 1).failed(1, "no space left")
    monkeypatch.undo()
    assert files(tmp_path) == ["in.png"]

    path = recipe(tmp_path, tiny, pictures(tmp_path / "pictures", 4))
    assert shell("distill", path, "--images", 4).code == 0
    before = files(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr("codi.training.checkpoint.save_file", full)
    shell("distill", path, "--images", 8).failed(1, "no space left on the disk")
    assert files(tmp_path / "run" / "checkpoints") == before


# --- models and adapters ---------------------------------------------------------------------------------------------


def copy_with_nan(folder: Path, copy: Path) -> Path:
    """Copy a model or adapter, put a NaN in its first weight, and drop the checksums of the adapter's config."""
    shutil.copytree(folder, copy)
    config = copy / "config.json"
    if config.is_file():
        values = json.loads(config.read_text())
        del values["info"]["files"]
        config.write_text(json.dumps(values))
    path = next(copy.rglob("diffusion_pytorch_model.safetensors"))
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return copy


def test_nan_weights_are_refused(shell, tiny, tmp_path):
    source, out = picture(tmp_path / "in.png"), tmp_path / "out.png"
    model, adapter = copy_with_nan(tiny.model, tmp_path / "model"), copy_with_nan(tiny.adapter, tmp_path / "adapter")
    command = ("upscale", source, "-o", out)
    shell(*command, "--model", model, "--adapter", tiny.adapter).failed(1, str(model), "NaN or infinite")
    shell(*command, "--model", tiny.model, "--adapter", adapter).failed(1, str(adapter), "NaN or infinite")
    assert not out.exists()


def test_incompatible_or_invalid_models_and_adapters_are_refused(shell, tiny, tmp_path):
    source, out = picture(tmp_path / "in.png"), tmp_path / "out.png"
    epsilon_model = tiny_checkpoint(tmp_path / "other", prediction="epsilon")
    command = ("upscale", source, "-o", out)
    ran = shell(*command, "--model", epsilon_model, "--adapter", tiny.adapter)
    ran.failed(1, str(tiny.adapter), "was trained for backbone", "the model given is")

    depth = shutil.copytree(tiny.adapter, tmp_path / "depth")
    config = json.loads((depth / "config.json").read_text())
    config["info"]["task"] = "depth"
    (depth / "config.json").write_text(json.dumps(config))
    shell(*command, "--model", tiny.model, "--adapter", depth).failed(1, "does 'depth', not 'upscale'")

    shell(*command, "--model", tiny.model, "--adapter", tmp_path / "gone").failed(1, "gone", "no adapter there")
    shell(*command, "--model", tmp_path / "gone").failed(1, "gone", "no model there")
    (depth / "config.json").write_text("{")
    shell(*command, "--model", tiny.model, "--adapter", depth).failed(1, "not an adapter's config")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    shell(*command, "--model", tmp_path / "model.ckpt").failed(1, "not a .safetensors file")
    assert not out.exists()


# --- tasks other than upscaling --------------------------------------------------------------------------------------

TASKS = {
    "inpaint": ("IN", "--mask", "MASK"),
    "depth": ("IN", "--near", "bright"),
    "canny": ("IN",),
    "edit": ("IN", "--instruction", "blue"),
    "generate": ("--prompt", "ball"),
}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> dict[str, Models]:
    root = tmp_path_factory.mktemp("adapters")
    return {task: Models(tiny.model, make_adapter(root / task, task)) for task in TASKS}


@pytest.fixture
def command(adapters, tmp_path):
    """A function that returns a task's command-line arguments, with its input files."""
    files = {"IN": picture(tmp_path / "in.png", 12, 8, mode="L"), "MASK": picture(tmp_path / "mask.png", 12, 8, "1")}

    def arguments(task: str, *more: object, **other: Path) -> tuple[object, ...]:
        inputs = [{**files, **other}.get(argument, argument) for argument in TASKS[task]]
        return (task, *inputs, "-o", tmp_path / "out.png", *adapters[task].options, "--steps", 1, *more)

    return arguments


@pytest.mark.parametrize("task", ["inpaint", "depth", "canny", "edit"])
def test_unreadable_inputs_of_every_task_are_refused(shell, command, tmp_path, task):
    before = files(tmp_path)
    for name in ("IN", "MASK") if task == "inpaint" else ("IN",):
        for content, message in ((None, "no such file"), (b"", "empty (0 bytes)"), (b"%PDF-1.7", "is not an image")):
            bad = tmp_path / "bad.png"
            if content is not None:
                bad.write_bytes(content)
            shell(*command(task, **{name: bad})).failed(1, str(bad), message)
            bad.unlink(missing_ok=True)
        shell(*command(task, **{name: tmp_path})).failed(1, "is a folder")
    assert files(tmp_path) == before


@pytest.mark.parametrize("task", TASKS)
def test_invalid_outputs_and_adapters_of_every_task_are_refused(shell, adapters, command, tmp_path, task):
    out = tmp_path / "out.png"
    other = adapters["canny" if task == "edit" else "edit"]
    ran = shell(*command(task, "--adapter", other.adapter))
    ran.failed(1, str(other.adapter), f"does {other.adapter.name!r}, not {task!r}")
    shell(*command(task, "--adapter", tmp_path / "gone")).failed(1, "gone", "no adapter there")
    if task != "generate":
        shell(*command(task, "-o", tmp_path / "in.png", "--overwrite")).failed(1, "is an input")
    shell(*command(task, "-o", tmp_path / "out.gif")).failed(1, "cannot write .gif")
    out.write_bytes(b"mine")
    shell(*command(task)).failed(1, str(out), "exists already", "--overwrite")
    assert out.read_bytes() == b"mine"
    ran = shell(*command(task, "--overwrite"))
    assert (ran.code, ran.err) == (0, "") and Image.open(out).size == ((32, 32) if task == "generate" else (12, 8))


def test_mask_of_another_shape_is_refused(shell, command, tmp_path):
    mask = picture(tmp_path / "small.png", 8, 12)
    shell(*command("inpaint", MASK=mask)).failed(1, str(mask), "8 x 12 px", "picture of 12 x 8", "mask of its shape")
    shell(*command("inpaint", "-o", tmp_path / "mask.png", "--overwrite")).failed(1, "is an input")
    assert not (tmp_path / "out.png").exists()


def test_options_that_a_task_does_not_support_are_refused(shell, command, tmp_path):
    shell(*command("edit", "--image-guidance", 1.5)).failed(2, "error: --image-guidance 1.5", "leave it out")
    shell(*command("edit", "--guidance", "inf")).failed(2, "error: --guidance inf", "from 0 up")
    shell(*command("generate", "--size", "30x32")).failed(2, "--size 30x32", "multiples of 4 px", "use 32x32")
    shell(*command("canny", "--low", 250)).failed(2, "low=250", "above high=200")
    assert not (tmp_path / "out.png").exists()


def test_invalid_depth_files_are_refused(shell, command, tmp_path):
    flat, text = tmp_path / "flat.npy", tmp_path / "text.npy"
    for number, header in enumerate(
        (b"{'descr': ((((", b"{'shape': (99999999999999999999999,)}", b"{[]: 1}", b"(" * 9_000)
    ):
        bad = tmp_path / f"{number}.npy"
        bad.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
        shell(*command("depth", IN=bad)).failed(1, str(bad), "no whole array of numbers")
    np.save(flat, np.zeros((8, 12)))
    text.write_bytes(b"not numpy")
    shell(*command("depth", "--near", "dark", IN=flat)).failed(1, str(flat), "no depth")
    shell(*command("depth", IN=text)).failed(1, str(text))
    shell(*command("depth", IN=picture(tmp_path / "photo.png"))).failed(1, "photo.png")
    missing = command("depth", "--near", "guess", "--from-image", tmp_path / "no-model")
    shell(*missing).failed(1, "no-model", "no depth estimator")
    assert not (tmp_path / "out.png").exists()


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("upscal in.png -o out.png", ["upscal", "upscale"]),
        ("upscale in.png", ["--out"]),
        ("upscale in.png -o out.png --stpes 4", ["--stpes", "--steps"]),
        ("upscale in.png -o out.png --steps 0", ["--steps"]),
        ("upscale in.png -o out.png --steps 5000", ["--steps"]),
        ("upscale in.png -o out.png --steps four", ["--steps", "integer"]),
        ("upscale in.png -o out.png --colour wavlet", ["--colour", "wavelet"]),
        ("upscale in.png -o out.png --device tpu", ["--device", "cuda"]),
        ("upscale in.png -o out.png --strength -1", ["--strength"]),
        ("inpaint in.png -o out.png --prompt ball", ["--mask"]),
        ("inpaint --mask m.png -o out.png", ["IMAGE"]),
        ("inpaint in.png --maks m.png -o out.png", ["--maks", "--mask"]),
        ("depth -o out.png", ["DEPTHMAP"]),
        ("depth in.png -o out.png --near far", ["--near", "bright"]),
        ("depth in.png -o out.png --near dark --from-image a/b", ["--near dark", "--from-image"]),
        ("canny in.png -o out.png --low 300", ["--low", "255"]),
        ("canny in.png -o out.png --high x", ["--high", "number"]),
        ("canny in.png -o out.png --edges --low 3", ["--edges", "--low"]),
        ("edit in.png -o out.png", ["--instruction"]),
        ("edit in.png -o out.png --instruction blue --image-guidance -1", ["--image-guidance"]),
        ("generate --prompt ball", ["--out"]),
        ("generate -o out.png --size 32", ["--size 32", "512x384"]),
        ("generate -o out.png --size 0x32", ["--size 0x32"]),
        ("generate -o out.png --guidance -1", ["--guidance"]),
        ("generate -o out.png --count 0", ["--count"]),
        ("generate -o out.png --seed 9223372036854775807", ["--seed 922", "at most 922337203685477580"]),
        ("evaluate --task upscale --seed 9223372036854775807", ["--seed 9223372036854775807", "at most"]),
        ("generate in.png -o out.png", ["in.png"]),
        ("evaluate", ["--task"]),
        ("evaluate --task upscle", ["upscle", "did you mean 'upscale'"]),
        ("evaluate --task upscale --steps 1,2,x", ["--steps 1,2,x"]),
        ("evaluate --task upscale --degradation bicubc", ["bicubc", "bicubic"]),
        ("distill", ["RECIPE"]),
        ("distill --out there", ["RECIPE"]),
        ("distill smoke --learning-rat 1", ["learning_rat", "did you mean 'learning_rate'"]),
        ("distill smoke --images many", ["images", "many"]),
        ("distill smoke --task depht", ["depht", "unknown task"]),
        ("distill smoke --objective cody", ["cody", "did you mean 'codi'"]),
        ("pretrain mini --unet-width 3", ["unet_width", "unet_widths"]),
        ("data check . --task upscle", ["upscle", "did you mean 'upscale'"]),
        ("data check . --size 30", ["--size 30", "multiple"]),
        ("data render 2 -o there --split trian", ["trian", "did you mean 'train'"]),
        ("data render 2 -o there --size 1000", ["--size"]),
        ("data render 0 -o there", ["N"]),
    ],
)
def test_usage_errors_name_the_option(shell, tmp_path, monkeypatch, command_line, message):
    monkeypatch.chdir(tmp_path)
    shell(*command_line.split()).failed(2, *message)
    assert files(tmp_path) == []


def test_unknown_or_invalid_recipes_are_refused(shell, tmp_path):
    shell("distill", "smke").failed(1, "smke", "did you mean 'smoke'")
    broken = tmp_path / "broken.yaml"
    broken.write_text("images: [1, 2")
    shell("distill", broken).failed(1, str(broken), "not valid YAML")
    broken.write_text("imags: 3\nout: there")
    shell("distill", broken).failed(1, str(broken), "'imags'", "did you mean 'images'")
    shell("evaluate", broken).failed(1, str(broken), "'imags'")


@pytest.mark.parametrize(
    ("command_line", "correct"),
    [
        ("distill mini", "pretrain mini"), ("distill mini-flux --ldm-images 3", "pretrain mini-flux"),
        ("distill sd-decoder", "distill-decoder sd-decoder"), ("pretrain depth", "distill depth"),
        ("pretrain mini-decoder --out there", "distill-decoder mini-decoder"),
        ("distill-decoder flux/depth", "distill flux/depth"), ("distill-decoder photo", "pretrain photo"),
        ("data cache mini -o there", "pretrain mini"), ("evaluate mini", "pretrain mini"),
    ],
)  # fmt: skip
def test_recipe_of_another_command_names_that_command(shell, tmp_path, monkeypatch, command_line, correct):
    monkeypatch.chdir(tmp_path)
    message = "not a recipe of codi distill-decoder: " if command_line.startswith("distill-decoder") else ": "
    shell(*command_line.split()).failed(1, f"{message}run codi {correct}")
    assert files(tmp_path) == []


@pytest.mark.parametrize("command", ["distill", "pretrain", "distill-decoder"])
def test_every_shipped_recipe_has_one_command(command):
    from codi.apps.train import read_values

    kinds = {"distill": DistillRecipe, "pretrain": PretrainRecipe, "distill-decoder": DecoderRecipe}
    for name in shipped_recipes():
        keys = read_recipe(name).keys()
        correct = "distill-decoder" if name.endswith("decoder") else "pretrain" if "ldm_images" in keys else "distill"
        if command == correct:
            assert read_values(kinds[command], name)
        else:
            with pytest.raises(UserError, match=f"not a recipe of codi {command}: run codi {correct} {name}$"):
                read_values(kinds[command], name)


def test_unexpected_errors_are_one_line(shell, monkeypatch):
    def fail(error: BaseException):
        def embedded_():
            raise error

        monkeypatch.setattr(embedded, "embedded", embedded_)
        return shell("models")

    fail(RuntimeError("boom\nand more")).failed(1, "RuntimeError: boom and more", "CODI_DEBUG=1")
    fail(RuntimeError("DefaultCPUAllocator: can't allocate memory")).failed(1, "not enough memory")
    fail(PermissionError(errno.EACCES, "Permission denied", "there.png")).failed(1, "there.png: Permission denied")
    fail(KeyboardInterrupt()).failed(130, "interrupted")
    monkeypatch.setenv("CODI_DEBUG", "1")
    ran = fail(RuntimeError("boom"))
    assert ran.code == 1 and "Traceback" in ran.err


# --- training data ---------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int, corrupt: int = 0) -> Path:
    """Write a folder of `count` image files, the first `corrupt` of them unreadable."""
    for k in range(count):
        picture(folder / f"{k:03}.png", 32, 32, seed=k)
    for k in range(corrupt):
        (folder / f"{k:03}.png").write_bytes(b"not a picture")
    return folder


def recipe(folder: Path, tiny: Models, data: Path) -> Path:
    """Write a recipe that trains on `data` with a tiny model."""
    held_out = pictures(folder / "held-out", 2)
    path = folder / "recipe.yaml"
    path.write_text(
        f"out: {folder / 'run'}\nmodel: {tiny.model}\ndata: {data}\nheld_out: {held_out}\nsize: 32\nimages: 4\n"
        "batch_size: 4\nwarmup: 1\nlog_every: 4\npreview_every: 1000\ncheckpoint_every: 4\ndegradation: bicubic\n"
        "device: cpu\n"
    )
    return path


def test_one_corrupt_file_in_a_hundred_is_skipped_and_listed(shell, tiny, tmp_path):
    path = recipe(tmp_path, tiny, pictures(tmp_path / "data", 100, corrupt=1))
    ran = shell("distill", path, "--images", 120, "--batch-size", 40)
    assert (ran.code, ran.err) == (0, "")
    report = json.loads((tmp_path / "run" / "corrupt.json").read_text())
    assert (report["read"], report["skipped"], [f["file"] for f in report["files"]]) == (100, 1, ["000.png"])


def test_too_many_corrupt_files_stop_the_run(shell, tiny, tmp_path):
    path = recipe(tmp_path, tiny, pictures(tmp_path / "data", 30, corrupt=12))
    shell("distill", path, "--batch-size", 30).failed(1, "files are corrupt, more than 5%", "corrupt.json")
    assert json.loads((tmp_path / "run" / "corrupt.json").read_text())["skipped"] == 12
    assert not (tmp_path / "run" / "config.json").exists()
    assert shell("distill", path, "--out", tmp_path / "kind", "--max-corrupt", 0.5).code == 0


def test_size_that_is_not_a_multiple_is_refused(shell, tiny, tmp_path):
    path = recipe(tmp_path, tiny, pictures(tmp_path / "data", 4))
    shell("distill", path, "--size", 34).failed(1, "size 34", "not a multiple of 4", "use 32")
    options = ("--task", "upscale", "--data", tmp_path / "data", "--finetuned", "none", *tiny.options)
    shell("evaluate", *options, "--size", 34).failed(1, "34 x 34", "not multiples of the scale 4")
    assert not complete(tmp_path / "run" / "checkpoints")


def test_image_with_nan_pixels_is_refused(shell, tiny, tmp_path):
    path = tmp_path / "in.tiff"
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    shell("upscale", path, "-o", tmp_path / "out.png", *tiny.options).failed(1, "NaN or infinite pixels")
