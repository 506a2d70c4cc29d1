"""The recipes of the transformer families: dry runs on the published configurations, and updates of tiny models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from codi.models.lora import FILE
from codi.training.cache import make_cache
from codi.training.distill import DistillRecipe, distill
from codi.training.dry_run import dry_run
from codi.training.recipe import build, read_recipe, shipped_recipes
from families import FAMILIES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from published import write_configurations  # noqa: E402

# Recipe folder: (tiny family, published checkpoint, memory in GB of the GPU named in the recipe's header).
MODELS = {
    "sd3": ("sd35", "sd35-medium", 24),
    "flux": ("flux", "flux", 80),
    "flux2": ("flux2", "flux2-klein-4b", 40),
    "zimage": ("zimage", "zimage", 40),
    "qwen": ("qwenimage", "qwen-image", 80),
    "sana": ("sana", "sana-1.6b", 24),
}
RECIPES = [name for name in shipped_recipes() if name.split("/")[0] in MODELS]


def test_every_family_has_recipes_for_depth_and_generate():
    assert sorted(RECIPES) == sorted(f"{family}/{task}" for family in MODELS for task in ("depth", "generate"))


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_fits_the_gpu_named_in_the_recipe(name, tmp_path):
    """Parameters and memory are computed from configurations alone."""
    _, checkpoint, card = MODELS[name.split("/")[0]]
    values = read_recipe(name)
    folder = write_configurations(checkpoint, tmp_path / "model")
    changes = {"model": str(folder), "data": "scenes:train:16", "held_out": "scenes:held-out:4", "loras": {}}
    plan = dry_run(build(DistillRecipe, {**values, **changes}, name))
    assert 1e6 < plan["parameters"]["trained"] < 0.1 * plan["parameters"]["frozen"]
    assert 0.2 * card < 1.1 * plan["memory_gb"]["total"] < card
    assert plan["updates"] == 12500 and plan["cache_saves_gb"] == 0
    assert f"GPU of {card} GB" in (Path(read_path(name))).read_text()


def read_path(name: str) -> Path:
    from codi.training.recipe import find_recipe

    return find_recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_a_tiny_model(name, tmp_path):
    """Two updates with the recipe's cache and bfloat16 backbone; `generate` also merges a user's LoRA."""
    FAMILIES[MODELS[name.split("/")[0]][0]]().pipeline().save_pretrained(tmp_path / "model")
    overrides: dict[str, Any] = {
        "model": str(tmp_path / "model"), "data": "scenes:train:4", "held_out": "scenes:held-out:2", "size": 32,
        "images": 2, "accumulate": 1, "preview_every": 100, "checkpoint_every": 100, "device": "cpu", "lora_rank": 2,
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    values = {**read_recipe(name), **overrides}
    if values.pop("loras", None):
        style_recipe = build(DistillRecipe, {**values, "out": str(tmp_path / "style"), "cache": None}, name)
        values["loras"] = {str(distill(style_recipe, quiet=True) / FILE): 0.5}
    recipe = build(DistillRecipe, {**values, "out": str(tmp_path / "out")}, name)
    assert recipe.gradient_checkpointing and recipe.backbone_precision == "bf16" and not recipe.train_backbone
    make_cache(recipe, tmp_path / "cache")
    out = distill(recipe, quiet=True)
    updates = load_file(out / FILE)
    assert any(value.any() for key, value in updates.items() if "lora_B" in key)
    assert all(value.isfinite().all() for value in updates.values())
