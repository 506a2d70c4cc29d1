"""The guide to a new task in CONTRIBUTING, colorization: its code is run here, word for word."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from codi import tasks
from codi.data.batches import Batch
from shell import Shell, picture
from tiny import rand, tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text().split("## A new task is one file\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.S)


def block(kind: str, number: int = 0) -> str:
    """Return code block `number` of this kind in the guide."""
    return [code for language, code in BLOCKS if language == kind][number]


@pytest.fixture
def colourise(tmp_path, monkeypatch):
    """Follow steps 1 and 2: the file is in a second folder of the package's tasks, and is registered there."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colourise.py").write_text(block("python"))
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    before = dict(vars(tasks))
    exec(compile(block("python", 1), "tasks/__init__.py", "exec"), vars(tasks))
    yield tasks.get_task("colourise")
    for name in set(vars(tasks)) - set(before):
        delattr(tasks, name)
    tasks.TASKS = before["TASKS"]
    del sys.modules["codi.tasks.colourise"]


def test_the_registration_line_matches_the_package():
    def without_spaces(code: str) -> str:
        return "".join(code.split())

    source = without_spaces(Path(tasks.__file__ or "").read_text())
    line = without_spaces(block("python", 1).split("\n\n")[1])
    assert line.replace(",Colourise)", ")") in source


def test_the_task_keeps_the_contract(colourise):
    batch = Batch(rand(3, 3, 16, 16), ["a", "b", "c"])
    given = colourise.given(batch, torch.Generator())
    assert given.shape == (3, 1, 16, 16) and torch.equal(colourise.bring(given), given)
    torch.testing.assert_close(colourise.bring(batch.image), given)
    condition = colourise.condition(given)
    assert condition.shape == (3, 3, 16, 16) and condition.min() >= 0 and condition.max() <= 1
    truth, inverted = (
        colourise.obedience(image, given, batch)["luma_psnr"] for image in (batch.image, 1 - batch.image)
    )
    assert truth.tolist() == [60.0] * 3 and inverted.max() < 30
    assert tasks.get_task("colourise", **colourise.config()) == colourise


def test_the_guide_ends_with_a_colored_image(colourise, capsys, tmp_path, monkeypatch):
    """Steps 3 to 5, with a tiny backbone for `mini` and two updates instead of many."""
    monkeypatch.chdir(tmp_path)
    model = str(tiny_checkpoint(tmp_path / "model"))
    for folder in ("photos", "photos-held-out"):
        for k in range(3):
            picture(tmp_path / folder / f"{k}.png", 70, 66, seed=k)
    Path("colourise.yaml").write_text(block("yaml"))
    assert yaml.safe_load(block("yaml"))["task"] == colourise.name
    options = {
        "distill": ["--model", model, "--images", 4, "--batch-size", 2, "--warmup", 2, "--device", "cpu"],
        "evaluate": ["--model", model, "--count", 2, "--device", "cpu"],
    }
    shell = Shell(capsys)
    for line in block("bash").splitlines():
        arguments = shlex.split(line)[1:]
        result = shell(*arguments, *options.get(arguments[0], []))
        assert result.code == 0, result.err
    sheet = np.asarray(Image.open("look.png"))
    assert (
        sheet[20:116, 4:100].std(-1).max() == 0 and sheet[20:116, 104:200].std(-1).max() > 0
    )  # grey, then the original
    assert colourise.obedience_unit in " ".join(result.out.split())
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save("old.png")
    exec(compile(block("python", 2).replace('"mini"', repr(model)), "CONTRIBUTING.md", "exec"), {})
    image = Image.open("new.png")
    assert image.mode == "RGB" and image.size == (64, 64)
