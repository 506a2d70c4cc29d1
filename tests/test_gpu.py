"""The jobs of gpu/ on a CPU at the smallest scale: their commands, how they resume, and how results are packed."""

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

# Stands in for the interpreter: logs its arguments, and writes an adapter where one would be trained.
STAND_IN = f"""#!/bin/sh
echo "$@" >> "$CALLS"
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
    """Return `call(stage, tasks, machine, *arguments, **variables)`, which runs the job and returns its commands."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(stage, tasks, machine, *arguments, **variables):
        (tmp_path / "calls").write_text("")
        environment = {"PYTHON": "python", "CALLS": "calls", "MODEL": "model", "RUNS": machine, "OUT": f"out-{machine}"}
        environment = {name: str(tmp_path / value) for name, value in environment.items()}
        environment |= {"STAGE": stage, "TASKS": tasks, "DEVICE": "cpu", "SIZE": "32", "COUNT": "2", "FINISHED": "true"}
        subprocess.run(
            ["bash", ROOT / "gpu" / "distill-tasks.sh", *arguments],
            env=os.environ | environment | variables,
            check=True,
        )
        return [line.split() for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def trained(commands):
    """Return the recipe and the start folder of each training among the commands."""
    runs = [command[3:] for command in commands if command[0] == "-m"]
    return [(command[0], command[command.index("--start") + 1] if "--start" in command else None) for command in runs]


RECIPES = {"distill": DistillRecipe, "pretrain": PretrainRecipe}


@pytest.mark.parametrize("job", sorted((ROOT / "gpu").glob("*.sh")), ids=lambda job: job.stem)
def test_a_job_is_valid_and_passes_only_known_options(job, capsys):
    """Covers the benchmark scripts, codi's own commands and the jobs that are built on them."""
    subprocess.run(["bash", "-n", job], check=True)
    lines = [line for line in job.read_text().replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    calls = re.findall(r"(benchmarks/\w+\.py|-m codi \w+|bash gpu/\S+\.sh)(.*)", "\n".join(lines))
    assert calls
    for called, arguments in calls:
        command = {"pretrain-mini.sh": "pretrain", "distill-tasks.sh": "distill"}.get(called[9:], called.split()[-1])
        if called.startswith("benchmarks/"):
            known = set(re.findall(r'"--([a-z][\w-]*)"', (ROOT / called).read_text()))
        else:
            assert main([command, "--help"]) == 0
            known = set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))
            known |= {field.name for field in fields(RECIPES[command])} if command in RECIPES else set()
        flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", re.sub(r'"--[^"]* --[^"]*"', "", arguments)))
        assert flags <= known, (called, flags - known)


def test_a_folder_is_restored_from_its_shards(tmp_path, monkeypatch):
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
    assert len(list((tmp_path / "out").iterdir())) == 3  # the earlier shards stay


def test_training_resumes_from_shards_and_skips_finished_adapters(call, tmp_path):
    adapters = ["depth", "depth-finetuned", "generate"]
    commands = call("train", "depth generate", "one", FINISHED="false")
    assert trained(commands) == [(name, None) for name in adapters]
    assert [command[0] for command in commands] == ["-m", "gpu/shards.py"] * 3  # packed after each training
    shards.unpack(tmp_path / "out-one", tmp_path / "unpacked")
    assert sorted(folder.name for folder in (tmp_path / "unpacked").iterdir()) == adapters
    assert (tmp_path / "unpacked" / "depth" / "preview.png").is_file()
    assert trained(call("train", "depth", "one")) == [
        (name, None) for name in adapters[:2]
    ]  # resumed from its checkpoints

    carried = {"SHARDS": str(tmp_path / "out-one")}  # only the finished depth is packed there
    assert trained(call("train", "depth generate", "two", **carried)) == [("generate", None)]
    call("train", "generate", "three", FINISHED="false")
    carried = {"SHARDS": str(tmp_path / "out-three")}
    for finished in ("false", "true"):  # the second run resumes the first
        commands = call("train", "generate", "four", FINISHED=finished, **carried)
        assert trained(commands) == [("generate", str(tmp_path / "four" / "start" / "generate"))]
    assert trained(call("train", "generate", "four", **carried)) == []


def test_tasks_without_counterpart_train_alone_and_all_forms_are_measured_with_their_task(call, tmp_path):
    commands = call("train", "upscale-x8 depth-full depth-hint canny", "one")
    names = [name for name, _ in trained(commands)]
    assert names == ["upscale-x8", "depth-full", "depth-hint", "canny", "canny-finetuned"]
    (command,) = call("measure", "depth", "one")
    rows = command[command.index("--rows") + 1 : command.index("--out")]
    assert rows == [f"codi={tmp_path}/one/depth-full", f"hint={tmp_path}/one/depth-hint"]
    (command,) = call("measure", "depth", "two")
    assert command[command.index("--rows") + 1] == "--out"


def test_the_commands_of_the_job_run(call, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "model")
    options = ["--data", "scenes:train:4", "--held-out", "scenes:held-out:2", "--images", "4", "--batch-size", "2"]
    commands = call("train", "generate", "one", *options)
    assert main(commands[0][2:]) == 0
    ((script, *arguments),) = call("measure", "generate", "one", "--data", "scenes:held-out:2")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(task_figures, "MANY", 5)  # enough for a test
    task_figures.main()
    entry = json.loads((tmp_path / "out-one" / "tasks.json").read_text())["tasks"]["generate"]
    assert (entry["count"], entry["size"], entry["device"]) == (2, 32, "cpu")
    methods = [row["method"] for row in entry["rows"]]
    assert methods == ["pe-codi-tuned"] * 3 + ["backbone"] * 2 + ["backbone, guidance 3"]
    assert set(entry["ratios"]["pe-codi-tuned"]) == {"1", "2", "4"}
