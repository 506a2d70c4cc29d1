"""Training: resume is exact, a kill loses nothing, bad numbers stop the run, recipes refuse what they do not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from codi.errors import UserError
from codi.models.adapter_files import load_adapter
from codi.models.backbone import load_backbone
from codi.training import checkpoint
from codi.training import recipe as recipes
from codi.training.distill import DistillRecipe, distill
from codi.training.trainer import RunSettings, learning_rate_factor
from tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> DistillRecipe:
    """A run of 4 updates of 2 pictures on a tiny backbone and eight noise pictures."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_checkpoint(folder / "model", prediction="v_prediction")
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    return DistillRecipe(
        out=str(folder / "out"), model=str(model), data=str(pictures), held_out=str(pictures), size=32, images=8,
        batch_size=2, warmup=2, learning_rate=1e-2, log_every=2, preview_every=100, checkpoint_every=4, device="cpu",
        degradation="bicubic", half=False,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished adapter, its trained backbone included."""
    files = sorted(folder.glob("*.safetensors")) + sorted((folder / "unet").glob("*.safetensors"))
    return {f"{f.parent.name if f.parent != folder else ''}/{k}": v for f in files for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_four_updates_equal_two_and_resume_two(tiny_run, tmp_path, monkeypatch):
    whole = distill(replace(tiny_run, out=str(tmp_path / "whole")), quiet=True)

    from codi.training.distill import DistillJob

    forward, calls = DistillJob.forward, []

    def dies_in_the_fourth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return forward(self, *args, **kwargs)

    broken = replace(tiny_run, out=str(tmp_path / "broken"))
    monkeypatch.setattr(DistillJob, "forward", dies_in_the_fourth)
    with pytest.raises(RuntimeError, match="power cut"):
        distill(broken, quiet=True)
    assert [p.name for p in checkpoint.complete(Path(broken.out) / "checkpoints")] == ["step-00000002"]
    monkeypatch.setattr(DistillJob, "forward", forward)
    torch.rand(100)  # whatever happens between: the checkpoint restores the random state
    resumed = distill(broken, quiet=True)
    assert same(weights(whole), weights(resumed))
    assert not same(weights(whole), {k: torch.zeros_like(v) for k, v in weights(whole).items()})


def test_kill_in_the_middle_of_a_checkpoint_loses_nothing(tiny_run, tmp_path):
    whole = distill(replace(tiny_run, out=str(tmp_path / "whole")), quiet=True)
    out = tmp_path / "killed"
    # The second checkpoint dies after its first file: SIGKILL, no clean-up of any kind.
    script = f"""
import os, signal, json
from codi.training import checkpoint
from codi.training.distill import DistillRecipe, distill
real, calls = checkpoint.save_file, []
def save_file(tensors, path):
    calls.append(path)
    if len(calls) == 6:
        open(path, "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path)
checkpoint.save_file = save_file
distill(DistillRecipe(**{{**json.loads({json.dumps(json.dumps(vars(tiny_run)))}), "out": {str(out)!r}}}), quiet=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    left = [p.name for p in (out / "checkpoints").iterdir()]
    assert any(name.startswith(".writing-") for name in left) and "step-00000002" in left
    resumed = distill(replace(tiny_run, out=str(out)), quiet=True)
    assert same(weights(whole), weights(resumed))
    assert not any(p.name.startswith(".writing-") for p in (out / "checkpoints").iterdir())


def test_accumulation_equals_one_large_batch_of_the_plain_loss(tiny_run, tmp_path):
    """Two batches of two summed into an update move the weights as far as updates of four do: same image count."""
    out = distill(replace(tiny_run, out=str(tmp_path / "a"), accumulate=2, objective="finetune"), quiet=True)
    state = json.loads((checkpoint.complete(out / "checkpoints")[-1] / "state.json").read_text())
    assert state["progress"]["updates"] == 2 and state["progress"]["images"] == 8


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"adapter": "controlnet"}]
)
def test_options_train(tiny_run, tmp_path, changes):
    out = distill(replace(tiny_run, out=str(tmp_path / "run"), images=4, **changes), quiet=True)
    assert all(bool(torch.isfinite(v).all()) for v in weights(out).values())
    assert (out / "log.jsonl").read_text().count("\n") >= 1 and list((out / "tensorboard").iterdir())


def test_gradient_checkpointing_changes_no_weight(tiny_run, tmp_path):
    plain = distill(replace(tiny_run, out=str(tmp_path / "plain"), images=4), quiet=True)
    saving = distill(replace(tiny_run, out=str(tmp_path / "saving"), images=4, gradient_checkpointing=True), quiet=True)
    for (name, a), b in zip(weights(plain).items(), weights(saving).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_pe_leaves_the_backbone_alone_and_full_does_not(tiny_run, tmp_path):
    backbone = load_backbone(tiny_run.model)
    pe = distill(replace(tiny_run, out=str(tmp_path / "pe"), train_backbone=False), quiet=True)
    full = distill(replace(tiny_run, out=str(tmp_path / "full")), quiet=True)
    assert not (pe / "unet").exists()
    before = backbone.unet.state_dict()
    _, unet = load_adapter(pe, "upscale", backbone.family, backbone.unet)
    assert unet is backbone.unet
    _, unet = load_adapter(full, "upscale", backbone.family, backbone.unet)
    assert any(not torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_the_finished_adapter_says_what_it_is(tiny_run, tmp_path):
    out = distill(replace(tiny_run, out=str(tmp_path / "run"), images=4), quiet=True)
    info = json.loads((out / "config.json").read_text())["info"]
    assert info["task"] == "upscale" and info["family"] == load_backbone(tiny_run.model).family
    assert info["images"] == 4 and set(info["metrics"]) == {"obedience_1", "obedience_2", "obedience_4"}
    assert (out / "checkpoints").is_dir() and list((out / "previews").glob("*.png"))


def test_non_finite_loss_stops_with_the_last_good_checkpoint(tiny_run, tmp_path, monkeypatch):
    from codi.training.distill import DistillJob

    forward, calls = DistillJob.forward, []

    def explodes(self, *args, **kwargs):
        calls.append(1)
        losses = forward(self, *args, **kwargs)
        return losses if len(calls) < 4 else {k: v * float("nan") for k, v in losses.items()}

    monkeypatch.setattr(DistillJob, "forward", explodes)
    run = replace(tiny_run, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="not finite.*step-00000002"):
        distill(run, quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(DistillJob, "forward", forward)
    assert same(
        weights(distill(run, quiet=True)), weights(distill(replace(run, out=str(tmp_path / "new")), quiet=True))
    )


def test_a_folder_of_another_run_is_not_resumed(tiny_run, tmp_path):
    run = replace(tiny_run, out=str(tmp_path / "run"), images=4)
    distill(run, quiet=True)
    with pytest.raises(UserError, match="learning_rate"):
        distill(replace(run, learning_rate=0.5), quiet=True)


def test_a_broken_checkpoint_is_named(tiny_run, tmp_path):
    run = replace(tiny_run, out=str(tmp_path / "run"))
    distill(run, quiet=True)
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="broken"):
        distill(replace(run, images=12), quiet=True)


def test_learning_rate_rises_then_falls():
    settings = RunSettings(images=1000, batch_size=10, warmup=100, decay_to=0.1)
    factors = [learning_rate_factor(settings, i) for i in range(0, 1001, 10)]
    assert factors[0] == pytest.approx(0.1, abs=1e-3) and max(factors) == pytest.approx(1, abs=0.05)
    assert factors[-1] == pytest.approx(0.1) and all(a >= b for a, b in zip(factors[12:], factors[13:], strict=False))


def test_recipes_refuse_unknown_keys_by_the_nearest_name():
    with pytest.raises(UserError, match="learning_rat.*did you mean 'learning_rate'"):
        recipes.build(DistillRecipe, {"out": "x", "learning_rat": 1}, "r.yaml")
    with pytest.raises(UserError, match="'out' is missing"):
        recipes.build(DistillRecipe, {}, "r.yaml")
    with pytest.raises(UserError, match="images is 'many': should be int"):
        recipes.build(DistillRecipe, {"out": "x", "images": "many"}, "r.yaml")


def test_overrides_and_numbers_read_as_numbers():
    values = recipes.parse_overrides(["--learning-rate", "1e-4", "--seed=3", "--gradient-checkpointing", "--out", "a"])
    built = recipes.build(DistillRecipe, values, "flags")
    assert built.learning_rate == 1e-4 and built.seed == 3 and built.gradient_checkpointing and built.out == "a"


@pytest.mark.parametrize("name", [p.stem for p in recipes.SHIPPED.glob("*.yaml")])
def test_every_shipped_recipe_builds(name):
    from codi.training.pretrain_recipe import PretrainRecipe

    values = recipes.read_recipe(name)
    recipes.build(PretrainRecipe if "ldm_images" in values else DistillRecipe, values, name)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": "cody"}, "did you mean 'codi'"),
        ({"adapter": "fuse"}, "did you mean 'fused'"),
        ({"objective_options": {"dtt": 1}}, "did you mean 'dt'"),
        ({"objective_options": {"d_x": "pixels"}}, "did you mean 'pixel'"),
        ({"task": "upscal"}, "did you mean 'upscale'"),
        ({"batch_size": 0}, "at least 1"),
        ({"precision": "fp8"}, "use one of"),
        ({"size": 30}, "multiple"),
    ],
)
def test_values_no_run_can_have(tiny_run, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        distill(replace(tiny_run, out=str(tmp_path / "run"), **changes), quiet=True)
