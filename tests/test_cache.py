"""The training cache of latents and text features: same losses as without it, safe to interrupt, checked against its
recipe and data."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from codi.data.batches import batches
from codi.data.samples import CorruptSample, Sample
from codi.data.sources import open_source
from codi.models import codec
from codi.models.backbones import load_backbone
from codi.training import cache
from codi.training.cache import make_cache, open_cache
from codi.training.checkpoint import Progress
from codi.training.distill import DistillJob, DistillRecipe, distill, recipe_task
from codi.training.trainer import step_generator
from folders import noise, refused, same
from originals import save_original
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


def test_resumed_caching_equals_uninterrupted_caching(recipe, tmp_path, monkeypatch):
    """Twelve samples in shards of five; writing is interrupted at the first and third shard."""
    uninterrupted = make_cache(recipe, tmp_path / "whole", variants=2, shard_size=5)
    assert uninterrupted["samples"] == 12 and uninterrupted["unread"] == 0
    shards = sorted((tmp_path / "whole").glob("shard-*.safetensors"))
    assert [len(load_file(file)["row"]) for file in shards] == [5, 5, 2]

    save, calls = cache.save_file, []

    def interrupt(tensors, path):
        calls.append(path)
        if len(calls) in (1, 3):
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make_cache(recipe, tmp_path / "parts", variants=2, shard_size=5)
    assert make_cache(recipe, tmp_path / "parts", variants=2, shard_size=5) == uninterrupted
    assert len(calls) == 5  # no shard is made twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_unusable_shards_are_refused_and_rebuilt(recipe, tmp_path):
    folder = tmp_path / "cached"
    make_cache(recipe, folder, shard_size=5)
    complete, shard = contents(folder), folder / "shard-00001.safetensors"
    shard.write_bytes(complete[shard.name][:-100])
    cached = replace(recipe, cache=str(folder))
    refused(lambda: distill(cached, quiet=True), shard, "truncated or damaged", "codi data cache")
    shard.unlink()
    refused(lambda: distill(cached, quiet=True), shard, "missing", "codi data cache")
    make_cache(recipe, folder, shard_size=5)
    assert contents(folder) == complete


def test_cache_of_a_single_file_checkpoint_equals_that_of_its_folder(recipe, models, tmp_path):
    file = save_original(load_backbone(models["sd"]), tmp_path / "model.safetensors")
    make_cache(recipe, tmp_path / "folder")
    single_file = replace(recipe, model=str(file), config=str(models["sd"]))
    make_cache(single_file, tmp_path / "file")
    shards = [load_file(tmp_path / kind / "shard-00000.safetensors") for kind in ("folder", "file")]
    assert all(torch.equal(shards[0][key], shards[1][key]) for key in shards[0])
    out = distill(replace(single_file, cache=str(tmp_path / "folder")), quiet=True)  # the same encoders
    assert (out / "config.json").is_file()


def test_only_one_process_may_fill_a_cache(recipe, tmp_path):
    folder = tmp_path / "cached"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        refused(lambda: make_cache(recipe, folder), folder, "another process is filling this cache")
    (folder / ".lock").touch()  # a killed process leaves its lock file
    make_cache(recipe, folder)


def new_job(recipe: DistillRecipe, source: Any = None) -> DistillJob:
    """Return the recipe's training job before the first update."""
    backbone, columns = load_backbone(recipe.model), recipe_task(recipe).columns
    source = source or open_source(recipe.data, columns)
    if recipe.cache:
        source = open_cache(recipe, backbone, source)
    torch.manual_seed(0)
    return DistillJob(
        recipe, backbone, source, open_source(recipe.held_out, columns), Path(recipe.out) / "corrupt.json"
    )


def figures(job: DistillJob) -> dict[str, Any]:
    """Return the losses of the batch at position 4 and the figures of a preview."""
    batch = next(batches(job.source, 4, 32, 0, 4))
    return {**job(batch, step_generator(0, 1, 0)), **job.preview(Path(job.recipe.out), Progress())}


class SameCrops:
    """A source with the crops of a cache of one variant."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices, size, crops=None):
        return self.source.read(indices, size, [cache._crop(0, i, 0) for i in indices])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd", {"guidance": {"text": [1, 4]}, "guidance_share": 1.0}),
        ("xl", {"guidance": {"text": [1, 4]}, "guidance_share": 1.0, "reads": "pixels"}),
        ("sd", {"task": "upscale", "degradation": "real", "objective": "codi", "objective_options": {"d_x": "pixel"}}),
    ],
    ids=["latents", "xl-pixels", "upscale"],
)
def test_losses_equal_those_without_a_cache(recipe, models, tmp_path, kind, changes):
    changed = replace(recipe, model=str(models[kind]), **changes)
    uncached = figures(new_job(changed, SameCrops(open_source(changed.data))))
    for exact, tolerance in ((True, 1e-5), (False, 2e-3)):
        folder = tmp_path / f"cached-{exact}"
        make_cache(changed, folder, exact=exact, shard_size=5)
        with_cache = figures(new_job(replace(changed, cache=str(folder))))
        assert with_cache.keys() == uncached.keys()
        for name, value in uncached.items():
            torch.testing.assert_close(
                torch.as_tensor(with_cache[name]), torch.as_tensor(value), rtol=tolerance, atol=1e-5
            )


def test_encoders_are_not_loaded_for_cached_data(recipe, tmp_path):
    make_cache(recipe, tmp_path / "cached")
    cached = replace(recipe, cache=str(tmp_path / "cached"))
    uncached, latents, pixels = new_job(recipe), new_job(cached), new_job(replace(cached, reads="pixels"))
    parts = {"encoders", "vae.encoder", "vae.decoder"}

    def loaded_parts(job: DistillJob) -> set[str]:
        return {part for part in parts if any(name.startswith(part) for name, _ in job.named_parameters())}

    assert (loaded_parts(uncached), loaded_parts(latents), loaded_parts(pixels)) == (
        parts,
        parts - {"encoders"},
        {"vae.decoder"},
    )


def test_cached_batches_depend_on_the_position_alone(recipe, tmp_path):
    """Each latent belongs to its crop, and all three cached crops of an image are drawn."""
    make_cache(recipe, tmp_path / "cached", variants=3, exact=True, shard_size=5)
    backbone = load_backbone(recipe.model)
    source = open_cache(replace(recipe, cache=str(tmp_path / "cached")), backbone, open_source(recipe.data))
    run = list(islice(batches(source, 4, 32, seed=7), 9))
    resumed = list(islice(batches(source, 4, 32, seed=7, start=12), 6))
    assert all(map(same, run[3:], resumed)) and [b.index for b in run[3:]] == [b.index for b in resumed]
    crops: dict[int, set[float]] = {}
    for batch in run:
        torch.testing.assert_close(batch.extras["latent"], codec.moments(backbone.vae, batch.image))
        torch.testing.assert_close(batch.extras["text"], backbone.text.encode(batch.text)["features"])
        for i, image in zip(batch.index, batch.image, strict=True):
            crops.setdefault(i, set()).add(image.sum().item())
    assert max(map(len, crops.values())) == 3


def test_cache_of_another_recipe_or_data_set_is_refused(recipe, models, photos, tmp_path):
    folder = tmp_path / "cached"
    cached = replace(recipe, cache=str(folder))
    refused(lambda: new_job(cached), folder, "no cache there", "codi data cache")
    make_cache(recipe, folder)
    new_job(replace(cached, task="inpaint"))  # needs the same images and prompts
    refused(lambda: new_job(replace(cached, size=64)), folder, "a cache of size 32, not 64")
    refused(lambda: new_job(replace(cached, task="upscale")), folder, "a cache of prompts 'text', not ''")
    refused(lambda: new_job(replace(cached, data="scenes:train:12")), folder, "a cache of data 'photos'")
    refused(lambda: new_job(replace(cached, model=str(tiny_checkpoint(tmp_path / "other", seed=1)))), folder, "of vae")
    refused(lambda: make_cache(recipe, folder, variants=2), folder, "a cache of variants 1, not 2")
    refused(lambda: make_cache(replace(recipe, seed=1), folder), folder, "a cache of seed 0, not 1")

    metadata = photos / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture 7", "picture seven"))
    refused(
        lambda: [*islice(new_job(cached).batches(0, cached.batch_size), 3)], "07.png", "another name or prompt", folder
    )
    noise(40, 40).save(photos / "more.png")
    metadata.write_text(metadata.read_text() + json.dumps({"file_name": "more.png"}))
    refused(lambda: new_job(cached), folder, "a cache of samples 12, not 13")
    (folder / "index.json").write_text("{}")
    refused(lambda: new_job(cached), folder / "index.json", "cannot be read")


def test_unreadable_images_are_skipped(recipe, photos, tmp_path):
    good = (photos / "06.png").read_bytes()
    (photos / "06.png").write_bytes(b"damaged")
    cached = replace(recipe, cache=str(tmp_path / "cached"), max_corrupt=0.2)
    assert make_cache(cached, tmp_path / "cached", shard_size=5)["unread"] == 1
    (photos / "06.png").write_bytes(good)
    source = open_cache(cached, load_backbone(recipe.model), open_source(recipe.data))
    skipped, intact = source.read([0, 1], 32)
    assert isinstance(skipped, CorruptSample) and "unreadable when" in skipped.why
    assert isinstance(intact, Sample) and intact.extras["latent"].any()
    for path in photos.rglob("*.png"):
        path.write_bytes(b"damaged")
    refused(lambda: make_cache(recipe, tmp_path / "none"), "no other file is readable")


def test_cache_and_distill_commands(shell, models, photos, tmp_path):
    arguments = (
        "canny",
        "--model",
        models["sd"],
        "--data",
        photos,
        "--held-out",
        photos,
        "--size",
        32,
        "--device",
        "cpu",
    )
    ran = shell("data", "cache", *arguments, "-o", tmp_path / "cached", "--json")
    assert ran.code == 0 and json.loads(ran.out)["samples"] == 12 and json.loads(ran.out)["bytes"] > 0
    again = shell("data", "cache", *arguments, "-o", tmp_path / "cached")
    assert "12 samples of 32 px" in again.out
    run = ("--images", 4, "--batch-size", 2, "--out", tmp_path / "run", "--cache", tmp_path / "cached")
    assert shell("distill", *arguments, *run).code == 0
    assert (tmp_path / "run" / "config.json").is_file()
    shell("data", "cache", *arguments, "-o", tmp_path / "cached", "--seed", 4).failed(1, "a cache of seed 0, not 4")
    shell("data", "cache", "-o", tmp_path / "cached").failed(2, "RECIPE")
    full, less = (
        json.loads(shell("distill", *arguments, *run[:4], *changes, "--out", tmp_path, "--dry-run", "--json").out)
        for changes in ((), run[6:])
    )
    saved = sum(p.numel() for encoder in load_backbone(models["sd"]).text.encoders for p in encoder.parameters())
    assert full["parameters"]["frozen"] - less["parameters"]["frozen"] == saved
    assert full["cache_saves_gb"] == pytest.approx(4e-9 * saved) and less["cache_saves_gb"] == 0
