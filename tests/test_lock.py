"""One training per folder at a time, and no leftovers of one that was killed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from codi.errors import UserError
from codi.files import LOCK, locked
from codi.training import checkpoint
from codi.training.checkpoint import Progress
from codi.training.decoder import DecoderRecipe, distill_decoder
from codi.training.distill import DistillRecipe, distill
from codi.training.lock import only_run
from codi.training.pretrain import pretrain
from codi.training.pretrain_recipe import PretrainRecipe
from codi.training.saving import place

RUNS = {distill: DistillRecipe, pretrain: PretrainRecipe, distill_decoder: DecoderRecipe}


@pytest.mark.parametrize("train", RUNS)
def test_a_second_training_in_a_folder_is_refused(train, tmp_path):
    """It writes nothing there."""
    recipe = RUNS[train](out=str(tmp_path / "out"), device="cpu")
    with only_run(tmp_path / "out"):
        (tmp_path / "out" / ".writing-x").mkdir()  # of the first training, still running
        with pytest.raises(UserError, match=r"out: another training is at work there: wait .* --out$"):
            train(recipe, quiet=True)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [LOCK, ".writing-x"]


def test_a_folder_that_a_run_left_empty_is_removed(tmp_path):
    with locked(tmp_path / "out", "busy"):
        assert (tmp_path / "out" / LOCK).is_file()
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "busy"):
        pass
    assert names(tmp_path / "mine") == []
    with pytest.raises(UserError, match="no such|could not|not supported|no picture"):
        distill(DistillRecipe(out=str(tmp_path / "out"), data=str(tmp_path), device="cpu"), quiet=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"), locked(tmp_path / "file", "busy"):
        pass


def hold(folder: Path, pipe: Any) -> None:
    """Send whether the lock was free, and hold it until the other side answers."""
    try:
        with locked(folder, "busy"):
            pipe.send("in")
            pipe.recv()
    except UserError as error:
        pipe.send(str(error))


def test_a_lock_ends_with_its_process(tmp_path):
    """Of processes that start together exactly one gets the lock; after its SIGKILL the lock is free."""
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    connections = [fork.Pipe() for _ in range(3)]
    processes = [fork.Process(target=hold, args=(out, far)) for _, far in connections]
    for process in processes:
        process.start()
    answers = [near.recv() for near, _ in connections]
    assert sorted(answers) == [f"{out}: busy", f"{out}: busy", "in"]
    with pytest.raises(UserError, match="busy"), locked(out, "busy"):
        pass
    processes[answers.index("in")].kill()
    for process in processes:
        process.join()
    with locked(out, "busy"):
        pass


def saved(root: Path, updates: int, keep: int = 2) -> Path:
    """Save a checkpoint of a tiny network, and return its folder."""
    net = torch.nn.Linear(2, 2)
    return checkpoint.save(root, Progress(updates), net, net, torch.optim.AdamW(net.parameters()), {}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("deleted", [0, 1, 3])
def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_partial_one(tmp_path, monkeypatch, deleted):
    """A partly deleted checkpoint no longer counts as one, and the next run removes the rest."""
    root = tmp_path / "checkpoints"
    saved(root, 1, keep=1)

    def interrupt(folder, **_):
        if folder.is_dir():
            for file in sorted(folder.iterdir())[:deleted]:
                file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("codi.training.checkpoint.shutil.rmtree", interrupt)
        saved(root, 2, keep=1)
    assert [p.name for p in checkpoint.complete(root)] == ["step-00000002"] and len(names(root)) == 2
    checkpoint.clean(tmp_path)
    assert names(root) == ["step-00000002"]


def test_leftovers_of_earlier_versions_are_removed(tmp_path):
    """Earlier versions deleted a checkpoint under its own name."""
    root = tmp_path / "checkpoints"
    for updates in (1, 2):
        saved(root, updates)
    (root / "step-00000001" / "state.json").unlink()
    (tmp_path / "step-own").mkdir()  # outside checkpoints/: a folder of the user
    checkpoint.clean(tmp_path)
    assert names(root) == ["step-00000002"] and names(tmp_path) == ["checkpoints", "step-own"]


@pytest.mark.parametrize(
    "leftovers", [[".finished"], [".writing-old-.finished"], [".finished", ".writing-old-.finished"]]
)
@pytest.mark.parametrize("cleaned", [False, True])
def test_leftovers_of_a_kill_while_a_model_is_written_are_removed(tmp_path, leftovers, cleaned):
    for name in leftovers:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("old")
    if cleaned:
        checkpoint.clean(tmp_path)
    for text in ("first", "second"):
        place(tmp_path, lambda folder, text=text: (folder / "config.json").write_text(text), ("config.json",))
        assert (tmp_path / "config.json").read_text() == text
    checkpoint.clean(tmp_path)
    place(tmp_path, lambda folder: (folder / "config.json").write_text("third"), ("config.json",))
    assert names(tmp_path) == ["config.json"]


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def load(folder: Path) -> Progress:
    net = torch.nn.Linear(2, 2)
    return checkpoint.load(folder, net, net, torch.optim.AdamW(net.parameters()))[0]


@pytest.mark.parametrize("file", ["weights", "average", "random", "optimizer"])
def test_a_checkpoint_with_altered_files_is_refused(tmp_path, file):
    folder = saved(tmp_path, 1)
    assert load(folder).updates == 1
    path = folder / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"broken \({file}\.safetensors was altered .*: delete it to go on"):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"broken \({file}\.safetensors is missing"):
        load(folder)


def test_a_checkpoint_without_checksums_loads(tmp_path):
    """With the optimizer's groups, which it stored."""
    folder = saved(tmp_path, 1)
    checkpoint.edit_json(folder / "state.json", files=None, groups=[{"lr": 1.0, "params": [0, 1]}])
    assert load(folder).updates == 1


@pytest.mark.parametrize(
    "state",
    [
        "", "[]", "null", "3", '"x"', "{}", "[" * 100_000,
        *(json.dumps({"progress": progress, "recipe": {}}) for progress in (
            None, [], 3, {"updates": "1"}, {"updates": 1.5}, {"updates": -1}, {"images": True}, {"images": 10**30},
            {"images": None}, {"seconds": "1"}, {"seconds": -1}, {"seconds": float("nan")}, {"seconds": None},
            {"other": 1}, {"images": "9" * 5_000},
        )),
        *(json.dumps({"progress": {}, "recipe": recipe}) for recipe in (None, [], "x")),
        *(json.dumps({"progress": {}, "recipe": {}, "scaler": scaler}) for scaler in ("x", [1], {"scale": "x"})),
    ],
)  # fmt: skip
def test_a_state_with_wrong_types_is_a_one_line_error(tmp_path, state):
    folder = saved(tmp_path, 1)
    (folder / "state.json").write_text(state)
    recipe = DistillRecipe(out="x")
    for read in (lambda: checkpoint.require_same_run(tmp_path, recipe, set()), lambda: load(folder)):
        with pytest.raises(UserError, match=r"state\.json: not the state of a run .*: delete its folder") as error:
            read()
        assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("files", [3, [], "x", {"weights.safetensors": 3}, {"../../no-such-file": "0"}])
def test_an_invalid_list_of_files_is_refused(tmp_path, files):
    folder = saved(tmp_path, 1)
    checkpoint.edit_json(folder / "state.json", files=files)
    with pytest.raises(UserError, match="broken"):
        load(folder)
