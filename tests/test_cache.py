"""A cache of latents and text features trains as computing them does; it survives every interruption, and knows what
it was made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codi.data.batches import batches
from codi.data.sources import open_source
from codi.models.backbone import load_backbone
from codi.training import cache
from codi.training.cache import make_cache, open_cache
from codi.training.distill import DistillJob, DistillRecipe, distill, recipe_task
from codi.training.trainer import step_generator
from folders import noise, refused
from tiny import tiny_checkpoint, tiny_xl


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_xl().pipeline().save_pretrained(folder / "xl")
    return {"sd": tiny_checkpoint(folder / "sd"), "xl": folder / "xl"}


@pytest.fixture
def recipe(models, photos, tmp_path) -> DistillRecipe:
    return DistillRecipe(
        out=str(tmp_path / "out"), task="canny", model=str(models["sd"]), data=str(photos), held_out=str(photos),
        size=32, images=8, batch_size=4, train_backbone=False, prompt_dropout=0.5, preview_every=8, device="cpu",
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_interrupted_and_resumed_equals_uninterrupted(recipe, tmp_path, monkeypatch):
    """Twelve samples in shards of five, and cut off at any of three moments."""
    whole = make_cache(recipe, tmp_path / "whole", variants=2, shard_size=5)
    assert whole["samples"] == 12 and whole["unread"] == 0
    assert [len(load_file(file)["row"]) for file in sorted((tmp_path / "whole").glob("*.safetensors"))] == [5, 5, 2]

    save, calls = cache.save_file, []

    def dies(tensors, path):
        calls.append(path)
        if len(calls) in (1, 3):
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make_cache(recipe, tmp_path / "parts", variants=2, shard_size=5)
    assert make_cache(recipe, tmp_path / "parts", variants=2, shard_size=5) == whole
    assert len(calls) == 5  # no shard is made twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
