"""What a recipe would take, told without any weights; and the recipes that are shipped."""

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
    """A checkpoint's folder without its weights."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("configs"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def recipe(model: Path | str, **changes: Any) -> DistillRecipe:
    told = {"out": "", "data": "scenes:train:16", "size": 32, "images": 100, "batch_size": 4, "train_backbone": False}
    return DistillRecipe(model=str(model), **{**told, **changes})


def test_what_trains_is_counted_and_the_rest(checkpoint):
    backbone = tiny_backbone()
    adapter = sum(p.numel() for p in FusedAdapter.from_backbone(backbone.unet, backbone.vae).parameters())
    parts = {part: sum(p.numel() for p in part.parameters()) for part in backbone.modules}
    told = dry_run(recipe(checkpoint))
    assert told["parameters"] == {"trained": adapter, "frozen": sum(parts.values())}
    assert told["family"] == backbone.family and told["updates"] == 25 and told["passes"] == 400
    assert told["data"] == {"source": "scenes:train:16", "pictures": 16, "epochs": 100 / 16}
    full = dry_run(recipe(checkpoint, train_backbone=True))
    assert full["parameters"]["trained"] == adapter + parts[backbone.unet]
    assert full["memory_gb"]["training"] == 16 * full["parameters"]["trained"] / 1e9


def test_memory_is_what_autograd_keeps(checkpoint):
    """Twice the batch keeps twice as much; half precision halves it; checkpointing keeps less."""

    def kept(**changes: Any) -> float:
        return dry_run(recipe(checkpoint, **changes))["memory_gb"]["activations"]

    assert kept(batch_size=8) == pytest.approx(2 * kept(), rel=0.05)  # some of it has no batch
    assert kept(precision="bf16") == pytest.approx(kept() / 2)
    assert kept(gradient_checkpointing=True) < 0.6 * kept()


@pytest.mark.parametrize("changes", [{"objective": "decoupled"}, {"guidance": {"text": [1, 4]}}, {"lora_rank": 2}])
def test_every_kind_of_recipe_can_be_told(changes, checkpoint):
    assert dry_run(recipe(checkpoint, **changes))["memory_gb"]["activations"] > 0


def test_two_text_encoders_too(tmp_path):
    tiny_xl().pipeline().save_pretrained(tmp_path)
    assert dry_run(recipe(tmp_path))["family"] == tiny_xl().family == blank_backbone(tmp_path).family
    assert blank_backbone(tmp_path).unet.device == torch.device("meta") != load_backbone(tmp_path).unet.device


def test_what_has_no_configurations_is_refused(tmp_path):
    with pytest.raises(UserError, match="its configurations could not be read"):
        dry_run(recipe(tmp_path))


def test_a_single_file_needs_somebodys_configurations(checkpoint, tmp_path):
    file = save_original(tiny_backbone(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="or `config` for a single file"):
        dry_run(recipe(file))
    told = dry_run(recipe(file, config=str(checkpoint)))
    assert told["parameters"] == dry_run(recipe(checkpoint))["parameters"]


def test_what_training_would_refuse_is_refused_before_it(checkpoint, tmp_path):
    """In the words of the run itself, though no weight is read."""
    whole, made = tiny_checkpoint(tmp_path / "model"), tmp_path / "adapter"
    distill(recipe(whole, out=str(made), held_out="scenes:held-out:2", images=4, preview_every=8), quiet=True)
    shifted = Path(shutil.copytree(made, tmp_path / "shifted"))
    config = json.loads((shifted / "config.json").read_text())
    config["info"]["family"] = "another"
    (shifted / "config.json").write_text(json.dumps(config))
    for changes, words in [
        ({"size": 30}, "size 30: not a multiple of 4"),
        ({"held_out": str(tmp_path / "none")}, "none"),
        ({"start": str(tmp_path / "none")}, "no adapter there"),
        ({"start": str(shifted)}, "was trained for backbone another"),
        ({"start": str(made), "adapter": "controlnet"}, "not a controlnet adapter"),
        ({"start": str(made), "reads": "pixels"}, "was made to read otherwise"),
        ({"teacher": str(shifted), "objective": "consistency"}, "was trained for backbone another"),
    ]:
        for run in (dry_run, functools.partial(distill, quiet=True)):
            with pytest.raises(UserError, match=words):
                run(recipe(whole, **{"out": str(tmp_path / "out"), **changes}))
    assert dry_run(recipe(checkpoint, start=str(made)))["updates"] == 25
    later = recipe(whole, out=str(tmp_path / "out"), cache=str(tmp_path / "later"))
    with pytest.raises(UserError, match="no cache there"):
        distill(later, quiet=True)
    assert dry_run(later)["cache_saves_gb"] == 0  # a plan may come before its cache: the encoders count as spared


def test_a_cache_of_other_data_is_refused_before_training(tmp_path):
    told = recipe(tiny_checkpoint(tmp_path / "model"), task="canny", held_out="scenes:held-out:2")
    make_cache(told, tmp_path / "cache")
    dry_run(replace(told, cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="a cache of size 32, not 64"):
        dry_run(replace(told, cache=str(tmp_path / "cache"), size=64))


def test_the_command_tells_it_without_training(checkpoint, tmp_path, capsys):
    words = ["distill", "depth", "--model", str(checkpoint), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 0
    assert "parameters" in (told := capsys.readouterr().out) and "about" in told and "20,000 pictures" in told
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] > 0
    assert not (tmp_path / "run").exists()


@functools.cache
def published(kind: str) -> Path:
    """The folder of a published checkpoint's configurations."""
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
    ("name", "trained", "most"),
    [
        ("sd15-pe", 350e6, 24), ("sd15-full", 1209e6, 40), ("sd21-pe", 353e6, 24), ("sd21-full", 1219e6, 40),
        ("sdxl-pe", 1244e6, 80), ("sdxl-full", 3812e6, 2 * 80), ("sdxl-lean", 189e6, 24),
    ],
)  # fmt: skip
def test_the_recipes_for_stable_diffusion_fit_where_they_say(name, trained, most):
    told = read_recipe(name)
    changes = {"model": str(published(name.split("-")[0])), "data": "scenes:train:16", "held_out": "scenes:held-out:4"}
    row = dry_run(build(DistillRecipe, {**told, **changes}, name))
    assert row["parameters"]["trained"] == pytest.approx(trained, rel=0.01)
    assert 0.3 * most < 1.1 * row["memory_gb"]["total"] < most
    assert told["model"].count("/") == 1 and row["images_an_update"] == 16
