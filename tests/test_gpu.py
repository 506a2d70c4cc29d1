"""The jobs of gpu/ on a CPU, at the least scale: what they call, how they go on, and how their results travel."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from codi.apps.cli import main
from codi.training.distill_recipe import DistillRecipe
from codi.training.pretrain_recipe import PretrainRecipe
from tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "gpu"), str(ROOT / "benchmarks")]

import shards  # noqa: E402
import tasks as task_figures  # noqa: E402

# For the interpreter: writes down what it is asked, and leaves an adapter where one would be trained.
STAND_IN = f"""#!/bin/sh
echo "$@" >> "$ASKED"
case "$1" in
gpu/shards.py) exec "{sys.executable}" "$@" ;;
-m)
    mkdir -p "$6/previews"
    echo '"finished": '"$FINISHED" | tee "$6/config.json" "$6/a.safetensors" > "$6/previews/1.png"
    ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """`call(stage, tasks, machine, *words, **more)` runs the job, and says what it asked of the interpreter."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(stage, tasks, machine, *words, **more):
        (tmp_path / "asked").write_text("")
        told = {"PYTHON": "python", "ASKED": "asked", "MODEL": "model", "RUNS": machine, "OUT": f"out-{machine}"}
        told = {name: str(tmp_path / value) for name, value in told.items()}
        told |= {"STAGE": stage, "TASKS": tasks, "DEVICE": "cpu", "SIZE": "32", "COUNT": "2", "FINISHED": "true"}
        subprocess.run(["bash", ROOT / "gpu" / "distill-tasks.sh", *words], env=os.environ | told | more, check=True)
        return [line.split() for line in (tmp_path / "asked").read_text().splitlines()]

    return run


def trained(asked):
    """Of each training asked for: its recipe, and the folder to start from."""
    runs = [words[3:] for words in asked if words[0] == "-m"]
    return [(words[0], words[words.index("--start") + 1] if "--start" in words else None) for words in runs]


RECIPES = {"distill": DistillRecipe, "pretrain": PretrainRecipe}


@pytest.mark.parametrize("job", sorted((ROOT / "gpu").glob("*.sh")), ids=lambda job: job.stem)
def test_a_job_is_sound_and_gives_options_that_there_are(job, capsys):
    """Of what it calls: the benchmarks' scripts, codi's own commands and the jobs that are built on these."""
    subprocess.run(["bash", "-n", job], check=True)
    lines = [line for line in job.read_text().replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    calls = re.findall(r"(benchmarks/\w+\.py|-m codi \w+|bash gpu/\S+\.sh)(.*)", "\n".join(lines))
    assert calls
    for called, words in calls:
        command = {"pretrain-mini.sh": "pretrain", "distill-tasks.sh": "distill"}.get(called[9:], called.split()[-1])
        if called.startswith("benchmarks/"):
            known = set(re.findall(r'"--([a-z][\w-]*)"', (ROOT / called).read_text()))
        else:
            assert main([command, "--help"]) == 0
            known = set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))
            known |= {field.name for field in fields(RECIPES[command])} if command in RECIPES else set()
        given = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", re.sub(r'"--[^"]* --[^"]*"', "", words)))
        assert given <= known, (called, given - known)


def test_a_folder_returns_from_its_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4096)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-3.bin").write_bytes(b"of an earlier, larger folder")
    assert len(shards.pack(tmp_path / "a", tmp_path / "out")) == 3  # a tar's blocks fill 10 KiB
    shards.unpack(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "b" / "c").read_bytes() == bytes(range(256)) * 4
    (tmp_path / "a" / "d").write_bytes(bytes(4 * 4096))
    with pytest.raises(ValueError, match="does not fit 4 shards"):
        shards.pack(tmp_path / "a", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3  # what was there stays


def test_training_goes_on_from_shards_and_leaves_finished_adapters_alone(call, tmp_path):
    adapters = ["depth", "depth-finetuned", "generate"]
    asked = call("train", "depth generate", "one", FINISHED="false")
    assert trained(asked) == [(name, None) for name in adapters]
    assert [words[0] for words in asked] == ["-m", "gpu/shards.py"] * 3  # none is lost with the next
    shards.unpack(tmp_path / "out-one", tmp_path / "seen")
    assert sorted(folder.name for folder in (tmp_path / "seen").iterdir()) == adapters
    assert (tmp_path / "seen" / "depth" / "preview.png").is_file()
    assert trained(call("train", "depth", "one")) == [(name, None) for name in adapters[:2]]  # from its checkpoints

    carried = {"SHARDS": str(tmp_path / "out-one")}  # depth is finished there, and travels alone
    assert trained(call("train", "depth generate", "two", **carried)) == [("generate", None)]
    call("train", "generate", "three", FINISHED="false")
    carried = {"SHARDS": str(tmp_path / "out-three")}
    for finished in ("false", "true"):  # the second goes on with the first
        asked = call("train", "generate", "four", FINISHED=finished, **carried)
        assert trained(asked) == [("generate", str(tmp_path / "four" / "start" / "generate"))]
    assert trained(call("train", "generate", "four", **carried)) == []


def test_what_has_no_counterpart_trains_alone_and_other_forms_are_measured_with_their_task(call, tmp_path):
    asked = call("train", "upscale-x8 depth-full depth-hint canny", "one")
    names = [name for name, _ in trained(asked)]
    assert names == ["upscale-x8", "depth-full", "depth-hint", "canny", "canny-finetuned"]
    (words,) = call("measure", "depth", "one")
    more = words[words.index("--rows") + 1 : words.index("--out")]
    assert more == [f"codi={tmp_path}/one/depth-full", f"hint={tmp_path}/one/depth-hint"]
    (words,) = call("measure", "depth", "two")
    assert words[words.index("--rows") + 1] == "--out"


def test_what_the_job_asks_for_can_be_done(call, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "model")
    few = ["--data", "scenes:train:4", "--held-out", "scenes:held-out:2", "--images", "4", "--batch-size", "2"]
    asked = call("train", "generate", "one", *few)
    assert main(asked[0][2:]) == 0
    ((script, *words),) = call("measure", "generate", "one", "--data", "scenes:held-out:2")
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(task_figures, "MANY", 5)  # enough of them for a test
    task_figures.main()
    entry = json.loads((tmp_path / "out-one" / "tasks.json").read_text())["tasks"]["generate"]
    assert (entry["count"], entry["size"], entry["device"]) == (2, 32, "cpu")
    named = [row["method"] for row in entry["rows"]]
    assert named == ["pe-codi-tuned"] * 3 + ["backbone"] * 2 + ["backbone, guidance 3"]
    assert set(entry["ratios"]["pe-codi-tuned"]) == {"1", "2", "4"}
