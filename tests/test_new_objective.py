"""CONTRIBUTING's walk through a new objective, run word for word."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from codi import objectives
from codi.objectives.batch import LatentBatch
from codi.schedule import CosineSchedule
from shell import Shell, picture
from tiny import randn, tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WALK = (
    (ROOT / "CONTRIBUTING.md").read_text().split("## A new objective is one file and one entry\n")[1].split("\n## ")[0]
)
LOSS, ENTRY = re.findall(r"```python\n(.*?)```", WALK, re.S)
COMMAND = re.findall(r"```bash\n(.*?)```", WALK, re.S)[0]


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Put the file into a second folder of the package and run the entry."""
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "min_snr.py").write_text(LOSS)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path / "objectives")])
    exec(compile(ENTRY, "objectives/__init__.py", "exec"), vars(objectives))
    yield objectives.OBJECTIVES["min-snr"]
    del objectives.OBJECTIVES["min-snr"], vars(objectives)["min_snr"], sys.modules["codi.objectives.min_snr"]


def test_the_loss_is_zero_for_the_truth_and_weighted_elsewhere(registered):
    """A network whose signal is x / 2: the loss is min(SNR, gamma) |x|^2 / 4 at every time."""
    schedule, x = CosineSchedule(), randn(4096, 1)

    def predicts(factor):
        def network(z, t, conditioning):
            alpha, sigma = schedule.alpha_sigma(t, z)
            signal = factor * x
            return schedule.output(signal, (z - alpha * signal) / sigma, t)

        return network

    def loss(factor, **options):
        generator = torch.Generator().manual_seed(0)
        batch = LatentBatch(x, None)
        return float(registered.loss(predicts(factor), None, batch, schedule, generator, **options)["diffusion"])

    t = schedule.draw(len(x), schedule.least, False, torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha_sigma(t, x)
    expected = ((alpha / sigma).square().clamp_max(5) * x.square()).mean() / 4
    assert loss(1.0) < 1e-10
    assert loss(0.5) == pytest.approx(float(expected), rel=1e-4)
    assert loss(0.5, gamma=1.0) < loss(0.5)


def test_the_command_trains_an_adapter_with_it(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(tiny_checkpoint(tmp_path / "model"))
    for k in range(3):
        picture(tmp_path / "photos" / f"{k}.png", 70, 66, seed=k)
    few = ["--model", model, "--images", 4, "--batch-size", 2, "--warmup", 2, "--device", "cpu"]
    ran = Shell(capsys)(*shlex.split(COMMAND)[1:], *few, "--data", "photos", "--held-out", "photos")
    assert ran.code == 0, ran.err
    info = json.loads(Path("runs/min-snr/config.json").read_text())["info"]
    assert info["recipe"]["objective"] == "min-snr" and info["finished"]
