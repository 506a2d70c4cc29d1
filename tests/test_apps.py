"""The command line: startup, and output of the commands on models, data, training and evaluation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import codi
from codi.apps import cli, common, evaluate
from codi.apps import models as embedded
from codi.training.checkpoint import complete
from shell import Models, make_adapter, picture

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "demo", "upscale", "inpaint", "depth", "canny", "edit", "generate", "distill", "pretrain",
    "distill-decoder", "evaluate", "models", "benchmark", "export", "data render", "data check",
)  # fmt: skip


# --- the package and its start ---------------------------------------------------------------------------------------


def test_importing_codi_or_its_shell_does_not_import_torch():
    code = "import codi, codi.apps.cli, sys; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_python_m_codi_runs_the_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "codi"]
    ran = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"codi {codi.__version__}\n", "")
    ran = subprocess.run([*command, "uspcale"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1


def test_package_exports_its_public_names():
    assert codi.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert codi.CoDiPipeline.__name__ == "CoDiPipeline"
    assert set(codi.__all__) <= set(dir(codi))
    with pytest.raises(AttributeError, match="no attribute 'CoDiPipe'"):
        codi.CoDiPipe  # noqa: B018


def test_source_distribution_includes_what_tests_import():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["sdist"]["include"]
    assert all((ROOT / path.lstrip("/")).exists() for path in included)
    assert {"/src", "/tests", "/benchmarks", "/gpu"} <= set(included)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(shell, command):
    ran = shell(*command.split(), "--help")
    assert ran.code == 0 and not ran.err
    assert f"Example: codi {command}" in " ".join(ran.out.split())


def test_every_command_is_tested():
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert {c for c in COMMANDS if " " not in c} == names


# --- models, data, training, evaluation ------------------------------------------------------------------------------


def test_models_lists_embedded_models_and_adapters(shell, tiny, tmp_path, monkeypatch):
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
    rows[1]["name"] = "[red]:smile:"
    assert "[red]:smile:" in shell("models").out


def test_rendered_scenes_pass_data_check(shell, tmp_path):
    ran = shell("data", "render", 6, "-o", tmp_path / "scenes", "--size", 32, "--no-edits", "--json")
    assert ran.code == 0 and json.loads(ran.out)["count"] == 6
    repeated = shell("data", "render", 6, "-o", tmp_path / "scenes", "--size", 32)
    repeated.failed(1, "not empty", "--overwrite")
    options = ("--task", "upscale", "--size", 32, "--sheet", tmp_path / "sheet.png", "--json")
    ran = shell("data", "check", tmp_path / "scenes", *options)
    report = json.loads(ran.out)
    assert (ran.code, report["images"], report["captions_missing"], report["faults"]) == (0, 6, 0, [])
    assert Image.open(tmp_path / "sheet.png").width > 6 * 32


def test_data_check_fails_if_training_would(shell, tmp_path):
    for k in range(20):
        picture(tmp_path / "in" / f"{k:02}.png")
    for k in (3, 5):
        (tmp_path / "in" / f"{k:02}.png").write_bytes(b"not a picture")
    ran = shell("data", "check", tmp_path / "in", "--size", 32)
    ran.failed(1, "2 of 20 files are corrupt")
    assert "corrupt: 03.png" in ran.out and "20 smaller" not in ran.out and "18 smaller" in ran.out
    assert shell("data", "check", tmp_path / "in", "--size", 32, "--max-corrupt", 0.1).code == 0


def recipe(folder: Path, tiny: Models, **changes: object) -> Path:
    """Write a recipe file for a run of a few seconds."""
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


def test_distill_stops_at_a_time_limit_resumes_and_is_evaluated(shell, tiny, tmp_path, monkeypatch):
    path = recipe(tmp_path, tiny)
    ran = shell("distill", path, "--images", 100_000, "--minutes", 0.01)
    assert (ran.code, ran.err) == (0, "") and "the same command resumes" in ran.out
    reached = int(re.search(r"stopped after ([\d,]+) of 100,000", ran.out)[1].replace(",", ""))
    ran = shell("distill", path, "--images", reached + 4, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    result = json.loads(ran.out)
    assert (result["finished"], result["images"], result["of"]) == (True, reached + 4, reached + 4)
    assert set(result["metrics"]) == {"obedience_1", "obedience_2", "obedience_4"}

    monkeypatch.setattr(evaluate, "MANY_STEPS", (1, 3))
    figures = tmp_path / "figures.json"
    options = ("--steps", "1,2", "--finetuned", tmp_path / "run", "--count", 2, "--out", figures, "--json")
    ran = shell("evaluate", path, "--adapter", tiny.adapter, *options, "--sheet", tmp_path / "sheet.png")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert {key: result[key] for key in ("task", "count", "seed")} == {"task": "upscale", "count": 2, "seed": 0}
    assert [(row["method"], row["steps"]) for row in result["rows"]] == [
        ("bicubic", 0), ("codi-tuned", 1), ("codi-tuned", 2), *(("codi-tuned (run)", n) for n in (1, 3)),
    ]  # fmt: skip
    assert {"psnr", "ssim", "distance", "fd", "obedience", "latency_ms"} <= set(result["rows"][0])
    assert json.loads(figures.read_text()) == result and (tmp_path / "sheet.png").is_file()


def test_ctrl_c_in_training_saves_a_checkpoint(shell, tiny, tmp_path, monkeypatch):
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
    calls = []

    def pretrain(recipe, quiet, minutes):
        calls.append((recipe, quiet, minutes))
        return Path(recipe.out)

    monkeypatch.setattr("codi.training.pretrain.pretrain", pretrain)
    ran = shell("pretrain", "mini", "--out", tmp_path, "--ldm-images", 500, "--minutes", 2)
    assert ran.code == 0 and "0 of 500 images" in ran.out
    settings, quiet, minutes = calls[0]
    assert (settings.ldm_images, settings.out, quiet, minutes) == (500, str(tmp_path), True, 2)
    assert "--ldm-images" in shell("pretrain", "--keys").out
    assert re.search(r"--max-corrupt 0.05\n +Largest share of unreadable files", shell("distill", "--keys").out)


def test_evaluate_reads_the_columns_of_the_adapters_task(shell, tiny, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "inpaint", masks=["objects"])
    options = ("--model", tiny.model, "--adapter", adapter, "--data", "scenes:held-out:2", "--size", 32)
    ran = shell("evaluate", "--task", "inpaint", *options, "--steps", 1, "--device", "cpu", "--json")
    assert (ran.code, ran.err) == (0, "")
    row = json.loads(ran.out)["rows"][0]
    assert row["obedience"] == row["measures"]["hole_psnr"] < 40


def test_library_verbosity_is_set_to_errors(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with common.quiet_libraries():
        assert {os.environ[f"{name}_VERBOSITY"] for name in ("HF_HUB", "DIFFUSERS", "TRANSFORMERS")} == {"error"}


def test_step_counts_are_parsed():
    assert common.parse_steps("4, 1,4") == (4, 1)
    for wrong in ("", "0", "1,x", "-1", "1001", "1.5"):
        with pytest.raises(common.BadUsage):
            common.parse_steps(wrong)
