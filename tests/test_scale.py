"""Several processes train what one would; a failure of one ends all, and none waits forever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from codi.apps.cli import main
from codi.errors import UserError
from codi.training import checkpoint
from codi.training.distill import DistillJob, DistillRecipe, distill
from families import tiny_flux
from folders import noise
from launch import launch
from tiny import tiny_checkpoint, tiny_tokenizer

# Sums over the batches of an update are taken in another order: float32 rounding, which Adam may amplify where a
# gradient is near 0. Weights move by up to 1e-3 an update here.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> DistillRecipe:
    """Return the recipe of full CoDi: four updates of four batches of two images, some of them with guidance."""
    folder = tmp_path_factory.mktemp("scale")
    model, pictures, held_out = tiny_checkpoint(folder / "model"), folder / "pictures", folder / "held-out"
    for part, count in ((pictures, 16), (held_out, 2)):
        part.mkdir()
        for i in range(count):
            noise(40, 40, i).save(part / f"{i}.png")
    return DistillRecipe(
        out=str(folder / "one"), model=str(model), data=str(pictures), held_out=str(held_out), size=32, images=32,
        batch_size=2, accumulate=4, warmup=8, learning_rate=1e-3, log_every=8, preview_every=32, checkpoint_every=16,
        device="cpu", degradation="bicubic", half=False, guidance={"text": [1.0, 4.0]}, guidance_scale=2.0,
    )  # fmt: skip


def command_line(recipe: DistillRecipe, **changes: Any) -> list[str]:
    """Return the command line of a recipe."""
    path = Path(recipe.out).parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in vars(recipe).items() if v is not None}))
    return ["distill", str(path), *(f"--{name.replace('_', '-')}={value}" for name, value in changes.items())]


@pytest.fixture(scope="module")
def one(recipe) -> Path:
    """Return the folder of that run, trained in one process."""
    return distill(recipe, quiet=True)


def half_trained(one: Path, out: Path) -> Path:
    """Copy the checkpoint after two updates of `one` into `out`, and return `out`."""
    (middle,) = [p for p in checkpoint.complete(one / "checkpoints") if p.name == "step-00000002"]
    shutil.copytree(middle, out / "checkpoints" / middle.name)
    return out


def assert_same(a: Path, b: Path) -> None:
    """Compare the finished adapters, and the newest checkpoints with the optimizer's state."""
    files = [f.relative_to(a) for f in (*a.glob("*.safetensors"), *a.glob("unet/*.safetensors"))]
    newest = checkpoint.complete(a / "checkpoints")[-1].relative_to(a)
    files += [newest / f"{name}.safetensors" for name in ("weights", "average", "optimizer")]
    assert len(files) == 5
    for file in files:
        mine, theirs = load_file(a / file), load_file(b / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **CLOSE, msg=lambda m, n=f"{file} {name}": f"{n}: {m}")


def logged(out: Path, name: str) -> list[float]:
    return [row[name] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if name in row]


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    """Return the folder of that run, trained in two processes, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", launch(folder / "logs", *command_line(recipe, out=folder / "run"), "--json")


def test_two_processes_train_the_same_as_one(one, two):
    out, ended = two
    assert ended.codes == [0, 0], ended.err
    assert_same(one, out)
    for name in ("signal", "consistency", "gradient_norm"):
        assert logged(out, name) == pytest.approx(logged(one, name), rel=1e-4)
    assert len(logged(out, "signal")) == 4
    state = json.loads((checkpoint.complete(out / "checkpoints")[-1] / "state.json").read_text())
    assert (state["progress"]["updates"], state["progress"]["images"]) == (4, 32)
    assert json.loads(ended.out[0])["finished"] and ended.out[1] == "" and ended.err == ["", ""]
    # The images that each process read, each in a file of its own.
    read = [json.loads((out / name).read_text())["read"] for name in ("corrupt.json", "corrupt-1.json")]
    assert all(8 <= number <= 16 for number in read) and sum(read) >= 16


def test_one_process_resumes_a_run_of_two(recipe, one, two, tmp_path):
    out = half_trained(two[0], tmp_path / "run")
    assert_same(one, distill(replace(recipe, out=str(out)), quiet=True))


def test_two_processes_with_fsdp_resume_a_run_of_one(recipe, one, tmp_path):
    """FSDP: a whole checkpoint is loaded into shards, and the shards are saved as whole files."""
    out = half_trained(one, tmp_path / "run")
    ended = launch(tmp_path / "logs", *command_line(recipe, out=out, shard=True))
    assert ended.codes == [0, 0], ended.err
    assert_same(one, out)
    assert logged(out, "obedience_4") == pytest.approx(logged(one, "obedience_4"), abs=1e-2)


@pytest.mark.parametrize("adapter", ["fused", "lora"])
def test_a_transformer_sharded_over_two_processes_trains_as_in_one(adapter, tmp_path):
    """FSDP over the blocks of FLUX.1's layout, trained as the recipes do: low-rank updates, gradient checkpointing."""
    tiny_flux().pipeline().save_pretrained(tmp_path / "model")
    recipe = DistillRecipe(
        out=str(tmp_path / "one"), task="generate" if adapter == "lora" else "depth", model=str(tmp_path / "model"),
        data="scenes:train:8", held_out="scenes:held-out:2", size=32, images=8, batch_size=2, adapter=adapter,
        lora_rank=2, train_backbone=False, learning_rate=1e-3, preview_every=100, gradient_checkpointing=True,
        accumulate=2, warmup=0, device="cpu",
    )  # fmt: skip
    one, out = distill(recipe, quiet=True), tmp_path / "two"
    ended = launch(tmp_path / "logs", *command_line(recipe, out=out, shard=True))
    assert ended.codes == [0, 0], ended.err
    files = [file.relative_to(one) for file in one.glob("*.safetensors")]
    assert files
    for file in files:
        mine, theirs = load_file(one / file), load_file(out / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **CLOSE)
    ended = launch(tmp_path / "logs", *command_line(recipe, out=tmp_path / "bf16", shard=True, precision="bf16"))
    assert ended.codes == [0, 0], ended.err


def failing(action: Callable[[], dict[str, torch.Tensor]], number: int) -> Callable[[int], None]:
    """Return a hook that makes process 1 run `action` instead of its batch `number`."""
    forward, calls = DistillJob.forward, []

    def forward_or_fail(self, batch, generator):
        calls.append(1)
        return action() if len(calls) == number else forward(self, batch, generator)

    def before(rank: int) -> None:
        if rank == 1:
            DistillJob.forward = forward_or_fail  # in this process only

    return before


def bad_data(rank: int) -> None:
    """Make process 1 fail to read data in the third update."""
    from codi.training import distill as module

    drawn = module.batches

    def broken(*arguments, **options):
        for number, batch in enumerate(drawn(*arguments, **options)):
            if rank == 1 and number == 5:
                raise UserError("bad.png: not a picture: remove it")
            yield batch

    module.batches = broken


def raise_(error: BaseException) -> Any:
    raise error


NAN = {"signal": torch.tensor(float("nan"), requires_grad=True)}


@pytest.mark.parametrize(
    "before, messages",
    [
        (bad_data, ["process 1 of 2: bad.png: not a picture", ""]),
        (failing(lambda: NAN, 6), ["process 1 of 2: loss at image 16: not finite", ""]),
        (failing(lambda: raise_(UserError("map.png: no map: replace it")), 6), ["another process", "map.png: no map"]),
        (failing(lambda: raise_(MemoryError("oops")), 6), ["another process", "not enough memory"]),
    ],
    ids=["bad data", "not finite", "bad input", "no memory"],
)
def test_a_failure_of_one_process_ends_all(recipe, tmp_path, before, messages):
    ended = launch(tmp_path / "logs", *command_line(recipe, out=tmp_path / "run"), before=before)
    assert ended.codes == [1, 1], ended.err
    for line, error in zip(messages, ended.err, strict=True):
        assert error.count("\n") == bool(line) and line in error
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(recipe, one, tmp_path):
    forward, calls = DistillJob.forward, []

    def before(rank: int) -> None:
        def forward_or_signal(self, batch, generator):
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, batch, generator)

        DistillJob.forward = forward_or_signal

    out = tmp_path / "run"
    ended = launch(tmp_path / "logs", *command_line(recipe, out=out), before=before)
    assert ended.codes == [130, 130] and ended.err == ["error: interrupted\n", ""]
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-00000002"]
    assert json.loads((out / "config.json").read_text())["info"]["images"] == 16
    assert main(command_line(recipe, out=out)) == 0
    assert_same(one, out)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"accumulate": 3}, "accumulate 3: cannot be shared by 2 processes: set it to a multiple of 2"),
        ({"model": "nowhere"}, "nowhere: no model there"),
    ],
)
def test_an_error_of_all_processes_is_printed_once(recipe, tmp_path, changes, line):
    ended = launch(tmp_path / "logs", *command_line(recipe, out=tmp_path / "run", **changes))
    assert ended.codes == [1, 1]
    assert line in ended.err[0] and ended.err[0].count("\n") == 1 and ended.err[1] == ""


def test_pretraining_in_two_processes_equals_one(tmp_path, monkeypatch):
    # Two trainings of a vocabulary may differ.
    monkeypatch.setattr("codi.training.pretrain.train_tokenizer", lambda _, out: tiny_tokenizer().save_pretrained(out))
    values = dict(
        data="scenes:train:16", held_out="scenes:held-out:4", size=32, vae_images=16, vae_batch=2, vae_crop=16,
        vae_widths=[8, 8, 8], latent_channels=4, ldm_images=16, ldm_batch=2, unet_widths=[16, 32], unet_layers=1,
        text_width=32, text_layers=1, warmup=4, accumulate=2, device="cpu", log_every=8, preview_every=16,
        checkpoint_every=16,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    outs = [tmp_path / "one", tmp_path / "two"]
    assert main(["pretrain", str(tmp_path / "recipe.yaml"), "--out", str(outs[0])]) == 0
    ended = launch(tmp_path / "logs", "pretrain", tmp_path / "recipe.yaml", "--out", outs[1])
    assert ended.codes == [0, 0], ended.err
    for stage in ("codec", "ldm"):
        newest = [checkpoint.complete(out / "training" / stage / "checkpoints")[-1] for out in outs]
        weights = [load_file(folder / "weights.safetensors") for folder in newest]
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], **CLOSE, msg=f"{stage} {name}")


def test_torchrun_starts_a_training(recipe, one, tmp_path):
    """The real launcher, without a configuration of accelerate."""
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "codi"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *command_line(recipe, out=out, images=8, preview_every=100)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("finished after 8 images") == 1
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-00000001"]
