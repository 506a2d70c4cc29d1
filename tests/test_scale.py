"""Several processes train what one would: same recipe, same weights; one's trouble ends all, and nobody is stuck."""

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

# Sums over the batches of an update are taken in another order: float32 rounding, which Adam may enlarge where a
# gradient is near 0. Weights move by up to 1e-3 an update here.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> DistillRecipe:
    """Four updates of four batches of two pictures, guidance in some of them: full CoDi."""
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


def words(recipe: DistillRecipe, **changes: Any) -> list[str]:
    """The command line of a recipe."""
    path = Path(recipe.out).parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in vars(recipe).items() if v is not None}))
    return ["distill", str(path), *(f"--{name.replace('_', '-')}={value}" for name, value in changes.items())]


@pytest.fixture(scope="module")
def one(recipe) -> Path:
    """That run in one process."""
    return distill(recipe, quiet=True)


def from_its_middle(one: Path, out: Path) -> Path:
    """`out`, holding a run that got as far as two updates of `one`."""
    (middle,) = [p for p in checkpoint.complete(one / "checkpoints") if p.name == "step-00000002"]
    shutil.copytree(middle, out / "checkpoints" / middle.name)
    return out


def assert_same(a: Path, b: Path) -> None:
    """The finished adapters, and the newest checkpoints with the optimiser's state."""
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
    """The same in two processes: its folder, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", launch(folder / "said", *words(recipe, out=folder / "run"), "--json")


def test_two_processes_train_what_one_does(one, two):
    out, ended = two
    assert ended.codes == [0, 0], ended.err
    assert_same(one, out)
    for name in ("signal", "consistency", "gradient_norm"):
        assert logged(out, name) == pytest.approx(logged(one, name), rel=1e-4)
    assert len(logged(out, "signal")) == 4
    state = json.loads((checkpoint.complete(out / "checkpoints")[-1] / "state.json").read_text())
    assert (state["progress"]["updates"], state["progress"]["images"]) == (4, 32)
    assert json.loads(ended.out[0])["finished"] and ended.out[1] == "" and ended.err == ["", ""]
    # What each of them read, in a file of its own.
    read = [json.loads((out / name).read_text())["read"] for name in ("corrupt.json", "corrupt-1.json")]
    assert all(8 <= number <= 16 for number in read) and sum(read) >= 16


def test_one_goes_on_where_two_stopped(recipe, one, two, tmp_path):
    out = from_its_middle(two[0], tmp_path / "run")
    assert_same(one, distill(replace(recipe, out=str(out)), quiet=True))


def test_split_over_two_going_on_where_one_stopped(recipe, one, tmp_path):
    """FSDP: into shards from a whole checkpoint, and back into whole files."""
    out = from_its_middle(one, tmp_path / "run")
    ended = launch(tmp_path / "said", *words(recipe, out=out, shard=True))
    assert ended.codes == [0, 0], ended.err
    assert_same(one, out)
    assert logged(out, "obedience_4") == pytest.approx(logged(one, "obedience_4"), abs=1e-2)


@pytest.mark.parametrize("adapter", ["fused", "lora"])
def test_a_transformer_split_over_two_trains_as_in_one(adapter, tmp_path):
    """FSDP over the blocks of FLUX.1's layout, as the recipes train it: low-rank updates, gradient checkpointing."""
    tiny_flux().pipeline().save_pretrained(tmp_path / "model")
    recipe = DistillRecipe(
        out=str(tmp_path / "one"), task="generate" if adapter == "lora" else "depth", model=str(tmp_path / "model"),
        data="scenes:train:8", held_out="scenes:held-out:2", size=32, images=8, batch_size=2, adapter=adapter,
        lora_rank=2, train_backbone=False, learning_rate=1e-3, preview_every=100, gradient_checkpointing=True,
        accumulate=2, warmup=0, device="cpu",
    )  # fmt: skip
    one, out = distill(recipe, quiet=True), tmp_path / "two"
    ended = launch(tmp_path / "said", *words(recipe, out=out, shard=True))
    assert ended.codes == [0, 0], ended.err
    files = [file.relative_to(one) for file in one.glob("*.safetensors")]
    assert files
    for file in files:
        mine, theirs = load_file(one / file), load_file(out / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **CLOSE)
    ended = launch(tmp_path / "said", *words(recipe, out=tmp_path / "bf16", shard=True, precision="bf16"))
    assert ended.codes == [0, 0], ended.err


def fails(how: Callable[[], dict[str, torch.Tensor]], share: int) -> Callable[[int], None]:
    """Makes `how` happen in process 1 instead of its batch number `share`."""
    forward, calls = DistillJob.forward, []

    def second(self, batch, generator):
        calls.append(1)
        return how() if len(calls) == share else forward(self, batch, generator)

    def before(rank: int) -> None:
        if rank == 1:
            DistillJob.forward = second  # of this process alone

    return before


def bad_data(rank: int) -> None:
    """Process 1 cannot read on in the third update."""
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
    "before, says",
    [
        (bad_data, ["process 1 of 2: bad.png: not a picture", ""]),
        (fails(lambda: NAN, 6), ["process 1 of 2: loss at image 16: not finite", ""]),
        (fails(lambda: raise_(UserError("map.png: no map: mend it")), 6), ["another process", "map.png: no map"]),
        (fails(lambda: raise_(MemoryError("oops")), 6), ["another process", "not enough memory"]),
    ],
    ids=["bad data", "not finite", "bad input", "no memory"],
)
def test_one_s_failure_ends_all(recipe, tmp_path, before, says):
    ended = launch(tmp_path / "said", *words(recipe, out=tmp_path / "run"), before=before)
    assert ended.codes == [1, 1], ended.err
    for line, told in zip(says, ended.err, strict=True):
        assert told.count("\n") == bool(line) and line in told
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_signal_to_one_stops_all_with_a_checkpoint(recipe, one, tmp_path):
    forward, calls = DistillJob.forward, []

    def before(rank: int) -> None:
        def signalled(self, batch, generator):
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, batch, generator)

        DistillJob.forward = signalled

    out = tmp_path / "run"
    ended = launch(tmp_path / "said", *words(recipe, out=out), before=before)
    assert ended.codes == [130, 130] and ended.err == ["error: interrupted\n", ""]
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-00000002"]
    assert json.loads((out / "config.json").read_text())["info"]["images"] == 16
    assert main(words(recipe, out=out)) == 0
    assert_same(one, out)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"accumulate": 3}, "accumulate 3: cannot be shared by 2 processes: set it to a multiple of 2"),
        ({"model": "nowhere"}, "nowhere: no model there"),
    ],
)
def test_what_all_refuse_is_said_once(recipe, tmp_path, changes, line):
    ended = launch(tmp_path / "said", *words(recipe, out=tmp_path / "run", **changes))
    assert ended.codes == [1, 1]
    assert line in ended.err[0] and ended.err[0].count("\n") == 1 and ended.err[1] == ""


def test_pretraining_in_two_processes(tmp_path, monkeypatch):
    # A vocabulary is not learnt alike twice.
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
    ended = launch(tmp_path / "said", "pretrain", tmp_path / "recipe.yaml", "--out", outs[1])
    assert ended.codes == [0, 0], ended.err
    for stage in ("codec", "ldm"):
        newest = [checkpoint.complete(out / "training" / stage / "checkpoints")[-1] for out in outs]
        weights = [load_file(folder / "weights.safetensors") for folder in newest]
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], **CLOSE, msg=f"{stage} {name}")


def test_torchrun_starts_it(recipe, one, tmp_path):
    """The real launcher, without any configuration of accelerate's."""
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "codi"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *words(recipe, out=out, images=8, preview_every=100)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("finished after 8 images") == 1
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-00000001"]
