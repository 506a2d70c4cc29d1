"""Training of every transformer family: exact resuming, all adapter forms and objectives, caches, precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codi import CoDiPipeline
from codi.data.sources import open_source
from codi.errors import UserError
from codi.models.backbones import load_backbone
from codi.models.lora import FILE
from codi.sampling.sampler import time_grid
from codi.training.cache import make_cache
from codi.training.distill import DistillJob, DistillRecipe, distill, recipe_task
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


def test_resumed_training_equals_uninterrupted_and_saved_pipelines_reload(recipe, model, tmp_path):
    uninterrupted = distill(recipe, quiet=True)
    interrupted = replace(recipe, out=str(tmp_path / "parts"))
    distill(replace(interrupted, images=2), quiet=True)
    distill(interrupted, quiet=True)
    resumed, expected = weights(interrupted.out), weights(uninterrupted)
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[k], expected[k]) for k in expected)
    image = run(model, uninterrupted)
    assert image.shape == (1, 3, 32, 32) and not torch.equal(image, run(model, uninterrupted, strength=0.0))
    pipe = CoDiPipeline.from_pretrained(model, task="depth", adapter=uninterrupted)
    pipe.save_pretrained(tmp_path / "saved")
    reloaded = CoDiPipeline.from_pretrained(tmp_path / "saved")
    reloaded.set_progress_bar_config(disable=True)
    reloaded_image = reloaded(image=rand(1, 1, 32, 32), prompt="a red ball", output_type="pt", steps=2).images
    assert torch.equal(reloaded_image, image)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "fused", "lora_rank": 0},
        {"adapter": "fused", "lora_rank": 0, "reads": "pixels", "depth": 1, "guidance": {"text": [1, 4]}},
        {"adapter": "fused", "lora_rank": 0, "train_backbone": True, "objective": "codi"},
        {"adapter": "controlnet", "lora_rank": 0},
        {"objective": "decoupled", "precision": "bf16", "backbone_precision": "bf16"},
        {"objective": "flow-map", "objective_options": {"warmup": 0}, "guidance": {"text": [1, 3]}},
        {"objective": "finetune", "gradient_checkpointing": True},
        {"adapter": "controlnet", "lora_rank": 0, "cache": "cache"},
        {"task": "inpaint"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_forms_and_objectives_train(recipe, model, changes):
    """One update changes the image."""
    changed = replace(recipe, images=1, **changes)
    if "cache" in changes:
        changed = replace(changed, cache=f"{recipe.out}-cache")
    try:
        if changed.cache:
            make_cache(replace(changed, cache=None), Path(changed.cache))
        out = distill(changed, quiet=True)
    except UserError as error:
        assert changes["adapter"] == "controlnet" and "ControlNet" in str(error)
        return
    if "task" in changes:
        return
    image = run(model, out, **({"guidance_scale": 2.0} if "guidance" in changes else {}))
    assert image.isfinite().all() and not torch.equal(image, run(model, out, strength=0.0))


def test_training_with_a_cache_does_not_load_text_encoders(recipe, tmp_path, monkeypatch):
    """The weights equal those of a cache without its prompt file, for which text encoders are loaded."""
    exact = replace(recipe, images=2)
    make_cache(exact, tmp_path / "cache", exact=True)
    cached_prompts = weights(
        distill(replace(exact, out=str(tmp_path / "plain"), cache=str(tmp_path / "cache")), quiet=True)
    )
    loaded: list[Any] = []
    original = PromptCache.of
    monkeypatch.setattr(PromptCache, "of", lambda *arguments: loaded.append(1) or original(*arguments))
    (tmp_path / "cache" / PROMPTS).rename(tmp_path / "kept")
    encoded_prompts = weights(
        distill(replace(exact, out=str(tmp_path / "out2"), cache=str(tmp_path / "cache")), quiet=True)
    )
    assert loaded
    assert cached_prompts.keys() == encoded_prompts.keys() and all(
        torch.equal(cached_prompts[k], encoded_prompts[k]) for k in cached_prompts
    )


def test_low_rank_updates_are_loaded_by_the_stock_pipeline(recipe, model):
    """Task `generate` saves a LoRA file that `load_lora_weights` accepts."""
    out = distill(replace(recipe, task="generate", adapter="lora", images=2), quiet=True)
    kind = load_backbone(model).kind
    stock = load_backbone(model).pipeline()
    stock.load_lora_weights(out)
    adapted = dict(getattr(stock, kind.component).named_parameters())
    updates = load_file(out / FILE)
    assert updates and all(key.startswith(f"{kind.component}.") for key in updates)
    for key, value in updates.items():
        name = key.removeprefix(f"{kind.component}.").replace(".lora_A.", ".lora_A.default_0.")
        assert torch.equal(adapted[name.replace(".lora_B.", ".lora_B.default_0.")], value.float())


def test_trained_weights_are_float32_on_a_bfloat16_backbone(recipe, model, tmp_path):
    """Holds for low-rank updates and their average, whether new or from `start`."""
    half = replace(recipe, precision="bf16", backbone_precision="bf16", images=1)
    out = distill(half, quiet=True)
    for start in (None, str(out)):
        changed = replace(half, start=start, out=str(tmp_path / f"again-{start is None}"))
        source, held_out = (open_source(spec, recipe_task(changed).columns) for spec in (half.data, half.held_out))
        job = DistillJob(changed, load_backbone(model, torch.bfloat16), source, held_out, tmp_path / "corrupt.json")
        trained = {name for name, p in job.online.named_parameters() if p.requires_grad}
        assert any("lora_" in name for name in trained)
        for student in (job.online, job.average):
            assert {p.dtype for name, p in student.named_parameters() if name in trained} == {torch.float32}
        frozen = {p.dtype for name, p in job.online.network.named_parameters() if f"network.{name}" not in trained}
        assert frozen == {torch.bfloat16}


def test_previews_and_pipelines_use_the_same_sigmas(recipe, model, tmp_path):
    """Sigmas fall from 1, and the last step starts well above 0."""
    source, held_out = (open_source(spec, recipe_task(recipe).columns) for spec in (recipe.data, recipe.held_out))
    job = DistillJob(recipe, load_backbone(model), source, held_out, tmp_path / "corrupt.json")
    for steps, schedule in job.sampling.items():
        grid = time_grid(schedule.horizon, steps, 0.5, schedule.whole)
        sigmas = schedule.timestep(grid) / 1000
        assert sigmas[0] == 1 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
        if steps > 1:
            assert sigmas[-2] > 0.1  # the last step starts with noise left
        pipe = load_backbone(model).schedule_for((job.cells, job.cells), steps).unstretched()
        assert torch.equal(pipe.timestep(grid) / 1000, sigmas)
