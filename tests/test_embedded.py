"""Several embedded models: which adapters their names mean, and the default model of a command."""

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
    """An embedded-weights folder: mini with adapters upscale and edit, photo with its own upscale."""
    folder = tmp_path / "weights"
    tiny_checkpoint(folder / "mini")
    tiny_checkpoint(folder / "photo", seed=1)
    make_adapter(folder / "adapters" / "upscale", "upscale")
    make_adapter(folder / "adapters" / "edit", "edit")
    make_adapter(folder / "photo" / "adapters" / "upscale", "upscale", degradation="bicubic")
    for module in (adapter_files, loading):
        monkeypatch.setattr(module, "EMBEDDED", folder)
    return folder


def test_adapters_of_the_model_take_precedence(weights, tmp_path):
    model = tiny_checkpoint(tmp_path / "own")
    assert find_adapter("upscale", "mini") == weights / "adapters" / "upscale"
    assert find_adapter("upscale", "photo") == weights / "photo" / "adapters" / "upscale"
    assert find_adapter("upscale", model) == weights / "adapters" / "upscale"  # it may be a fine-tune of mini
    make_adapter(model / "adapters" / "upscale", "upscale")
    assert find_adapter("upscale", model) == model / "adapters" / "upscale"
    assert find_adapter("edit", model) == weights / "adapters" / "edit"
    pipe = CoDiPipeline.from_pretrained("photo", task="upscale")
    assert pipe.task.degradation == "bicubic" and pipe.adapters == ["upscale"]
    refused(lambda: CoDiPipeline.from_pretrained("photo", task="edit"), "edit", "one of upscale")


def test_default_model_is_photo_if_it_has_the_adapter(weights, tmp_path):
    assert default_model("upscale") == "photo"
    assert default_model("edit") == default_model("inpaint") == default_model("upscale-x8") == "mini"
    trained = adapter_trained_on("photo", tmp_path / "mine")
    assert default_model(trained) == default_model(str(trained)) == "photo"
    assert default_model(adapter_trained_on("mini", trained)) == "mini"
    (trained / "config.json").write_text("[]")
    assert default_model(trained) == "mini"


def adapter_trained_on(model: str, folder: Path) -> Path:
    """Write an adapter whose recipe names `model`."""
    config = make_adapter(folder, "upscale") / "config.json"
    values = json.loads(config.read_text())
    values["info"]["recipe"]["model"] = model
    config.write_text(json.dumps(values))
    return folder


def test_command_prints_the_model_it_used(weights, shell, tmp_path):
    image = picture(tmp_path / "in.png", 12, 8)
    ran = shell("upscale", image, "-o", tmp_path / "a.png", "--steps", 1)
    assert ran.code == 0 and ran.out.rstrip().endswith("by photo")
    ran = shell("upscale", image, "-o", tmp_path / "b.png", "--steps", 1, "--model", "mini", "--json")
    assert [(row["model"], row["adapter"]) for row in json.loads(ran.out)] == [("mini", "upscale")]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_list_of_embedded_adapters_names_their_models(weights):
    rows = {(row["model"], row["name"]): row for row in embedded(weights)}
    adapters = [key for key, row in rows.items() if row["kind"] == "adapter"]
    assert adapters == [("mini", "edit"), ("mini", "upscale"), ("photo", "upscale")]
    assert abs(rows["photo", "photo"]["bytes"] / rows["mini", "mini"]["bytes"] - 1) < 0.01  # without its adapters


@pytest.mark.parametrize("to", ["diffusers", "ldm", "onnx"])
def test_export_uses_the_models_adapter_and_weights(weights, shell, tmp_path, monkeypatch, to):
    """For a name that both models have, the default is that of `codi upscale`; a folder's config names its model."""
    sources = []

    def written(source, *_):
        sources.append((source.model, source.loaded.folder))
        return {}

    name = {"diffusers": "diffusers.export_diffusers", "ldm": "ldm.export_ldm", "onnx": "onnx.export_onnx"}[to]
    monkeypatch.setattr(f"codi.export.{name}", written)
    trained = adapter_trained_on("photo", tmp_path / "mine")
    photos, minis = weights / "photo" / "adapters" / "upscale", weights / "adapters" / "upscale"
    for adapter, options, expected in (
        ("upscale", ("--model", "photo"), ("photo", photos)),
        ("upscale", ("--model", "mini"), ("mini", minis)),
        ("upscale", (), ("photo", photos)),
        (trained, (), ("photo", trained)),
        ("edit", (), ("mini", weights / "adapters" / "edit")),
    ):
        ran = shell(
            "export", adapter, "--to", to, "-o", tmp_path / "out.safetensors"[: 15 if to == "ldm" else 3], *options
        )
        assert ran.code == 0 and sources.pop() == expected
    ran = shell("export", "edit", "--to", "diffusers", "-o", tmp_path / "out", "--model", "photo")
    ran.failed(1, "edit", "no adapter there", "one of")


def test_evaluate_uses_the_models_adapter_and_weights(weights, shell, tmp_path, monkeypatch):
    loaded = []

    def load(model, task, adapter, *_):
        loaded.append((model, str(adapter)))
        raise UserError("far enough")

    monkeypatch.setattr("codi.apps.evaluate.load_pipeline", load)
    trained = adapter_trained_on("photo", tmp_path / "mine")
    for options, expected in (
        ((), ("photo", "upscale")),
        (("--model", "mini"), ("mini", "upscale")),
        (("--adapter", trained), ("photo", str(trained))),
        (("--adapter", "upscale-x8"), ("mini", "upscale-x8")),
    ):
        shell("evaluate", "--task", "upscale", *options).failed(1, "far enough")
        assert loaded.pop() == expected
    mixed = ("--adapter", "upscale", "--adapter", "upscale-x8")
    shell("evaluate", "--task", "upscale", *mixed).failed(2, "of different models: name one with --model")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"task: upscale\nmodel: photo\ndata: scenes:train:4\nheld_out: scenes:held-out:2\nout: {trained}\n"
    )
    for options, expected in (((), "photo"), (("--model", "mini"), "mini")):
        shell("evaluate", recipe, *options).failed(1, "far enough")
        assert loaded.pop() == (expected, str(trained))


def test_evaluate_compares_with_the_models_finetuned_adapter(weights):
    pipe = CoDiPipeline.from_pretrained("photo", task="upscale")
    make_adapter(weights / "adapters" / "upscale-finetuned", "upscale")
    assert evaluate._reference("upscale", None, pipe, "mini") == "upscale-finetuned"
    assert evaluate._reference("upscale", None, pipe, "photo") is None
    make_adapter(weights / "photo" / "adapters" / "upscale-finetuned", "upscale")
    assert evaluate._reference("upscale", None, pipe, "photo") == "upscale-finetuned"


def test_training_starts_from_its_models_adapter(weights, tmp_path):
    """`start` and `teacher` are names that both models have; in training and in its dry run."""
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


def test_commands_on_the_demo_page_name_a_model_that_is_not_the_default(weights, tmp_path):
    pipe = CoDiPipeline.from_pretrained("mini")
    show = Show(pipe, tmp_path, 0, "mini", None, None)
    assert show._options("upscale") == ["--model", "mini"] and show._options("edit") == []
    show.model = "photo"
    assert show._options("upscale") == [] and show._options("edit") == ["--model", "photo"]
