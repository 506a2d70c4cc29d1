"""The dry run: memory, parameters and time of a recipe, computed without weights; and the shipped recipes."""

import functools
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codi.apps.cli import main
from codi.errors import UserError
from codi.models.adapter import FusedAdapter
from codi.models.backbones import load_backbone
from codi.training.cache import make_cache
from codi.training.distill import DistillRecipe, distill
from codi.training.dry_run import blank_backbone, dry_run
from codi.training.recipe import build, read_recipe
from originals import save_original
from tiny import tiny_backbone, tiny_checkpoint, tiny_xl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fullsize  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder without weight files."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("configs"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def recipe(model: Path | str, **changes: Any) -> DistillRecipe:
    values = {"out": "", "data": "scenes:train:16", "size": 32, "images": 100, "batch_size": 4, "train_backbone": False}
    return DistillRecipe(model=str(model), **{**values, **changes})


def test_trained_and_frozen_parameters_are_counted(checkpoint):
    backbone = tiny_backbone()
    adapter = sum(p.numel() for p in FusedAdapter.from_backbone(backbone.unet, backbone.vae).parameters())
    parts = {part: sum(p.numel() for p in part.parameters()) for part in backbone.modules}
    plan = dry_run(recipe(checkpoint))
    assert plan["parameters"] == {"trained": adapter, "frozen": sum(parts.values())}
    assert plan["family"] == backbone.family and plan["updates"] == 25 and plan["passes"] == 400
    assert plan["data"] == {"source": "scenes:train:16", "pictures": 16, "epochs": 100 / 16}
    full = dry_run(recipe(checkpoint, train_backbone=True))
    assert full["parameters"]["trained"] == adapter + parts[backbone.unet]
    assert full["memory_gb"]["training"] == 16 * full["parameters"]["trained"] / 1e9


def test_activation_memory_follows_batch_precision_and_checkpointing(checkpoint):
    """Activations double with the batch, halve with half precision, and shrink with checkpointing."""

    def activations(**changes: Any) -> float:
        return dry_run(recipe(checkpoint, **changes))["memory_gb"]["activations"]

    assert activations(batch_size=8) == pytest.approx(
        2 * activations(), rel=0.05
    )  # some tensors have no batch dimension
    assert activations(precision="bf16") == pytest.approx(activations() / 2)
    assert activations(gradient_checkpointing=True) < 0.6 * activations()


@pytest.mark.parametrize("changes", [{"objective": "decoupled"}, {"guidance": {"text": [1, 4]}}, {"lora_rank": 2}])
def test_dry_run_accepts_every_kind_of_recipe(changes, checkpoint):
    assert dry_run(recipe(checkpoint, **changes))["memory_gb"]["activations"] > 0


def test_dry_run_accepts_two_text_encoders(tmp_path):
    tiny_xl().pipeline().save_pretrained(tmp_path)
    assert dry_run(recipe(tmp_path))["family"] == tiny_xl().family == blank_backbone(tmp_path).family
    assert blank_backbone(tmp_path).unet.device == torch.device("meta") != load_backbone(tmp_path).unet.device


def test_model_without_configurations_is_refused(tmp_path):
    with pytest.raises(UserError, match="its configurations could not be read"):
        dry_run(recipe(tmp_path))


def test_single_file_needs_a_config_folder(checkpoint, tmp_path):
    file = save_original(tiny_backbone(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="or `config` for a single file"):
        dry_run(recipe(file))
    plan = dry_run(recipe(file, config=str(checkpoint)))
    assert plan["parameters"] == dry_run(recipe(checkpoint))["parameters"]


def test_dry_run_raises_the_errors_of_training(checkpoint, tmp_path):
    """The messages are those of the run itself, though no weights are read."""
    model, adapter = tiny_checkpoint(tmp_path / "model"), tmp_path / "adapter"
    distill(recipe(model, out=str(adapter), held_out="scenes:held-out:2", images=4, preview_every=8), quiet=True)
    shifted = Path(shutil.copytree(adapter, tmp_path / "shifted"))
    config = json.loads((shifted / "config.json").read_text())
    config["info"]["family"] = "another"
    (shifted / "config.json").write_text(json.dumps(config))
    for changes, message in [
        ({"size": 30}, "size 30: not a multiple of 4"),
        ({"held_out": str(tmp_path / "none")}, "none"),
        ({"start": str(tmp_path / "none")}, "no adapter there"),
        ({"start": str(shifted)}, "was trained for backbone another"),
        ({"start": str(adapter), "adapter": "controlnet"}, "not a controlnet adapter"),
        ({"start": str(adapter), "reads": "pixels"}, "was made to read otherwise"),
        ({"teacher": str(shifted), "objective": "consistency"}, "was trained for backbone another"),
    ]:
        for run in (dry_run, functools.partial(distill, quiet=True)):
            with pytest.raises(UserError, match=message):
                run(recipe(model, **{"out": str(tmp_path / "out"), **changes}))
    assert dry_run(recipe(checkpoint, start=str(adapter)))["updates"] == 25
    uncached = recipe(model, out=str(tmp_path / "out"), cache=str(tmp_path / "later"))
    with pytest.raises(UserError, match="no cache there"):
        distill(uncached, quiet=True)
    assert dry_run(uncached)["cache_saves_gb"] == 0  # a plan may precede its cache: encoders count as unloaded


def test_dry_run_refuses_a_cache_of_other_data(tmp_path):
    settings = recipe(tiny_checkpoint(tmp_path / "model"), task="canny", held_out="scenes:held-out:2")
    make_cache(settings, tmp_path / "cache")
    dry_run(replace(settings, cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="a cache of size 32, not 64"):
        dry_run(replace(settings, cache=str(tmp_path / "cache"), size=64))


def test_dry_run_command_prints_the_plan_and_trains_nothing(checkpoint, tmp_path, capsys):
    arguments = ["distill", "depth", "--model", str(checkpoint), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(arguments) == 0
    assert "parameters" in (output := capsys.readouterr().out) and "about" in output and "20,000 pictures" in output
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] > 0
    assert not (tmp_path / "run").exists()


@functools.cache
def published(kind: str) -> Path:
    """Return a folder with a published checkpoint's configurations."""
    folder = Path(tempfile.mkdtemp())
    with torch.device("meta"):
        backbone = fullsize.build(kind)
    parts = {"unet": backbone.unet, "vae": backbone.vae, "scheduler": backbone.scheduler}
    for name, part in parts.items():
        part.save_config(folder / name)
    encoders = dict(zip(("text_encoder", "text_encoder_2"), backbone.text.encoders, strict=False))
    for name, encoder in encoders.items():
        encoder.config.save_pretrained(folder / name)
    classes = {n: [type(p).__module__.split(".")[0], type(p).__name__] for n, p in (parts | encoders).items()}
    index = {"_class_name": "StableDiffusionPipeline", **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("name", "trained", "limit"),
    [
        ("sd15-pe", 350e6, 24), ("sd15-full", 1209e6, 40), ("sd21-pe", 353e6, 24), ("sd21-full", 1219e6, 40),
        ("sdxl-pe", 1244e6, 80), ("sdxl-full", 3812e6, 2 * 80), ("sdxl-lean", 189e6, 24),
    ],
)  # fmt: skip
def test_stable_diffusion_recipes_fit_the_stated_memory(name, trained, limit):
    values = read_recipe(name)
    changes = {"model": str(published(name.split("-")[0])), "data": "scenes:train:16", "held_out": "scenes:held-out:4"}
    plan = dry_run(build(DistillRecipe, {**values, **changes}, name))
    assert plan["parameters"]["trained"] == pytest.approx(trained, rel=0.01)
    assert 0.3 * limit < 1.1 * plan["memory_gb"]["total"] < limit
    assert values["model"].count("/") == 1 and plan["images_an_update"] == 16
