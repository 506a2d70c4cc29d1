"""The commands that make pictures: what each writes, prints and notes in the file."""

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


def test_one_file_to_one_file_with_a_record_of_how(shell, tiny, tmp_path):
    source, target = picture(tmp_path / "in.png"), tmp_path / "new" / "out.png"
    ran = shell("upscale", source, "-o", target, *tiny.options, "--steps", 2, "--seed", 3, "--prompt", "ein Bär")
    assert (ran.code, ran.err) == (0, "")
    assert str(target) in ran.out
    with Image.open(target) as made:
        assert (made.size, made.mode) == ((28, 20), "RGB")
        notes = made.text
    assert notes["Software"] == f"codi {codi.__version__}"
    told = {key.removeprefix("codi "): value for key, value in notes.items()}
    assert (told["task"], told["scale"], told["steps"], told["seed"], told["guidance"]) == (
        "upscale",
        "4",
        "2",
        "3",
        "1",
    )
    assert (told["model"], told["adapter"], told["prompt"]) == ("model", "adapter", "ein Bär")


def test_kinds_of_pictures_are_kept(shell, tiny, tmp_path):
    folder = tmp_path / "in"
    picture(folder / "colour.jpg", 9, 6)
    picture(folder / "grey.png", mode="L")
    picture(folder / "clear.png", mode="RGBA")
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    cv2.imwrite(str(folder / "deep.png"), deep)
    (folder / "notes.txt").write_text("not a picture, and not taken for one")
    ran = shell("upscale", folder, "-o", tmp_path / "out", *tiny.options, "--steps", 1, "--json")
    assert (ran.code, ran.err) == (0, "")
    rows = json.loads(ran.out)
    columns = {"input", "output", "width", "height", "seconds", "seed", "steps", "model", "adapter"}
    assert [set(row) for row in rows] == [columns] * 4
    made = {p.name: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (tmp_path / "out").iterdir()}
    shapes = {name: (pixels.shape, str(pixels.dtype)) for name, pixels in made.items()}
    assert shapes == {
        "colour.png": ((24, 36, 3), "uint8"),
        "grey.png": ((20, 28), "uint8"),
        "clear.png": ((20, 28, 4), "uint8"),
        "deep.png": ((20, 28, 3), "uint16"),
    }


def test_variants_have_their_own_seeds_whatever_the_batch(shell, tiny, tmp_path):
    source = picture(tmp_path / "in.png")
    options = (*tiny.options, "--steps", 1)
    assert shell("upscale", source, "-o", tmp_path / "a.png", *options, "--count", 3, "--seed", 5).code == 0
    assert shell("upscale", source, "-o", tmp_path / "b.png", *options, "--seed", 6).code == 0
    variants = [np.asarray(Image.open(tmp_path / f"a-{k}.png"), float) for k in range(3)]
    alone = np.asarray(Image.open(tmp_path / "b.png"), float)
    assert np.abs(variants[1] - alone).max() <= 1  # batched convolutions may round another way
    assert np.abs(variants[1] - variants[0]).max() > 1


def test_networks_are_laid_out_and_work_in_tiles_when_asked_to(shell, tiny, tmp_path, monkeypatch):
    def last(weight: torch.Tensor) -> bool:
        return weight.is_contiguous(memory_format=torch.channels_last)

    told: list[bool] = []
    monkeypatch.setattr(AutoencoderKL, "enable_tiling", lambda vae: told.append(last(vae.encoder.conv_in.weight)))
    options = (*tiny.options, "--steps", 1, "--channels-last", "--vae-tiling")
    assert shell("upscale", picture(tmp_path / "in.png"), "-o", tmp_path / "out.png", *options).code == 0
    assert told == [True]


def test_large_pictures_are_cut_into_tiles_and_smaller_scales_are_reached(shell, tiny, tmp_path):
    source = picture(tmp_path / "in.png", 21, 13)
    ran = shell("upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--tile", 8, "--scale", 2, "--steps", 1)
    assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "out.png").size == (42, 26)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_written_row_by_row_is_the_one_made_whole(shell, tiny, tmp_path, monkeypatch, mode):
    source = picture(tmp_path / "in.png", 33, 45, mode=mode)
    options = (*tiny.options, "--tile", 16, "--steps", 1)
    assert shell("upscale", source, "-o", tmp_path / "whole.png", *options).code == 0
    monkeypatch.setattr("codi.apps.upscale.TOGETHER", 0)
    monkeypatch.setattr("codi.data.writing.write_image", None)
    ran = shell("upscale", source, "-o", tmp_path / "rows.png", *options, "--json")
    assert ran.code == 0, ran.err
    row = json.loads(ran.out)[0]
    whole, rows = (Image.open(tmp_path / f"{name}.png") for name in ("whole", "rows"))
    assert whole.mode == rows.mode == mode and rows.size == (row["width"], row["height"]) == (132, 180)
    assert np.abs(np.asarray(whole, int) - np.asarray(rows, int)).max() <= (1 if mode == "RGBA" else 0)
    assert whole.text == rows.text  # type: ignore[attr-defined]


def test_the_scale_is_the_adapter_s_own(shell, tmp_path):
    tiny, source = make_models(tmp_path, scale=8), picture(tmp_path / "in.png")
    for scale, size in (((), (56, 40)), (("--scale", 8), (56, 40)), (("--scale", 6), (42, 30))):
        ran = shell("upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--steps", 1, *scale, "--overwrite")
        assert ran.code == 0 and Image.open(tmp_path / "out.png").size == size
    ran = shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--scale", 9)
    ran.failed(2, "--scale 9", "at most 8, or run twice")


def test_one_bad_file_does_not_stop_the_others(shell, tiny, tmp_path):
    good = [picture(tmp_path / "in" / f"{n}.png") for n in "ac"]
    (tmp_path / "in" / "b.png").write_bytes(good[0].read_bytes()[:60])
    ran = shell("upscale", tmp_path / "in", tmp_path / "gone.png", "-o", tmp_path / "out", *tiny.options, "--steps", 1)
    assert ran.code == 1
    assert [line.split(":")[1].strip() for line in ran.err.splitlines()] == [
        str(tmp_path / "in" / "b.png"),
        str(tmp_path / "gone.png"),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_where_pictures_go(tmp_path):
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


def test_inputs_of_one_name_have_results_of_their_own(tmp_path):
    names = ["a.jpg", "a.png", "b.png", "x/c.png", "y/c.png", "c-png.png"]
    files = [picture(tmp_path / name) for name in names]
    targets = [[one.name for one in job.targets] for job in plan(files, tmp_path / "o")]
    assert targets == [["a-jpg.png"], ["a-png.png"], ["b.png"], ["c-png.png"], ["c-png-2.png"], ["c-png-3.png"]]
    jobs = plan([picture(tmp_path / "d-1.png"), picture(tmp_path / "d.png")], tmp_path / "o", count=2)
    assert [one.name for job in jobs for one in job.targets] == ["d-1-0.png", "d-1-1.png", "d-0.png", "d-1.png"]
    (tmp_path / "link.png").symlink_to("a.png")
    with pytest.warns(UserWarning, match="named twice: read once") as caught:
        jobs = plan([files[1], tmp_path / "x" / ".." / "a.png", tmp_path / "link.png"], tmp_path / "o")
    assert [job.targets[0].name for job in jobs] == ["a.png", "link.png"] and len(caught) == 1


def test_one_file_named_twice_goes_into_a_folder(tmp_path):
    """Whether the output is a folder depends on what is named, not on how many files that is."""
    a = picture(tmp_path / "in" / "a.png")
    for inputs in ([a, a], [a, a.parent], [a.parent, a], [a.parent]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [job.targets for job in plan(inputs, tmp_path / "out")] == [[tmp_path / "out/a.png"]]
        with pytest.raises(common.BadUsage, match="out.png: is one file for"):
            plan(inputs, tmp_path / "out.png")


def test_a_folder_of_odd_things_is_worked_through(shell, tiny, tmp_path, monkeypatch):
    """A pipe, links to nowhere and to themselves: each a line, and no waiting. One picture goes into a new folder/."""
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in" / "a.png")
    os.mkfifo("in/pipe.png")
    Path("in/self.png").symlink_to("self.png")
    Path("in/gone.png").symlink_to("nowhere.png")
    Path("in/sub.png").mkdir()
    options = (*tiny.options, "--steps", 1)
    ran = shell("upscale", "in", "-o", "out", *options)
    assert ran.code == 1 and os.listdir("out") == ["a.png"]
    assert [line.split(": ")[1:3] for line in ran.err.splitlines()] == [
        ["in/gone.png", "is a link to nowhere.png, which does not exist"],
        ["in/pipe.png", "is not a regular file"],
        ["in/self.png", "is a link to self.png, which does not exist"],
    ]
    assert shell("upscale", "in/a.png", "-o", "new/", *options).code == 0 and os.listdir("new") == ["a.png"]
    for words in (("in/*.jpg", "no file matches"), ("https://host/a.png", "https://host/a.png: is a URL")):
        shell("upscale", words[0], "-o", "x.png", *options).failed(1, words[1])
    for other in ("pipe", "self", "gone"):
        shell("depth", f"in/{other}.png", "-o", "x.png", *options).failed(1, f"in/{other}.png: is ")


def test_a_full_adapter_has_no_degrees(shell, tiny, tmp_path):
    ran = shell("upscale", picture(tmp_path / "in.png"), "-o", tmp_path / "o.png", *tiny.options, "--strength", 0.5)
    ran.failed(2, "error: --strength 0.5: adapter is a full adapter", "use 1")


def test_a_scale_beyond_the_adapter_or_a_tile_off_the_latent_grid_is_wrong_usage(shell, tmp_path):
    tiny, source = make_models(tmp_path, scale=2), picture(tmp_path / "in.png")
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--scale", 4).failed(
        2, "--scale 4", "use at most 2, --adapter upscale-x8, or run twice"
    )
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--tile", 7).failed(2, "--tile 7", "use 6")
    assert not (tmp_path / "o.png").exists()


# --- the other tasks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """The options that name the tiny model and an adapter of each task."""
    root = tmp_path_factory.mktemp("adapters")
    distilled = {"edit": {"text": [1.0, 5.0], "image": [1.0, 2.0]}, "generate": {"text": [1.0, 5.0]}}
    return {
        task: Models(tiny.model, make_adapter(root / task, task, distilled.get(task))).options
        for task in ("inpaint", "depth", "canny", "edit", "generate")
    }


def told(path: Path) -> dict[str, str]:
    """What a picture's metadata say of how it was made."""
    with Image.open(path) as made:
        return {key.removeprefix("codi "): value for key, value in made.text.items()}  # type: ignore[attr-defined]


def mask_file(path: Path, width: int = 22, height: int = 15) -> Path:
    """White on the right half."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("task", "words", "notes"),
    [
        ("inpaint", ["in.png", "--mask", "mask.png", "--prompt", "a ball"], {"prompt": "a ball", "guidance": "1"}),
        ("depth", ["in.png", "--near", "bright", "--prompt", "a ball"], {"prompt": "a ball", "near": "bright"}),
        ("canny", ["in.png", "--prompt", "a ball", "--low", "20"], {"prompt": "a ball", "low": "20", "high": "200"}),
        ("edit", ["in.png", "--instruction", "blue", "--guidance", "2", "--image-guidance", "1.5"],
         {"instruction": "blue", "guidance": "2", "image guidance": "1.5"}),
        ("generate", ["--prompt", "a ball", "--size", "24x16"], {"prompt": "a ball", "guidance": "1"}),
    ],
)  # fmt: skip
def test_each_task_from_file_to_file(shell, adapters, tmp_path, monkeypatch, task, words, notes):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in.png", 22, 15, mode="L" if task == "depth" else "RGB")
    mask_file(tmp_path / "mask.png")
    options = (*words, *adapters[task], "--steps", 2, "--seed", 3, "--strength", 0.5, "--json")
    ran = shell(task, *options, "-o", "new/out.png", "--count", 2)
    assert (ran.code, ran.err) == (0, "")
    size = (24, 16) if task == "generate" else (22, 15)
    rows = json.loads(ran.out)
    assert [{**row, "seconds": 0} for row in rows] == [
        {"input": None if task == "generate" else "in.png", "output": f"new/out-{k}.png", "width": size[0],
         "height": size[1], "seconds": 0, "seed": 3 + k, "steps": 2,
         "model": adapters[task][1], "adapter": adapters[task][3]}
        for k in range(2)
    ]  # fmt: skip
    made = [Image.open(tmp_path / "new" / f"out-{k}.png") for k in range(2)]
    assert [(one.size, one.mode) for one in made] == [(size, "RGB")] * 2
    first = told(tmp_path / "new" / "out-0.png")
    expected = {"task": task, "adapter": task, "model": "model", "steps": "2", "seed": "3", "strength": "0.5", **notes}
    assert first.items() >= expected.items() and first["Software"].startswith("codi ")
    assert shell(task, *options, "-o", "alone.png", "--seed", 4).code == 0
    alone = np.asarray(Image.open("alone.png"), float)
    assert np.abs(np.asarray(made[1], float) - alone).max() <= 1  # batched convolutions may round another way
    assert np.abs(np.asarray(made[0], float) - alone).max() > 1
    ran = shell(task, *[w for w in words if w not in ("--prompt", "a ball")], *adapters[task], "-o", ".", "--steps", 1)
    if task == "generate":  # a folder is taken for one, and no prompt is a prompt too
        assert ran.code == 0 and told(tmp_path / "generated.png")["prompt"] == ""
    else:
        ran.failed(1, "in.png: exists already")


@pytest.mark.parametrize("kind", ["L", "RGBA", "deep", "deep grey"])
def test_inpainting_gives_known_pixels_back_exactly(shell, adapters, tmp_path, kind):
    source, out, draw = tmp_path / "in.png", tmp_path / "out.png", np.random.default_rng(0)
    if kind.startswith("deep"):
        shape = (61, 70) if "grey" in kind else (61, 70, 3)
        cv2.imwrite(str(source), draw.integers(0, 65536, shape, dtype=np.uint16))
    else:
        picture(source, 70, 61, mode=kind)  # larger than the backbone's 32 px, and no whole latent cells
    mask = mask_file(tmp_path / "mask.png", 70, 61)
    ran = shell("inpaint", source, "--mask", mask, "-o", out, *adapters["inpaint"], "--steps", 1)
    assert (ran.code, ran.err) == (0, "")
    before, after = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (source, out))
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert np.array_equal(after[:, :35], before[:, :35]) and not np.array_equal(after[:, 35:], before[:, 35:])
    if kind == "RGBA":
        assert (after[:, 35:, 3] == 255).all()


def test_a_lossy_file_is_a_warning(shell, adapters, tmp_path):
    source, mask = picture(tmp_path / "in.png", 22, 15), mask_file(tmp_path / "mask.png", 44, 30)  # scaled to fit
    command = ("inpaint", source, "--mask", mask, *adapters["inpaint"], "--steps", 1)
    ran = shell(*command, "-o", tmp_path / "out.jpg")
    assert ran.code == 0 and ran.err.startswith("warning: ") and ran.err.count("\n") == 1 and ".png keeps" in ran.err


def test_depth_maps_of_several_kinds_make_the_same_picture(shell, adapters, tmp_path):
    distance = np.linspace(9, 2, 20)[:, None].repeat(16, 1)
    nearness = (1 / distance - 1 / 9) / (1 / 2 - 1 / 9)
    np.save(tmp_path / "metres.npy", distance)
    np.save(tmp_path / "near.npy", 7 * nearness + 3)
    cv2.imwrite(str(tmp_path / "mm.png"), (1000 * distance).round().astype(np.uint16))
    made = {}
    for name, near in (("metres.npy", "dark"), ("near.npy", "bright"), ("mm.png", "dark")):
        out = tmp_path / f"{name}.png"
        ran = shell("depth", tmp_path / name, "-o", out, "--near", near, *adapters["depth"], "--steps", 1)
        assert (ran.code, ran.err) == (0, "")
        made[name] = np.asarray(Image.open(out), float)
    assert all(np.abs(one - made["metres.npy"]).max() <= 2 for one in made.values())
    ran = shell("depth", tmp_path / "mm.png", "-o", tmp_path / "guess.png", *adapters["depth"], "--steps", 1)
    assert ran.code == 0 and ran.err.startswith("warning: ") and "--near" in ran.err and ran.err.count("\n") == 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "guess.png"), float), made["mm.png"])


def test_depth_of_a_photo_is_estimated(shell, adapters, tmp_path, monkeypatch):
    seen = []

    def estimate(photo, model, device):
        seen.append((tuple(photo.shape), model, device))
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
    assert seen == [((3, 15, 22), "some/model", "cpu")]
    shell(*command, "--near", "dark").failed(2, "--near dark", "--from-image")


def test_edges_are_found_or_given(shell, adapters, tmp_path):
    from codi.data.images import read_image
    from codi.tasks.canny import edges

    shape = np.zeros((24, 24, 3), np.uint8)
    shape[6:18, 6:18] = 60  # a gradient of 240
    Image.fromarray(shape).save(tmp_path / "photo.png")
    found = edges(read_image(tmp_path / "photo.png").rgb[None], 100, 200)[0, 0].numpy()
    Image.fromarray((found * 255).astype(np.uint8)).save(tmp_path / "edges.png")
    options = (*adapters["canny"], "--steps", 1)
    assert shell("canny", tmp_path / "photo.png", "-o", tmp_path / "a.png", *options).code == 0
    assert shell("canny", tmp_path / "edges.png", "--edges", "-o", tmp_path / "b.png", *options).code == 0
    assert (
        shell("canny", tmp_path / "photo.png", "--high", 255, "--low", 255, "-o", tmp_path / "c.png", *options).code
        == 0
    )
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in "abc")
    assert np.array_equal(a, b) and "low" not in told(tmp_path / "b.png") and (a != c).any()
    assert "low" in told(tmp_path / "a.png") and "jitter" not in told(tmp_path / "a.png")
    clear = np.dstack([np.full((24, 24, 3), 255), found * 255]).astype(np.uint8)  # white lines on a clear ground
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert shell("canny", tmp_path / "clear.png", "--edges", "-o", tmp_path / "d.png", *options).err == ""
    assert np.array_equal(np.asarray(Image.open(tmp_path / "d.png"), int), b)
    Image.new("L", (24, 24), 255).save(tmp_path / "white.png")
    ran = shell("canny", tmp_path / "white.png", "--edges", "-o", tmp_path / "e.png", *options)
    assert ran.code == 0 and "mostly white" in ran.err and ran.err.count("\n") == 1


def test_guidance_beyond_what_is_distilled_is_a_warning(shell, adapters, tmp_path):
    command = ("generate", "--prompt", "a ball", *adapters["generate"], "--steps", 1)
    ran = shell(*command, "-o", tmp_path / "a.png", "--guidance", 9)
    assert ran.code == 0 and ran.err.splitlines() == [
        "warning: guidance of the text 9: 1 to 5 is distilled into this adapter: using 5"
    ]
    assert told(tmp_path / "a.png")["guidance"] == "5"


def test_sizes():
    assert generate.parse_size("512x384") == (512, 384) and generate.parse_size(None) == (None, None)
    for wrong in ("", "512", "0x8", "8x", "axb", "-8x8", "8x8x8", "999999x8"):
        with pytest.raises(common.BadUsage, match="--size"):
            generate.parse_size(wrong)
