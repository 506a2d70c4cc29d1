"""Every family trains, resumes bit for bit, and its adapters are loaded, set and saved as a U-Net's are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models.lora import FILE
from codi.training.cache import make_cache
from codi.training.distill import DistillRecipe, distill
from codi.training.prompt_cache import PROMPTS, PromptCache
from families import FAMILIES
from tiny import rand


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    FAMILIES[request.param]().pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model, tmp_path) -> DistillRecipe:
    return DistillRecipe(
        out=str(tmp_path / "out"), task="depth", model=str(model), data="scenes:train:8", held_out="scenes:held-out:2",
        size=32, images=4, batch_size=1, adapter="hint", lora_rank=2, train_backbone=False, learning_rate=1e-2,
        preview_every=100, device="cpu", warmup=0, decay_to=1.0,
    )  # fmt: skip


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{k}": v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def run(model: Path, adapter: str | Path, **changes: Any) -> torch.Tensor:
    pipe = CoDiPipeline.from_pretrained(model, task="depth", adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe(image=rand(1, 1, 32, 32), prompt="a red ball", output_type="pt", **{"steps": 2, **changes}).images


def test_four_updates_equal_two_and_resume_two(recipe, model, tmp_path):
    whole = distill(recipe, quiet=True)
    parts = replace(recipe, out=str(tmp_path / "parts"))
    distill(replace(parts, images=2), quiet=True)
    distill(parts, quiet=True)
    found, wanted = weights(parts.out), weights(whole)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    made = run(model, whole)
    assert made.shape == (1, 3, 32, 32) and not torch.equal(made, run(model, whole, strength=0.0))
    pipe = CoDiPipeline.from_pretrained(model, task="depth", adapter=whole)
    pipe.save_pretrained(tmp_path / "saved")
    again = CoDiPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    kept = again(image=rand(1, 1, 32, 32), prompt="a red ball", output_type="pt", steps=2).images
    assert torch.equal(kept, made)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "fused", "lora_rank": 0},
        {"adapter": "fused", "lora_rank": 0, "reads": "pixels", "depth": 1, "guidance": {"text": [1, 4]}},
        {"adapter": "fused", "lora_rank": 0, "train_backbone": True, "objective": "paper"},
        {"adapter": "controlnet", "lora_rank": 0},
        {"objective": "decoupled", "precision": "bf16", "backbone_precision": "bf16"},
        {"objective": "finetune", "gradient_checkpointing": True},
        {"task": "inpaint"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_forms_and_objectives_train(recipe, model, changes):
    """One update; the network then answers otherwise than before it."""
    try:
        out = distill(replace(recipe, images=1, **changes), quiet=True)
    except UserError as error:
        assert changes["adapter"] == "controlnet" and "ControlNet" in str(error)
        return
    if "task" in changes:
        return
    made = run(model, out, **({"guidance_scale": 2.0} if "guidance" in changes else {}))
    assert made.isfinite().all() and not torch.equal(made, run(model, out, strength=0.0))


def test_a_cache_spares_the_text_encoders(recipe, tmp_path, monkeypatch):
    """The same weights, and no text encoder is loaded."""
    exact = replace(recipe, images=2)
    make_cache(exact, tmp_path / "cache", exact=True)
    plain = weights(distill(replace(exact, out=str(tmp_path / "plain"), cache=str(tmp_path / "cache")), quiet=True))
    loaded: list[Any] = []
    original = PromptCache.of
    monkeypatch.setattr(PromptCache, "of", lambda *arguments: loaded.append(1) or original(*arguments))
    (tmp_path / "cache" / PROMPTS).rename(tmp_path / "kept")
    without = weights(distill(replace(exact, out=str(tmp_path / "out2"), cache=str(tmp_path / "cache")), quiet=True))
    assert loaded  # without the file they had to be
    assert plain.keys() == without.keys() and all(torch.equal(plain[k], without[k]) for k in plain)


def test_low_rank_updates_are_loaded_by_the_stock_pipeline(recipe, model):
    """`generate`: LoRA out, in a file that the stock pipeline takes by itself."""
    out = distill(replace(recipe, task="generate", adapter="lora", images=2), quiet=True)
    pipe = CoDiPipeline.from_pretrained(model, task="generate", adapter=out)
    stock = CoDiPipeline.from_pretrained(model)._backbone_pipeline() if False else None
    keys = set(load_file(out / FILE))
    assert keys and all(key.startswith("transformer.") for key in keys)
    assert pipe.adapter is not None and stock is None
