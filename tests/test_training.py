"""Training: resuming is exact, a kill loses nothing, bad numbers stop the run, recipes refuse unknown keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from codi.data.sources import open_source
from codi.errors import UserError
from codi.models.adapter_files import load_adapter
from codi.models.backbones import digest, load_backbone
from codi.models.lora import lora_names
from codi.models.student import Conditioning, Student
from codi.tasks import TASKS, get_task
from codi.training import checkpoint
from codi.training import recipe as recipes
from codi.training.checkpoint import Progress
from codi.training.decoder import DecoderRecipe
from codi.training.distill import DistillJob, DistillRecipe, distill, recipe_task
from codi.training.pretrain_recipe import PretrainRecipe
from codi.training.trainer import RunSettings, learning_rate_factor, make_optimizer
from tiny import TEXT_WIDTH, rand, randn, tiny_checkpoint


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> DistillRecipe:
    """Return the recipe of 4 updates of 2 images on a tiny backbone and eight noise images."""
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


@pytest.fixture(scope="module")
def finished(tiny_run) -> Path:
    """Return the folder of that run, trained without interruption."""
    return distill(tiny_run, quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a finished adapter, including those of a trained backbone."""
    files = sorted(folder.glob("*.safetensors")) + sorted((folder / "unet").glob("*.safetensors"))
    return {f"{f.parent.name if f.parent != folder else ''}/{k}": v for f in files for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# A shared backbone with low-rank updates, and guidance by the prompt.
SHARED = {"train_backbone": False, "lora_rank": 2, "guidance": {"text": [1, 4]}, "guidance_scale": 2.0}


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["full", "shared"])
def test_four_updates_equal_two_and_resume_two(tiny_run, tmp_path, monkeypatch, changes):
    tiny_run = replace(tiny_run, **changes)
    whole = distill(replace(tiny_run, out=str(tmp_path / "whole")), quiet=True)

    from codi.training.distill import DistillJob

    forward, calls = DistillJob.forward, []

    def fail_in_the_fourth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return forward(self, *args, **kwargs)

    broken = replace(tiny_run, out=str(tmp_path / "broken"))
    monkeypatch.setattr(DistillJob, "forward", fail_in_the_fourth)
    with pytest.raises(RuntimeError, match="power cut"):
        distill(broken, quiet=True)
    assert [p.name for p in checkpoint.complete(Path(broken.out) / "checkpoints")] == ["step-00000002"]
    monkeypatch.setattr(DistillJob, "forward", forward)
    torch.rand(100)  # anything may happen in between: the checkpoint restores the random state
    resumed = distill(broken, quiet=True)
    assert same(weights(whole), weights(resumed))
    assert not same(weights(whole), {k: torch.zeros_like(v) for k, v in weights(whole).items()})
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


def test_state_in_8_bits_is_restored_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = RunSettings(optimizer="adamw8bit")
    online, other = torch.nn.Linear(256, 64), torch.nn.Linear(256, 64)
    optimizers = [make_optimizer(settings, [{"params": list(net.parameters())}]) for net in (online, other)]

    def update(net, optimizer, seed):
        net(randn(8, 256, seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        update(online, optimizers[0], seed)
    folder = checkpoint.save(tmp_path, Progress(), online, online, optimizers[0], {})
    checkpoint.load(folder, other, other, optimizers[1])
    state = optimizers[1].state[other.weight]
    assert state["state1"].dtype == torch.uint8 and state["step"] == 3
    for net, optimizer in zip((online, other), optimizers, strict=True):
        update(net, optimizer, 3)
    assert torch.equal(online.weight, other.weight) and torch.equal(online.bias, other.bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer 'sgd': not known"),
        ({"optimizer": "adamw8bit"}, "needs bitsandbytes: pip install"),
    ],
)
def test_unknown_optimizers_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr("codi.training.trainer.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        RunSettings(**changes).validate()


def test_kill_in_the_middle_of_a_checkpoint_loses_nothing(tiny_run, finished, tmp_path):
    out = tmp_path / "killed"
    # SIGKILL hits the second checkpoint after its first file, so nothing is cleaned up.
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
    remaining = [p.name for p in (out / "checkpoints").iterdir()]
    assert any(name.startswith(".writing-") for name in remaining) and "step-00000002" in remaining
    resumed = distill(replace(tiny_run, out=str(out)), quiet=True)
    assert same(weights(finished), weights(resumed))
    assert not any(p.name.startswith(".writing-") for p in (out / "checkpoints").iterdir())


def test_accumulation_equals_one_large_batch_of_the_plain_loss(tiny_run, tmp_path):
    """Two accumulated batches of two move the weights as far as one batch of four does: the same image count."""
    out = distill(replace(tiny_run, out=str(tmp_path / "a"), accumulate=2, objective="finetune"), quiet=True)
    state = json.loads((checkpoint.complete(out / "checkpoints")[-1] / "state.json").read_text())
    assert state["progress"]["updates"] == 2 and state["progress"]["images"] == 8


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"adapter": "controlnet"}, {"shift": 3.0}]
)
def test_optional_settings_train(tiny_run, tmp_path, changes):
    out = distill(replace(tiny_run, out=str(tmp_path / "run"), images=4, **changes), quiet=True)
    assert all(bool(torch.isfinite(v).all()) for v in weights(out).values())
    assert (out / "log.jsonl").read_text().count("\n") >= 1 and list((out / "tensorboard").iterdir())


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["full", "shared"])
def test_gradient_checkpointing_changes_no_weight(tiny_run, tmp_path, changes):
    tiny_run = replace(tiny_run, **changes)
    plain = distill(replace(tiny_run, out=str(tmp_path / "plain"), images=4), quiet=True)
    saving = distill(replace(tiny_run, out=str(tmp_path / "saving"), images=4, gradient_checkpointing=True), quiet=True)
    for (name, a), b in zip(weights(plain).items(), weights(saving).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_parameter_efficient_training_leaves_the_backbone_unchanged_and_full_does_not(tiny_run, finished, tmp_path):
    backbone = load_backbone(tiny_run.model)
    pe = distill(replace(tiny_run, out=str(tmp_path / "pe"), train_backbone=False), quiet=True)
    assert not (pe / "unet").exists()
    before = backbone.unet.state_dict()
    _, unet = load_adapter(pe, "upscale", backbone.family, backbone.unet)
    assert unet is backbone.unet
    shared = distill(replace(tiny_run, out=str(tmp_path / "shared"), **SHARED), quiet=True)
    assert not (shared / "unet").exists()
    _, unet = load_adapter(shared, "upscale", backbone.family, backbone.unet)
    theirs = {id(p) for p in backbone.unet.parameters()}
    mine = {name: p for name, p in unet.named_parameters() if id(p) not in theirs}
    assert len(mine) == len(list(unet.parameters())) - len(theirs) and all("lora_" in name for name in mine)
    assert lora_names(unet) == ["upscale"] and all(bool(p.any()) for p in mine.values())
    _, unet = load_adapter(finished, "upscale", backbone.family, backbone.unet)
    assert any(not torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_the_finished_adapter_describes_itself(tiny_run, tmp_path):
    out = distill(replace(tiny_run, out=str(tmp_path / "run"), images=4), quiet=True)
    info = json.loads((out / "config.json").read_text())["info"]
    backbone = load_backbone(tiny_run.model)
    assert (info["task"], info["family"]) == ("upscale", backbone.family)
    assert info["backbone"] == digest(backbone.unet)  # the digest of the starting weights, even for a full adapter
    assert info["images"] == 4 and set(info["metrics"]) == {"obedience_1", "obedience_2", "obedience_4"}
    assert (out / "checkpoints").is_dir() and list((out / "previews").glob("*.png"))
    expected = {"full": True, "guidance": {}, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "shift": 1.0}
    assert {key: info[key] for key in expected} == expected


TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "upscale": {"task_options": {"scale": 4}},
    "inpaint": {"guidance": {"text": [1, 4]}, "guidance_scale": 3.0, "shift": 3.0},
    "depth": {},
    "canny": {"adapter": "controlnet"},
    "edit": {"guidance": {"text": [1, 4], "image": [1, 2]}, "guidance_scale": 2.0, "image_guidance_scale": 1.5},
    "generate": {"adapter": "lora", "guidance": {"text": [1, 4]}, "guidance_share": 1.0},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_distilled(tiny_run, tmp_path, task):
    """Two updates on rendered scenes with a shared backbone; the adapter loads and changes the prediction."""
    run = replace(
        tiny_run, out=str(tmp_path / task), task=task, data="scenes:train:8", held_out="scenes:held-out:2", images=4,
        degradation=None, train_backbone=False, lora_rank=2, half=True, **TASK_SETTINGS.get(task, {}),
    )  # fmt: skip
    out, backbone = distill(run, quiet=True), load_backbone(tiny_run.model)
    adapter, unet = load_adapter(out, task, backbone.family, backbone.unet)
    info = json.loads((out / "config.json").read_text())["info"]
    assert info["task"] == task and get_task(task, **info["task_options"]) == recipe_task(run)
    for key in ("guidance", "guidance_scale", "image_guidance_scale", "shift"):
        assert info[key] == getattr(run, key)
    assert lora_names(unet) == [task] and lora_names(backbone.unet) == []
    assert all(v.dtype == torch.float16 for v in weights(out).values() if v.is_floating_point())
    assert adapter.config["condition_channels"] == get_task(task).condition_channels
    condition = adapter.read(torch.rand(1, get_task(task).condition_channels, 32, 32), backbone.vae)
    student, z, t = Student(unet, adapter), torch.ones(1, 4, 8, 8), torch.tensor([500])
    conditioning = Conditioning(torch.ones(1, 5, 8), condition)
    with torch.no_grad():
        assert not torch.equal(student(z, t, conditioning), backbone.unet(z, t, conditioning.text).sample)
    assert list((out / "previews").glob("*.png"))


def test_guidance_scales_are_drawn_within_their_ranges(tiny_run, tmp_path, monkeypatch):
    """Scales lie in their ranges and are 1 without prompt; the share of guided updates is as configured."""
    from codi.training.distill import DistillJob

    draw, drawn = DistillJob.guidance, []

    def record(self, conditioning, dropped, generator):
        drawn.append((conditioning, dropped, draw(self, conditioning, dropped, generator)))
        return drawn[-1][-1]

    monkeypatch.setattr(DistillJob, "guidance", record)
    settings = {"guidance": {"text": [2, 4], "image": [1.5, 2]}, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    run = replace(tiny_run, **{**SHARED, **settings}, preview_every=1000)
    distill(replace(run, out=str(tmp_path / "all"), guidance_share=1.0), quiet=True)
    assert len(drawn) == 4 and any(bool(dropped.any()) for _, dropped, _ in drawn)
    for conditioning, dropped, guidance in drawn:
        full, image_alone, nothing = guidance.ladder
        assert full is conditioning and image_alone.condition is full.condition and nothing.condition is None
        assert torch.equal(image_alone.text, nothing.text) and full.guidance is None
        assert torch.equal(full.text[dropped], nothing.text[dropped])
        text, image = guidance.scales.unbind(1)
        assert (text[dropped] == 1).all() and ((text[~dropped] >= 2) & (text[~dropped] <= 4)).all()
        assert ((image >= 1.5) & (image <= 2)).all()
    drawn.clear()
    distill(replace(run, out=str(tmp_path / "none"), guidance_share=0.0), quiet=True)
    assert len(drawn) == 4 and all(guidance is None for *_, guidance in drawn)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({**SHARED, "lora_rank": 0}, "lora_rank 0: .*trained with 2"),
        ({**SHARED, "guidance": {"text": [1, 4], "image": [1, 2]}}, "2 scales, .* trained with 1"),
        ({**SHARED, "adapter": "controlnet"}, "not a controlnet adapter"),
        ({**SHARED, "task": "canny", "degradation": None}, "'upscale', not 'canny'"),
    ],
)
def test_a_start_of_another_kind_is_refused(tiny_run, shared_adapter, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        distill(replace(tiny_run, out=str(tmp_path / "run"), start=str(shared_adapter), **changes), quiet=True)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def shared_adapter(tiny_run, tmp_path_factory) -> Path:
    """A finished run of SHARED."""
    out = tmp_path_factory.mktemp("shared") / "adapter"
    return distill(replace(tiny_run, out=str(out), images=4, **SHARED), quiet=True)


def test_training_continues_a_shared_adapter(tiny_run, shared_adapter, tmp_path):
    """Training continues the low-rank updates of the start, and keeps its guidance unless the recipe sets one."""
    run = replace(tiny_run, out=str(tmp_path / "run"), start=str(shared_adapter), images=2, learning_rate=0.0)
    out = distill(replace(run, **SHARED), quiet=True)
    assert same(weights(out), weights(shared_adapter))
    moved = distill(replace(run, **SHARED, out=str(tmp_path / "moved"), learning_rate=1e-2), quiet=True)
    assert not same(weights(moved), weights(shared_adapter))


def test_non_finite_loss_stops_with_the_last_good_checkpoint(tiny_run, finished, tmp_path, monkeypatch):
    from codi.training.distill import DistillJob

    forward, calls = DistillJob.forward, []

    def return_nan(self, *args, **kwargs):
        calls.append(1)
        losses = forward(self, *args, **kwargs)
        return losses if len(calls) < 4 else {k: v * float("nan") for k, v in losses.items()}

    monkeypatch.setattr(DistillJob, "forward", return_nan)
    run = replace(tiny_run, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="not finite.*step-00000002"):
        distill(run, quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(DistillJob, "forward", forward)
    assert same(weights(distill(run, quiet=True)), weights(finished))


def test_a_folder_of_another_run_is_not_resumed(tiny_run, tmp_path):
    run = replace(tiny_run, out=str(tmp_path / "run"), images=4)
    distill(run, quiet=True)
    with pytest.raises(UserError, match="learning_rate"):
        distill(replace(run, learning_rate=0.5), quiet=True)
    # Nor is one from before a key existed, if the key now differs from its default.
    state = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1] / "state.json"
    checkpoint.edit_json(
        state, recipe={"format": 2} | {k: v for k, v in vars(run).items() if k not in ("mu_rate", "guidance")}
    )
    for changes in ({"mu_rate": 1.0}, {"guidance": {"text": [1, 4]}}):
        with pytest.raises(UserError, match=f"holds a run with {next(iter(changes))}"):
            distill(replace(run, **changes), quiet=True)
    distill(run, quiet=True)


@pytest.mark.parametrize("frozen", [{}, {"train_backbone": False, "lora_rank": 2}], ids=["full", "frozen"])
def test_release_steps_use_the_backbone_without_the_condition(tiny_run, tmp_path, frozen):
    recipe = replace(tiny_run, out=str(tmp_path / "run"), objective="codi-release", images=4, **frozen)
    backbone, source = load_backbone(recipe.model), open_source(recipe.data, recipe_task(recipe).columns)
    plain, job = Student(load_backbone(recipe.model).network), DistillJob(recipe, backbone, source, source, tmp_path)
    z, t, text = randn(1, 4, 8, 8), torch.tensor([500]), randn(1, 5, TEXT_WIDTH, seed=2)
    condition = job.online.adapter.read(rand(1, 3, 32, 32), backbone.vae)
    with torch.no_grad():
        for parameter in job.online.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(job.teacher(z, t, Conditioning(text, condition)), plain(z, t, Conditioning(text)))
    assert weights(distill(recipe, quiet=True))


def test_runs_with_old_objective_names_resume(tiny_run, tmp_path):
    run = replace(tiny_run, out=str(tmp_path / "run"), images=4, objective="codi-tuned")
    state = checkpoint.complete(distill(run, quiet=True) / "checkpoints")[-1] / "state.json"
    assert json.loads(state.read_text())["recipe"]["format"] == 2
    with pytest.raises(UserError, match="holds a run with objective 'codi-tuned', not 'codi'"):
        distill(replace(run, objective="codi"), quiet=True)
    for old, new in (("codi", "codi-tuned"), ("paper", "codi"), ("finetune", "finetune")):
        checkpoint.edit_json(state, recipe={**vars(run), "objective": old})
        distill(replace(run, objective=new), quiet=True)
    with pytest.warns(UserWarning, match="paper: is called codi now"):
        assert replace(run, objective="paper").objective == "codi"


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
    values |= recipes.parse_overrides(["--precision", "no"])  # which YAML reads as false
    assert recipes.build(DistillRecipe, values, "flags").precision == "no"


@pytest.mark.parametrize("name", recipes.shipped_recipes())
def test_every_shipped_recipe_builds(name):
    from codi.training.decoder import DecoderRecipe
    from codi.training.pretrain_recipe import PretrainRecipe

    values = recipes.read_recipe(name)
    kind = DecoderRecipe if name.endswith("decoder") else PretrainRecipe if "ldm_images" in values else DistillRecipe
    recipes.build(kind, values, name).validate()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e300, 10**400])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((DistillRecipe, name) for name in ("learning_rate", "weight_decay", "decay_to", "warmup", "seed", "images",
                                             "accumulate", "max_corrupt", "mu_rate", "size", "keep")),
        *((PretrainRecipe, name) for name in ("vae_learning_rate", "textures", "kl_weight", "decoder_noise", "warmup",
                                              "prompt_dropout", "vae_images", "ldm_batch")),
        *((DecoderRecipe, name) for name in ("learning_rate", "max_corrupt", "sample_guidance", "pairs", "seed")),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(kind, name, value):
    with pytest.raises(UserError, match=rf"^{name} .*: (must|not) ") as error:
        kind(out="x", **{name: value}).validate()
    assert len(str(error.value)) < 200


def test_invalid_gradient_clips_are_refused():
    for clip in (0, -1.0, float("nan")):
        with pytest.raises(UserError, match="clip .*: must be above 0"):
            RunSettings(clip=clip).validate()
    RunSettings(clip=float("inf")).validate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "cody"}, "did you mean 'codi'"),
        ({"adapter": "fuse"}, "did you mean 'fused'"),
        ({"objective_options": {"dtt": 1}}, "did you mean 'dt'"),
        ({"objective_options": {"dt": 0}}, "dt 0: must be a whole number"),
        ({"objective": "flow-map", "objective_options": {"weight_end": 0}}, "weight_end 0: must be a number above 0"),
        ({"objective": "flow-map", "objective_options": {"warmup": 1.0}}, "warmup 1.0: must be a share from 0"),
        ({"objective": "decoupled", "objective_options": {"dt_end": 0}}, "dt_end 0: must be a whole number"),
        ({"objective_options": {"d_x": "pixels"}}, "did you mean 'pixel'"),
        ({"task": "upscal"}, "did you mean 'upscale'"),
        ({"batch_size": 0}, "at least 1"),
        ({"precision": "fp8"}, "use one of"),
        ({"size": 30}, "multiple"),
        ({"lora_rank": 4}, "lora_rank 4: .*train_backbone: false"),
        ({"lora_rank": -1, "train_backbone": False}, "rank from 1 up"),
        ({"guidance": {"txt": [1, 4]}}, "unknown scale 'txt': known are text, image"),
        ({"guidance": {"image": [1, 2]}, "train_backbone": False}, "image alone"),
        ({"guidance": {"text": [1, 4], "image": [1, 2]}}, "guidance: image: .*: set train_backbone: false"),
        *[
            ({"guidance": {"text": span}}, r"guidance: text .*\[least, most\]")
            for span in ([4, 1], [0, 2], [2], 3, "ab")
        ],
        ({"guidance": {"text": [1, 4]}, "guidance_scale": 5.0}, "guidance_scale 5: not within .* 1 to 4"),
        ({"image_guidance_scale": 1.5}, "image_guidance_scale 1.5: not within"),
        ({"guidance_share": 1.5}, "guidance_share 1.5: must lie in"),
        *[({"shift": shift}, "shift .*: must be above 0") for shift in (0.0, -1.0)],
        ({"objective_options": {"signal_weighting": "velo"}}, "use one of signal, velocity"),
        ({"objective_options": {"signal_weighting": "velocity", "d_x": "pixel"}}, "use it with d_x: latent"),
    ],
)
def test_unusable_recipe_values_are_refused(tiny_run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        distill(replace(tiny_run, out=str(tmp_path / "run"), **changes), quiet=True)
    assert "\n" not in str(error.value)
