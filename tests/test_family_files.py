"""Transformer families: weight variants, shards, merged low-rank updates, combined adapters, tiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.models.adapter import FORMS
from codi.models.backbones import load_backbone
from codi.models.lora import save_lora
from codi.training.saving import save_adapter
from families import FAMILIES
from tiny import rand, randn, tiny_lora

SIDE = 32


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> str:
    return request.param


def without_progress_bar(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_weights(a: Any, b: Any) -> bool:
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_fp16_variants_and_sharded_weights_load(family, tmp_path):
    backbone = FAMILIES[family]()
    backbone.pipeline().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
    assert same_weights(load_backbone(tmp_path / "shards"), backbone)
    halves = FAMILIES[family]()
    halves.network.half()
    halves.pipeline().save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size="10KB")
    loaded = load_backbone(tmp_path / "fp16")
    assert loaded.network.dtype == torch.float32
    for a, b in zip(loaded.network.parameters(), halves.network.parameters(), strict=True):
        assert torch.equal(a, b.float())
    assert loaded.family == backbone.family


def test_low_rank_updates_are_merged_into_the_backbone(family, tmp_path):
    """A file that codi wrote, loaded at weight 0.5 by diffusers: W + B A / 2."""
    backbone = FAMILIES[family]().freeze()
    backbone.pipeline().save_pretrained(tmp_path / "model")
    adapted = tiny_lora(backbone.network, "style")
    save_lora(adapted, tmp_path, "style")
    merged = load_backbone(tmp_path / "model", loras={str(tmp_path): 0.5}).network.state_dict()
    updates, original = dict(adapted.named_parameters()), backbone.network.state_dict()
    names = [key.removesuffix(".base_layer.weight") for key in updates if key.endswith(".base_layer.weight")]
    assert names
    for name in names:
        a, b = (updates[f"{name}.lora_{factor}.style.weight"] for factor in "AB")
        change = 0.5 * (b.flatten(1) @ a.flatten(1)).view_as(original[f"{name}.weight"])  # some are 1 x 1 convolutions
        torch.testing.assert_close(merged[f"{name}.weight"], original[f"{name}.weight"] + change, rtol=0, atol=1e-6)


def write_adapter(folder: Path, backbone: Any, form: str, task: str, seed: int, lora: bool = False) -> Path:
    """Save an adapter with nonzero weights."""
    network = tiny_lora(backbone.network, task, seed) if lora else backbone.network
    adapter_module = FORMS[form].from_backbone(backbone.network, backbone.vae)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in adapter_module.parameters() if not p.any()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=10 * seed + i))
    adapter_module.register_to_config(info={"task": task, "family": backbone.family})
    save_adapter(folder, adapter_module, network, full=False, half=False)
    return folder


def test_two_adapters_combine_by_weight(family, tmp_path):
    """Weight 0 disables an adapter, and strength 0 gives exactly the backbone's image."""
    backbone = FAMILIES[family]().freeze()
    first = write_adapter(tmp_path / "first", backbone, "fused", "depth", 1)
    second = write_adapter(tmp_path / "second", backbone, "hint", "canny", 2, lora=True)
    pipe = without_progress_bar(CoDiPipeline(**vars(backbone)))
    for folder in (first, second):
        pipe.load_adapter(folder)

    def run(images: Any, **changes: Any) -> Tensor:
        return pipe(image=images, prompt="a red ball", steps=2, output_type="pt", **changes).images

    depth, edges = rand(1, 1, SIDE, SIDE, seed=1), (rand(1, 1, SIDE, SIDE, seed=2) > 0.5).float()
    both = {"first": depth, "second": edges}
    pipe.set_adapters("first")
    alone, half = run(depth), run(depth, strength=0.5)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.equal(run(both), alone)
    pipe.set_adapters(["first", "second"], [1.0, 1.0])
    combined = run(both)
    assert combined.isfinite().all() and not torch.equal(combined, alone) and not torch.equal(half, alone)
    pipe.fuse_lora()
    torch.testing.assert_close(run(both), combined, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    unadapted = run(both, strength=0.0)
    pipe.set_adapters([])
    assert torch.equal(unadapted, run(None, height=SIDE, width=SIDE))


def test_full_adapter_loads_its_own_network(family, tmp_path):
    backbone = FAMILIES[family]().freeze()
    full_adapter = FORMS["hint"].from_backbone(backbone.network, backbone.vae)
    full_adapter.register_to_config(info={"task": "depth", "family": backbone.family, "full": True})
    trained = FAMILIES[family](seed=3)
    save_adapter(tmp_path / "full", full_adapter, trained.network, full=True, half=False)
    assert (tmp_path / "full" / "transformer" / "config.json").is_file()
    pipe = CoDiPipeline(**vars(backbone))
    pipe.load_adapter(tmp_path / "full")
    assert same_weights(replace(backbone, transformer=pipe.student.network), trained)


def test_images_are_upscaled_in_tiles(family, tmp_path):
    """Tiles align with tokens and share one noise field."""
    backbone = FAMILIES[family]().freeze()
    pipe = without_progress_bar(CoDiPipeline(**vars(backbone)))
    pipe.load_adapter(write_adapter(tmp_path / "upscale", backbone, "hint", "upscale", 1))
    align = pipe.tiles(rand(1, 3, 999, 999)).align  # type: ignore[union-attr]
    assert 4 * align % pipe.cell == 0
    picture = rand(1, 3, 5 * align, 3 * align)
    output = pipe(image=picture, steps=1, tile=2 * align, output_type="pt").images
    assert output.shape == (1, 3, 20 * align, 12 * align) and output.isfinite().all()
    if align > 1:
        with pytest.raises(UserError, match=f"not a multiple of {align}"):
            pipe(image=picture, steps=1, tile=2 * align + 1)
