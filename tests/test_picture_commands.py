"""The commands that generate images: the files they write, their output and their metadata."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import codi
from codi.apps import common, generate
from codi.apps.planning import plan
from codi.errors import UserError
from shell import Models, make_adapter, make_models, picture

# --- upscale ---------------------------------------------------------------------------------------------------------


def test_an_upscaled_file_records_its_settings(shell, tiny, tmp_path):
    source, target = picture(tmp_path / "in.png"), tmp_path / "new" / "out.png"
    result = shell("upscale", source, "-o", target, *tiny.options, "--steps", 2, "--seed", 3, "--prompt", "ein Bär")
    assert (result.code, result.err) == (0, "")
    assert str(target) in result.out
    with Image.open(target) as image:
        assert (image.size, image.mode) == ((28, 20), "RGB")
        notes = image.text
    assert notes["Software"] == f"codi {codi.__version__}"
    settings = {key.removeprefix("codi "): value for key, value in notes.items()}
    assert (settings["task"], settings["scale"], settings["steps"], settings["seed"], settings["guidance"]) == (
        "upscale",
        "4",
        "2",
        "3",
        "1",
    )
    assert (settings["model"], settings["adapter"], settings["prompt"]) == ("model", "adapter", "ein Bär")


def test_channels_and_bit_depth_are_kept(shell, tiny, tmp_path):
    folder = tmp_path / "in"
    picture(folder / "colour.jpg", 9, 6)
    picture(folder / "grey.png", mode="L")
    picture(folder / "clear.png", mode="RGBA")
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    cv2.imwrite(str(folder / "deep.png"), deep)
    (folder / "notes.txt").write_text("not a picture, and not taken for one")
    result = shell("upscale", folder, "-o", tmp_path / "out", *tiny.options, "--steps", 1, "--json")
    assert (result.code, result.err) == (0, "")
    rows = json.loads(result.out)
    columns = {"input", "output", "width", "height", "seconds", "seed", "steps", "model", "adapter"}
    assert [set(row) for row in rows] == [columns] * 4
    outputs = {p.name: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (tmp_path / "out").iterdir()}
    shapes = {name: (pixels.shape, str(pixels.dtype)) for name, pixels in outputs.items()}
    assert shapes == {
        "colour.png": ((24, 36, 3), "uint8"),
        "grey.png": ((20, 28), "uint8"),
        "clear.png": ((20, 28, 4), "uint8"),
        "deep.png": ((20, 28, 3), "uint16"),
    }


def test_variants_have_their_own_seeds_independent_of_the_batch(shell, tiny, tmp_path):
    source = picture(tmp_path / "in.png")
    options = (*tiny.options, "--steps", 1)
    assert shell("upscale", source, "-o", tmp_path / "a.png", *options, "--count", 3, "--seed", 5).code == 0
    assert shell("upscale", source, "-o", tmp_path / "b.png", *options, "--seed", 6).code == 0
    variants = [np.asarray(Image.open(tmp_path / f"a-{k}.png"), float) for k in range(3)]
    alone = np.asarray(Image.open(tmp_path / "b.png"), float)
    assert np.abs(variants[1] - alone).max() <= 1  # batched convolutions may round differently
    assert np.abs(variants[1] - variants[0]).max() > 1


def test_channels_last_and_vae_tiling_are_applied(shell, tiny, tmp_path, monkeypatch):
    def is_channels_last(weight: torch.Tensor) -> bool:
        return weight.is_contiguous(memory_format=torch.channels_last)

    layouts: list[bool] = []
    monkeypatch.setattr(
        AutoencoderKL, "enable_tiling", lambda vae: layouts.append(is_channels_last(vae.encoder.conv_in.weight))
    )
    options = (*tiny.options, "--steps", 1, "--channels-last", "--vae-tiling")
    assert shell("upscale", picture(tmp_path / "in.png"), "-o", tmp_path / "out.png", *options).code == 0
    assert layouts == [True]


def test_large_images_are_tiled_and_smaller_scales_are_reached(shell, tiny, tmp_path):
    source = picture(tmp_path / "in.png", 21, 13)
    result = shell(
        "upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--tile", 8, "--scale", 2, "--steps", 1
    )
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "out.png").size == (42, 26)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_written_in_rows_equals_the_one_written_whole(shell, tiny, tmp_path, monkeypatch, mode):
    source = picture(tmp_path / "in.png", 33, 45, mode=mode)
    options = (*tiny.options, "--tile", 16, "--steps", 1)
    assert shell("upscale", source, "-o", tmp_path / "whole.png", *options).code == 0
    monkeypatch.setattr("codi.apps.upscale.TOGETHER", 0)
    monkeypatch.setattr("codi.data.writing.write_image", None)
    result = shell("upscale", source, "-o", tmp_path / "rows.png", *options, "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)[0]
    whole, rows = (Image.open(tmp_path / f"{name}.png") for name in ("whole", "rows"))
    assert whole.mode == rows.mode == mode and rows.size == (row["width"], row["height"]) == (132, 180)
    assert np.abs(np.asarray(whole, int) - np.asarray(rows, int)).max() <= (1 if mode == "RGBA" else 0)
    assert whole.text == rows.text  # type: ignore[attr-defined]


def test_the_default_scale_is_the_adapter_s(shell, tmp_path):
    tiny, source = make_models(tmp_path, scale=8), picture(tmp_path / "in.png")
    for scale, size in (((), (56, 40)), (("--scale", 8), (56, 40)), (("--scale", 6), (42, 30))):
        result = shell(
            "upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--steps", 1, *scale, "--overwrite"
        )
        assert result.code == 0 and Image.open(tmp_path / "out.png").size == size
    result = shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--scale", 9)
    result.failed(2, "--scale 9", "at most 8, or run twice")


def test_one_bad_file_does_not_stop_the_others(shell, tiny, tmp_path):
    good = [picture(tmp_path / "in" / f"{n}.png") for n in "ac"]
    (tmp_path / "in" / "b.png").write_bytes(good[0].read_bytes()[:60])
    result = shell(
        "upscale", tmp_path / "in", tmp_path / "gone.png", "-o", tmp_path / "out", *tiny.options, "--steps", 1
    )
    assert result.code == 1
    assert [line.split(":")[1].strip() for line in result.err.splitlines()] == [
        str(tmp_path / "in" / "b.png"),
        str(tmp_path / "gone.png"),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_output_paths_follow_the_inputs_and_the_output_option(tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg")
    assert [j.targets for j in plan([a, b], tmp_path / "o")] == [[tmp_path / "o/a.png"], [tmp_path / "o/b.png"]]
    assert plan([b], tmp_path / "c.jpg", count=2)[0].targets == [tmp_path / "c-0.jpg", tmp_path / "c-1.jpg"]
    (tmp_path / "o").mkdir()
    assert plan([a], tmp_path / "o")[0].targets == [tmp_path / "o/a.png"]
    with pytest.raises(UserError, match="is an input"):
        plan([a], a, overwrite=True)
    assert plan([a], f"{tmp_path}/new/")[0].targets == [tmp_path / "new/a.png"]
    assert plan([a, b], f"{tmp_path}/v1.png/")[1].targets == [tmp_path / "v1.png/b.png"]
    with pytest.raises(common.BadUsage, match="one file for 2 pictures"):
        plan([a, b], tmp_path / "d.png")


def test_inputs_with_equal_names_get_distinct_outputs(tmp_path):
    names = ["a.jpg", "a.png", "b.png", "x/c.png", "y/c.png", "c-png.png"]
    files = [picture(tmp_path / name) for name in names]
    targets = [[target.name for target in job.targets] for job in plan(files, tmp_path / "o")]
    assert targets == [["a-jpg.png"], ["a-png.png"], ["b.png"], ["c-png.png"], ["c-png-2.png"], ["c-png-3.png"]]
    jobs = plan([picture(tmp_path / "d-1.png"), picture(tmp_path / "d.png")], tmp_path / "o", count=2)
    assert [target.name for job in jobs for target in job.targets] == ["d-1-0.png", "d-1-1.png", "d-0.png", "d-1.png"]
    (tmp_path / "link.png").symlink_to("a.png")
    with pytest.warns(UserWarning, match="named twice: read once") as caught:
        jobs = plan([files[1], tmp_path / "x" / ".." / "a.png", tmp_path / "link.png"], tmp_path / "o")
    assert [job.targets[0].name for job in jobs] == ["a.png", "link.png"] and len(caught) == 1


def test_one_file_given_twice_goes_into_a_folder(tmp_path):
    """Whether the output is a folder depends on the kind of inputs, not on the number of files."""
    a = picture(tmp_path / "in" / "a.png")
    for inputs in ([a, a], [a, a.parent], [a.parent, a], [a.parent]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [job.targets for job in plan(inputs, tmp_path / "out")] == [[tmp_path / "out/a.png"]]
        with pytest.raises(common.BadUsage, match="out.png: is one file for"):
            plan(inputs, tmp_path / "out.png")


def test_a_folder_with_unreadable_entries_is_processed_to_the_end(shell, tiny, tmp_path, monkeypatch):
    """A pipe, dangling links and a link to itself are one line each. A single image goes into a new folder/."""
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in" / "a.png")
    os.mkfifo("in/pipe.png")
    Path("in/self.png").symlink_to("self.png")
    Path("in/gone.png").symlink_to("nowhere.png")
    Path("in/sub.png").mkdir()
    options = (*tiny.options, "--steps", 1)
    result = shell("upscale", "in", "-o", "out", *options)
    assert result.code == 1 and os.listdir("out") == ["a.png"]
    assert [line.split(": ")[1:3] for line in result.err.splitlines()] == [
        ["in/gone.png", "is a link to nowhere.png, which does not exist"],
        ["in/pipe.png", "is not a regular file"],
        ["in/self.png", "is a link to self.png, which does not exist"],
    ]
    assert shell("upscale", "in/a.png", "-o", "new/", *options).code == 0 and os.listdir("new") == ["a.png"]
    for case in (("in/*.jpg", "no file matches"), ("https://host/a.png", "https://host/a.png: is a URL")):
        shell("upscale", case[0], "-o", "x.png", *options).failed(1, case[1])
    for other in ("pipe", "self", "gone"):
        shell("depth", f"in/{other}.png", "-o", "x.png", *options).failed(1, f"in/{other}.png: is ")


def test_a_full_adapter_refuses_a_fractional_strength(shell, tiny, tmp_path):
    result = shell("upscale", picture(tmp_path / "in.png"), "-o", tmp_path / "o.png", *tiny.options, "--strength", 0.5)
    result.failed(2, "error: --strength 0.5: adapter is a full adapter", "use 1")


def test_a_scale_beyond_the_adapter_or_a_tile_off_the_latent_grid_is_a_usage_error(shell, tmp_path):
    tiny, source = make_models(tmp_path, scale=2), picture(tmp_path / "in.png")
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--scale", 4).failed(
        2, "--scale 4", "use at most 2, --adapter upscale-x8, or run twice"
    )
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--tile", 7).failed(2, "--tile 7", "use 6")
    assert not (tmp_path / "o.png").exists()


# --- the other tasks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """Return, for each task, the options that name the tiny model and an adapter."""
    root = tmp_path_factory.mktemp("adapters")
    distilled = {"edit": {"text": [1.0, 5.0], "image": [1.0, 2.0]}, "generate": {"text": [1.0, 5.0]}}
    return {
        task: Models(tiny.model, make_adapter(root / task, task, distilled.get(task))).options
        for task in ("inpaint", "depth", "canny", "edit", "generate")
    }


def metadata(path: Path) -> dict[str, str]:
    """Return the generation settings that an image's metadata hold."""
    with Image.open(path) as image:
        return {key.removeprefix("codi "): value for key, value in image.text.items()}  # type: ignore[attr-defined]


def mask_file(path: Path, width: int = 22, height: int = 15) -> Path:
    """Write a mask that is white on the right half."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("task", "arguments", "notes"),
    [
        ("inpaint", ["in.png", "--mask", "mask.png", "--prompt", "a ball"], {"prompt": "a ball", "guidance": "1"}),
        ("depth", ["in.png", "--near", "bright", "--prompt", "a ball"], {"prompt": "a ball", "near": "bright"}),
        ("canny", ["in.png", "--prompt", "a ball", "--low", "20"], {"prompt": "a ball", "low": "20", "high": "200"}),
        ("edit", ["in.png", "--instruction", "blue", "--guidance", "2", "--image-guidance", "1.5"],
         {"instruction": "blue", "guidance": "2", "image guidance": "1.5"}),
        ("generate", ["--prompt", "a ball", "--size", "24x16"], {"prompt": "a ball", "guidance": "1"}),
    ],
)  # fmt: skip
def test_each_task_runs_from_file_to_file(shell, adapters, tmp_path, monkeypatch, task, arguments, notes):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in.png", 22, 15, mode="L" if task == "depth" else "RGB")
    mask_file(tmp_path / "mask.png")
    options = (*arguments, *adapters[task], "--steps", 2, "--seed", 3, "--strength", 0.5, "--json")
    result = shell(task, *options, "-o", "new/out.png", "--count", 2)
    assert (result.code, result.err) == (0, "")
    size = (24, 16) if task == "generate" else (22, 15)
    rows = json.loads(result.out)
    assert [{**row, "seconds": 0} for row in rows] == [
        {"input": None if task == "generate" else "in.png", "output": f"new/out-{k}.png", "width": size[0],
         "height": size[1], "seconds": 0, "seed": 3 + k, "steps": 2,
         "model": adapters[task][1], "adapter": adapters[task][3]}
        for k in range(2)
    ]  # fmt: skip
    images = [Image.open(tmp_path / "new" / f"out-{k}.png") for k in range(2)]
    assert [(image.size, image.mode) for image in images] == [(size, "RGB")] * 2
    first = metadata(tmp_path / "new" / "out-0.png")
    expected = {"task": task, "adapter": task, "model": "model", "steps": "2", "seed": "3", "strength": "0.5", **notes}
    assert first.items() >= expected.items() and first["Software"].startswith("codi ")
    assert shell(task, *options, "-o", "alone.png", "--seed", 4).code == 0
    alone = np.asarray(Image.open("alone.png"), float)
    assert np.abs(np.asarray(images[1], float) - alone).max() <= 1  # batched convolutions may round differently
    assert np.abs(np.asarray(images[0], float) - alone).max() > 1
    result = shell(
        task, *[w for w in arguments if w not in ("--prompt", "a ball")], *adapters[task], "-o", ".", "--steps", 1
    )
    if task == "generate":  # the output may be a folder, and the prompt may be empty
        assert result.code == 0 and metadata(tmp_path / "generated.png")["prompt"] == ""
    else:
        result.failed(1, "in.png: exists already")


@pytest.mark.parametrize("kind", ["L", "RGBA", "deep", "deep grey"])
def test_inpainting_returns_known_pixels_exactly(shell, adapters, tmp_path, kind):
    source, out, draw = tmp_path / "in.png", tmp_path / "out.png", np.random.default_rng(0)
    if kind.startswith("deep"):
        shape = (61, 70) if "grey" in kind else (61, 70, 3)
        cv2.imwrite(str(source), draw.integers(0, 65536, shape, dtype=np.uint16))
    else:
        picture(source, 70, 61, mode=kind)  # larger than the backbone's 32 px, and not a multiple of the latent cell
    mask = mask_file(tmp_path / "mask.png", 70, 61)
    result = shell("inpaint", source, "--mask", mask, "-o", out, *adapters["inpaint"], "--steps", 1)
    assert (result.code, result.err) == (0, "")
    before, after = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (source, out))
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert np.array_equal(after[:, :35], before[:, :35]) and not np.array_equal(after[:, 35:], before[:, 35:])
    if kind == "RGBA":
        assert (after[:, 35:, 3] == 255).all()


def test_a_lossy_file_is_a_warning(shell, adapters, tmp_path):
    source, mask = picture(tmp_path / "in.png", 22, 15), mask_file(tmp_path / "mask.png", 44, 30)  # scaled to fit
    command = ("inpaint", source, "--mask", mask, *adapters["inpaint"], "--steps", 1)
    result = shell(*command, "-o", tmp_path / "out.jpg")
    assert (
        result.code == 0
        and result.err.startswith("warning: ")
        and result.err.count("\n") == 1
        and ".png keeps" in result.err
    )


def test_equivalent_depth_maps_make_the_same_image(shell, adapters, tmp_path):
    distance = np.linspace(9, 2, 20)[:, None].repeat(16, 1)
    nearness = (1 / distance - 1 / 9) / (1 / 2 - 1 / 9)
    np.save(tmp_path / "metres.npy", distance)
    np.save(tmp_path / "near.npy", 7 * nearness + 3)
    cv2.imwrite(str(tmp_path / "mm.png"), (1000 * distance).round().astype(np.uint16))
    outputs = {}
    for name, near in (("metres.npy", "dark"), ("near.npy", "bright"), ("mm.png", "dark")):
        out = tmp_path / f"{name}.png"
        result = shell("depth", tmp_path / name, "-o", out, "--near", near, *adapters["depth"], "--steps", 1)
        assert (result.code, result.err) == (0, "")
        outputs[name] = np.asarray(Image.open(out), float)
    assert all(np.abs(output - outputs["metres.npy"]).max() <= 2 for output in outputs.values())
    result = shell("depth", tmp_path / "mm.png", "-o", tmp_path / "guess.png", *adapters["depth"], "--steps", 1)
    assert (
        result.code == 0
        and result.err.startswith("warning: ")
        and "--near" in result.err
        and result.err.count("\n") == 1
    )
    assert np.array_equal(np.asarray(Image.open(tmp_path / "guess.png"), float), outputs["mm.png"])


def test_depth_of_a_photo_is_estimated(shell, adapters, tmp_path, monkeypatch):
    calls = []

    def estimate(photo, model, device):
        calls.append((tuple(photo.shape), model, device))
        return photo.mean(0, keepdim=True)

    monkeypatch.setattr("codi.tasks.depth.estimate_depth", estimate)
    source = picture(tmp_path / "photo.jpg", 22, 15)
    command = (
        "depth",
        source,
        "-o",
        tmp_path / "out.png",
        *adapters["depth"],
        "--steps",
        1,
        "--from-image",
        "some/model",
    )
    assert shell(*command).code == 0
    assert calls == [((3, 15, 22), "some/model", "cpu")]
    shell(*command, "--near", "dark").failed(2, "--near dark", "--from-image")


def test_edges_are_detected_or_given(shell, adapters, tmp_path):
    from codi.data.images import read_image
    from codi.tasks.canny import edges

    shape = np.zeros((24, 24, 3), np.uint8)
    shape[6:18, 6:18] = 60  # a gradient of 240
    Image.fromarray(shape).save(tmp_path / "photo.png")
    detected = edges(read_image(tmp_path / "photo.png").rgb[None], 100, 200)[0, 0].numpy()
    Image.fromarray((detected * 255).astype(np.uint8)).save(tmp_path / "edges.png")
    options = (*adapters["canny"], "--steps", 1)
    assert shell("canny", tmp_path / "photo.png", "-o", tmp_path / "a.png", *options).code == 0
    assert shell("canny", tmp_path / "edges.png", "--edges", "-o", tmp_path / "b.png", *options).code == 0
    assert (
        shell("canny", tmp_path / "photo.png", "--high", 255, "--low", 255, "-o", tmp_path / "c.png", *options).code
        == 0
    )
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in "abc")
    assert np.array_equal(a, b) and "low" not in metadata(tmp_path / "b.png") and (a != c).any()
    assert "low" in metadata(tmp_path / "a.png") and "jitter" not in metadata(tmp_path / "a.png")
    clear = np.dstack([np.full((24, 24, 3), 255), detected * 255]).astype(np.uint8)  # white lines on a clear ground
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert shell("canny", tmp_path / "clear.png", "--edges", "-o", tmp_path / "d.png", *options).err == ""
    assert np.array_equal(np.asarray(Image.open(tmp_path / "d.png"), int), b)
    Image.new("L", (24, 24), 255).save(tmp_path / "white.png")
    result = shell("canny", tmp_path / "white.png", "--edges", "-o", tmp_path / "e.png", *options)
    assert result.code == 0 and "mostly white" in result.err and result.err.count("\n") == 1


def test_guidance_beyond_the_distilled_range_is_a_warning(shell, adapters, tmp_path):
    command = ("generate", "--prompt", "a ball", *adapters["generate"], "--steps", 1)
    result = shell(*command, "-o", tmp_path / "a.png", "--guidance", 9)
    assert result.code == 0 and result.err.splitlines() == [
        "warning: guidance of the text 9: 1 to 5 is distilled into this adapter: using 5"
    ]
    assert metadata(tmp_path / "a.png")["guidance"] == "5"


def test_sizes_are_parsed_or_refused():
    assert generate.parse_size("512x384") == (512, 384) and generate.parse_size(None) == (None, None)
    for wrong in ("", "512", "0x8", "8x", "axb", "-8x8", "8x8x8", "999999x8"):
        with pytest.raises(common.BadUsage, match="--size"):
            generate.parse_size(wrong)
