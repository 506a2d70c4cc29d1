"""The shell: what each command writes and prints, and that it starts fast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import codi
from codi.apps import cli, common, demo, evaluate
from codi.apps import models as embedded
from codi.apps.upscale import plan
from codi.errors import UserError
from codi.training.checkpoint import complete
from shell import Models, Shell, make_models, picture

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "upscale", "distill", "pretrain", "evaluate", "models", "data render", "data check")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def shell(capsys) -> Shell:
    return Shell(capsys)


# --- the package and its start ---------------------------------------------------------------------------------------


def test_importing_codi_or_its_shell_does_not_import_torch():
    code = "import codi, codi.apps.cli, sys; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_python_dash_m_is_the_same_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "codi"]
    ran = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"codi {codi.__version__}\n", "")
    ran = subprocess.run([*command, "uspcale"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1


def test_names_of_the_package():
    assert codi.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert codi.CoDiPipeline.__name__ == "CoDiPipeline"
    assert set(codi.__all__) <= set(dir(codi))
    with pytest.raises(AttributeError, match="no attribute 'CoDiPipe'"):
        codi.CoDiPipe  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(shell, command):
    ran = shell(*command.split(), "--help")
    assert ran.code == 0 and not ran.err
    assert f"Example: codi {command}" in " ".join(ran.out.split())


def test_every_command_is_known_to_the_tests():
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert {c for c in COMMANDS if " " not in c} == names


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
    assert [set(row) for row in rows] == [{"input", "output", "width", "height", "seconds", "seed", "steps"}] * 4
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


def test_large_pictures_are_cut_into_tiles_and_smaller_scales_are_reached(shell, tiny, tmp_path):
    source = picture(tmp_path / "in.png", 21, 13)
    ran = shell("upscale", source, "-o", tmp_path / "out.png", *tiny.options, "--tile", 8, "--scale", 2, "--steps", 1)
    assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "out.png").size == (42, 26)


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
    with pytest.raises(UserError, match="written there too"):
        plan([a, picture(tmp_path / "a.jpg")], tmp_path / "p")
    with pytest.raises(common.BadUsage, match="one file for 2 pictures"):
        plan([a, b], tmp_path / "d.png")


def test_a_scale_beyond_the_adapter_or_a_tile_off_the_latent_grid_is_wrong_usage(shell, tmp_path):
    tiny, source = make_models(tmp_path, scale=2), picture(tmp_path / "in.png")
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--scale", 4).failed(2, "--scale 4", "at most 2")
    shell("upscale", source, "-o", tmp_path / "o.png", *tiny.options, "--tile", 7).failed(2, "--tile 7", "use 6")
    assert not (tmp_path / "o.png").exists()


# --- models, data, training, evaluation ------------------------------------------------------------------------------


def test_models_lists_what_is_embedded(shell, tiny, tmp_path, monkeypatch):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "mini").symlink_to(tiny.model)
    (tmp_path / "adapters" / "upscale").symlink_to(tiny.adapter)
    rows = embedded.embedded(tmp_path)
    assert [(row["name"], row["kind"], row["task"], row["steps"]) for row in rows] == [
        ("mini", "model", None, None),
        ("upscale", "adapter", "upscale", [1, 2, 4]),
    ]
    assert all(row["bytes"] > 1000 and row["licence"] == "Apache-2.0" and Path(row["path"]).is_dir() for row in rows)
    monkeypatch.setattr(embedded, "embedded", lambda: rows)
    assert json.loads(shell("models", "--json").out) == rows
    assert "upscale" in shell("models").out


def test_rendered_scenes_pass_the_check(shell, tmp_path):
    ran = shell("data", "render", 6, "-o", tmp_path / "scenes", "--size", 32, "--no-edits", "--json")
    assert ran.code == 0 and json.loads(ran.out)["count"] == 6
    again = shell("data", "render", 6, "-o", tmp_path / "scenes", "--size", 32)
    again.failed(1, "not empty", "--overwrite")
    options = ("--task", "upscale", "--size", 32, "--sheet", tmp_path / "sheet.png", "--json")
    ran = shell("data", "check", tmp_path / "scenes", *options)
    told = json.loads(ran.out)
    assert (ran.code, told["images"], told["captions_missing"], told["faults"]) == (0, 6, 0, [])
    assert Image.open(tmp_path / "sheet.png").width > 6 * 32


def test_the_check_fails_where_training_would(shell, tmp_path):
    for k in range(20):
        picture(tmp_path / "in" / f"{k:02}.png")
    for k in (3, 5):
        (tmp_path / "in" / f"{k:02}.png").write_bytes(b"not a picture")
    ran = shell("data", "check", tmp_path / "in", "--size", 32)
    ran.failed(1, "2 of 20 files are corrupt")
    assert "corrupt: 03.png" in ran.out and "20 smaller" not in ran.out and "18 smaller" in ran.out
    assert shell("data", "check", tmp_path / "in", "--size", 32, "--max-corrupt", 0.1).code == 0


def recipe(folder: Path, tiny: Models, **changes: object) -> Path:
    """A recipe file for a run of seconds."""
    for k in range(6):
        picture(folder / "pictures" / f"{k}.png", 40, 40, seed=k)
    keys = {
        "out": folder / "run", "model": tiny.model, "data": folder / "pictures", "held_out": folder / "pictures",
        "size": 32, "images": 8, "batch_size": 2, "warmup": 2, "log_every": 2, "preview_every": 100,
        "checkpoint_every": 4, "device": "cpu", "degradation": "bicubic", "learning_rate": 0.001, **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


def test_distil_stop_resume_and_measure(shell, tiny, tmp_path):
    path = recipe(tmp_path, tiny)
    ran = shell("distill", path, "--images", 100_000, "--minutes", 0.01)
    assert (ran.code, ran.err) == (0, "") and "goes on" in ran.out
    reached = int(re.search(r"stopped after ([\d,]+) of 100,000", ran.out)[1].replace(",", ""))
    ran = shell("distill", path, "--images", reached + 4, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    told = json.loads(ran.out)
    assert (told["finished"], told["images"], told["of"]) == (True, reached + 4, reached + 4)
    assert set(told["metrics"]) == {"obedience_1", "obedience_2", "obedience_4"}

    figures = tmp_path / "figures.json"
    options = ("--steps", "1,2", "--finetuned", tmp_path / "run", "--count", 2, "--out", figures, "--json")
    ran = shell("evaluate", path, "--adapter", tiny.adapter, *options, "--sheet", tmp_path / "sheet.png")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert {key: told[key] for key in ("task", "count", "seed")} == {"task": "upscale", "count": 2, "seed": 0}
    assert [(row["method"], row["steps"]) for row in told["rows"]] == [
        ("bicubic", 0), ("codi", 1), ("codi", 2), *(("codi (run)", n) for n in (1, 2, 4, 50)),
    ]  # fmt: skip
    assert {"psnr", "ssim", "distance", "fd", "obedience", "latency_ms"} <= set(told["rows"][0])
    assert json.loads(figures.read_text()) == told and (tmp_path / "sheet.png").is_file()


def test_ctrl_c_in_a_training_leaves_a_checkpoint_and_says_so(shell, tiny, tmp_path, monkeypatch):
    from codi.training.distill import DistillJob

    forward = DistillJob.forward

    def interrupted(self, batch, generator):
        os.kill(os.getpid(), 2)
        return forward(self, batch, generator)

    monkeypatch.setattr(DistillJob, "forward", interrupted)
    ran = shell("distill", recipe(tmp_path, tiny))
    ran.failed(130, "interrupted")
    assert "stopped after 2 of 8 images" in ran.out
    assert complete(tmp_path / "run" / "checkpoints")


def test_pretrain_reads_its_recipe(shell, tmp_path, monkeypatch):
    seen = []

    def pretrain(recipe, quiet, minutes):
        seen.append((recipe, quiet, minutes))
        return Path(recipe.out)

    monkeypatch.setattr("codi.training.pretrain.pretrain", pretrain)
    ran = shell("pretrain", "mini", "--out", tmp_path, "--ldm-images", 500, "--minutes", 2)
    assert ran.code == 0 and "0 of 500 images" in ran.out
    settings, quiet, minutes = seen[0]
    assert (settings.ldm_images, settings.out, quiet, minutes) == (500, str(tmp_path), True, 2)
    assert "--ldm-images" in shell("pretrain", "--keys").out
    assert re.search(r"--max-corrupt 0.05\n +Share of unreadable files", shell("distill", "--keys").out)


def test_step_counts():
    assert evaluate.parse_steps("4, 1,4") == (4, 1)
    for wrong in ("", "0", "1,x", "-1", "1001", "1.5"):
        with pytest.raises(common.BadUsage):
            evaluate.parse_steps(wrong)


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_tour_writes_a_page_whose_links_all_exist_and_can_be_repeated(shell, tiny, tmp_path):
    out = tmp_path / "demo"
    pipe = common.load_pipeline(str(tiny.model), "upscale", tiny.adapter, "cpu")
    changes = {"images": 16, "batch_size": 4, "data": "scenes:train:8", "log_every": 4, "preview_every": 8}
    for _ in range(2):
        told = demo.tour(
            pipe, out, model=str(tiny.model), device="cpu", scenes=2, photographs=("coffee",), changes=changes
        )
    assert told == json.loads((out / "timings.json").read_text())
    assert told["pictures"] == 3 and set(told["upscale_ms"]) == {"1", "2", "4"}
    assert [(row["group"], row["steps"]) for row in told["figures"]] == [
        (group, steps) for group in ("scenes", "photographs") for steps in (0, 1, 2, 4)
    ]
    assert told["training"]["images"] == 16 and len(told["training"]["curve"]) == 4
    page = (out / "index.html").read_text()
    links = set(re.findall(r'src="([^"]+)"', page))
    assert len(links) > 18 and all((out / link).is_file() for link in links)
    assert "http" not in page and "$" not in page
    assert Image.open(out / "truth" / "coffee.png").size == (96, 96)
    assert Image.open(out / "steps-4" / "coffee.png").size == (96, 96)
    assert Image.open(out / "input" / "scene-0.png").size == (8, 8)
    assert (out / "scenes.png").is_file() and (out / "photographs.png").is_file()


def test_the_tour_without_scikit_image_says_so_and_shows_eight_scenes(shell, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    ran = shell("demo", "--out", tmp_path / "demo", "--minutes", 0, *tiny.options, "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["pictures"] == 8 and "scikit-image" in told["note"] and told["training"] is None
    assert "scikit-image" in (tmp_path / "demo" / "index.html").read_text()
