"""Several models in one package: whose adapters go by their names, and which model a command takes by itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import codi.models.adapter_files as adapter_files
import codi.models.backbones.loading as loading
from codi.apps import evaluate
from codi.apps.models import embedded
from codi.apps.show import Show
from codi.errors import UserError
from codi.models.adapter_files import default_model, find_adapter
from codi.models.backbones import digest, load_backbone
from codi.sampling.pipeline import CoDiPipeline
from codi.training.distill import DistillRecipe, distill
from codi.training.dry_run import dry_run
from folders import refused
from shell import make_adapter, picture
from tiny import tiny_checkpoint


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A package's weights: mini with upscale and edit, photo with an upscale of its own and no more."""
    folder = tmp_path / "weights"
    tiny_checkpoint(folder / "mini")
    tiny_checkpoint(folder / "photo", seed=1)
    make_adapter(folder / "adapters" / "upscale", "upscale")
    make_adapter(folder / "adapters" / "edit", "edit")
    make_adapter(folder / "photo" / "adapters" / "upscale", "upscale", degradation="bicubic")
    for module in (adapter_files, loading):
        monkeypatch.setattr(module, "EMBEDDED", folder)
    return folder


def test_a_model_s_own_adapters_come_first(weights, tmp_path):
    own = tiny_checkpoint(tmp_path / "own")
    assert find_adapter("upscale", "mini") == weights / "adapters" / "upscale"
    assert find_adapter("upscale", "photo") == weights / "photo" / "adapters" / "upscale"
    assert find_adapter("upscale", own) == weights / "adapters" / "upscale"  # it may be a fine-tune of mini
    make_adapter(own / "adapters" / "upscale", "upscale")
    assert find_adapter("upscale", own) == own / "adapters" / "upscale"
    assert find_adapter("edit", own) == weights / "adapters" / "edit"
    pipe = CoDiPipeline.from_pretrained("photo", task="upscale")
    assert pipe.task.degradation == "bicubic" and pipe.adapters == ["upscale"]
    refused(lambda: CoDiPipeline.from_pretrained("photo", task="edit"), "edit", "one of upscale")


def test_the_default_model_is_photo_where_it_has_the_adapter(weights, tmp_path):
    assert default_model("upscale") == "photo"
    assert default_model("edit") == default_model("inpaint") == default_model("upscale-x8") == "mini"
    mine = made_on("photo", tmp_path / "mine")
    assert default_model(mine) == default_model(str(mine)) == "photo"
    assert default_model(made_on("mini", mine)) == "mini"
    (mine / "config.json").write_text("[]")
    assert default_model(mine) == "mini"


def made_on(model: str, folder: Path) -> Path:
    """An adapter's folder that says that it was trained on `model`."""
    config = make_adapter(folder, "upscale") / "config.json"
    notes = json.loads(config.read_text())
    notes["info"]["recipe"]["model"] = model
    config.write_text(json.dumps(notes))
    return folder


def test_a_command_says_which_model_it_used(weights, shell, tmp_path):
    given = picture(tmp_path / "in.png", 12, 8)
    ran = shell("upscale", given, "-o", tmp_path / "a.png", "--steps", 1)
    assert ran.code == 0 and ran.out.rstrip().endswith("by photo")
    ran = shell("upscale", given, "-o", tmp_path / "b.png", "--steps", 1, "--model", "mini", "--json")
    assert [(row["model"], row["adapter"]) for row in json.loads(ran.out)] == [("mini", "upscale")]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_list_of_what_is_embedded_tells_models_apart(weights):
    rows = {(row["model"], row["name"]): row for row in embedded(weights)}
    adapters = [key for key, row in rows.items() if row["kind"] == "adapter"]
    assert adapters == [("mini", "edit"), ("mini", "upscale"), ("photo", "upscale")]
    assert abs(rows["photo", "photo"]["bytes"] / rows["mini", "mini"]["bytes"] - 1) < 0.01  # without its adapters


@pytest.mark.parametrize("to", ["diffusers", "ldm", "onnx"])
def test_export_takes_the_adapter_and_the_weights_of_the_model(weights, shell, tmp_path, monkeypatch, to):
    """An adapter of a name that mini has too, by default the one that `codi upscale` uses; a folder says its model."""
    sources = []

    def written(source, *_):
        sources.append((source.model, source.loaded.folder))
        return {}

    name = {"diffusers": "diffusers.export_diffusers", "ldm": "ldm.export_ldm", "onnx": "onnx.export_onnx"}[to]
    monkeypatch.setattr(f"codi.export.{name}", written)
    mine = made_on("photo", tmp_path / "mine")
    own, minis = weights / "photo" / "adapters" / "upscale", weights / "adapters" / "upscale"
    for given, options, expected in (
        ("upscale", ("--model", "photo"), ("photo", own)),
        ("upscale", ("--model", "mini"), ("mini", minis)),
        ("upscale", (), ("photo", own)),
        (mine, (), ("photo", mine)),
        ("edit", (), ("mini", weights / "adapters" / "edit")),
    ):
        ran = shell(
            "export", given, "--to", to, "-o", tmp_path / "out.safetensors"[: 15 if to == "ldm" else 3], *options
        )
        assert ran.code == 0 and sources.pop() == expected
    ran = shell("export", "edit", "--to", "diffusers", "-o", tmp_path / "out", "--model", "photo")
    ran.failed(1, "edit", "no adapter there", "one of")


def test_evaluate_takes_the_adapter_and_the_weights_of_the_model(weights, shell, tmp_path, monkeypatch):
    loaded = []

    def load(model, task, adapter, *_):
        loaded.append((model, str(adapter)))
        raise UserError("far enough")

    monkeypatch.setattr("codi.apps.evaluate.load_pipeline", load)
    mine = made_on("photo", tmp_path / "mine")
    for options, expected in (
        ((), ("photo", "upscale")),
        (("--model", "mini"), ("mini", "upscale")),
        (("--adapter", mine), ("photo", str(mine))),
        (("--adapter", "upscale-x8"), ("mini", "upscale-x8")),
    ):
        shell("evaluate", "--task", "upscale", *options).failed(1, "far enough")
        assert loaded.pop() == expected
    mixed = ("--adapter", "upscale", "--adapter", "upscale-x8")
    shell("evaluate", "--task", "upscale", *mixed).failed(2, "of different models: name one with --model")
    own = tmp_path / "run.yaml"
    own.write_text(f"task: upscale\nmodel: photo\ndata: scenes:train:4\nheld_out: scenes:held-out:2\nout: {mine}\n")
    for options, expected in (((), "photo"), (("--model", "mini"), "mini")):
        shell("evaluate", own, *options).failed(1, "far enough")
        assert loaded.pop() == (expected, str(mine))


def test_evaluate_compares_with_the_fine_tuned_adapter_of_the_model(weights):
    pipe = CoDiPipeline.from_pretrained("photo", task="upscale")
    make_adapter(weights / "adapters" / "upscale-finetuned", "upscale")
    assert evaluate._reference("upscale", None, pipe, "mini") == "upscale-finetuned"
    assert evaluate._reference("upscale", None, pipe, "photo") is None
    make_adapter(weights / "photo" / "adapters" / "upscale-finetuned", "upscale")
    assert evaluate._reference("upscale", None, pipe, "photo") == "upscale-finetuned"


def test_training_starts_from_an_adapter_of_its_model(weights, tmp_path):
    """By a name that mini has too: `start` and `teacher`, in a training and in its dry run."""
    (weights / "adapters" / "upscale" / "config.json").write_text("[]")
    recipe = DistillRecipe(
        task="upscale", degradation="bicubic", model="photo", start="upscale", teacher="upscale",
        objective="consistency", data="scenes:train:4", held_out="scenes:held-out:2", size=32, batch_size=2, images=2,
        train_backbone=False, out=str(tmp_path / "run"), device="cpu", checkpoint_every=2, preview_every=2,
    )  # fmt: skip
    dry_run(recipe)
    distill(recipe, quiet=True)
    refused(lambda: dry_run(replace(recipe, model="mini")), "config.json", "not an adapter's config")
    config = weights / "photo" / "adapters" / "upscale" / "config.json"
    values = json.loads(config.read_text())
    values["info"]["backbone"] = digest(load_backbone("photo").network)
    config.write_text(json.dumps(values))
    copy = shutil.copytree(weights / "photo", tmp_path / "copy", ignore=shutil.ignore_patterns("adapters"))
    distill(replace(recipe, model=str(copy), out=str(tmp_path / "of-a-copy")), quiet=True)


def test_the_demo_page_s_commands_name_the_model(weights, tmp_path):
    """Where it is not the one that the command takes by itself."""
    pipe = CoDiPipeline.from_pretrained("mini")
    show = Show(pipe, tmp_path, 0, "mini", None, None)
    assert show._options("upscale") == ["--model", "mini"] and show._options("edit") == []
    show.model = "photo"
    assert show._options("upscale") == [] and show._options("edit") == ["--model", "photo"]
