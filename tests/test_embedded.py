"""Several models in one package: whose adapters go by their names, and which model a command takes by itself."""

import json

import pytest

import codi.models.adapter_files as adapter_files
import codi.models.backbones.loading as loading
from codi.apps.models import embedded
from codi.export.source import load_source
from codi.models.adapter_files import default_model, find_adapter
from codi.sampling.pipeline import CoDiPipeline
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
    assert default_model("upscale") == default_model("upscale", "upscale") == "photo"
    assert default_model("edit") == default_model("inpaint") == default_model("upscale", "upscale-x8") == "mini"
    mine = make_adapter(tmp_path / "mine", "upscale")
    assert default_model("upscale", mine) == "mini"
    config = json.loads((mine / "config.json").read_text())
    config["info"]["recipe"]["model"] = "photo"
    (mine / "config.json").write_text(json.dumps(config))
    assert default_model("upscale", mine) == default_model("upscale", str(mine)) == "photo"
    (mine / "config.json").write_text("[]")
    assert default_model("upscale", mine) == "mini"


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


def test_export_takes_a_model_s_own_adapter(weights, shell, tmp_path):
    """By a name that mini has too."""
    assert load_source("upscale", "photo").shelved.folder == weights / "photo" / "adapters" / "upscale"
    assert load_source("upscale", "mini").shelved.folder == weights / "adapters" / "upscale"
    out = tmp_path / "out"
    ran = shell("export", "edit", "--to", "diffusers", "-o", out, "--model", "photo")
    ran.failed(1, "edit", "no adapter there", "one of")
