"""The benchmark that damages files and kills trainings sees faults, and the docs say what it saw."""

import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import robustness  # noqa: E402

from codi.errors import UserError  # noqa: E402

RESULT = Path(robustness.ROOT, "benchmarks", "results", "robustness.json")


def test_the_docs_say_what_was_measured():
    result = json.loads(RESULT.read_text())
    assert robustness.paragraph(result) in robustness.DOCS.read_text()
    assert result["fuzz"]["tried"] >= 1_500 and result["fuzz"]["faults"] == result["kills"]["faults"] == []
    assert result["kills"]["bit_equal"] == result["kills"]["random"] + result["kills"]["renames"] >= 30


def test_damage_is_seeded_and_changes_something():
    data = bytes(range(256)) * 4
    made = [robustness.damage(data, random.Random(seed)) for seed in range(50)]
    assert made == [robustness.damage(data, random.Random(seed)) for seed in range(50)]
    assert len(set(made)) > 45 and made.count(data) <= 1
    assert isinstance(robustness.damage(b"", random.Random(0)), bytes)


def test_faults_are_seen():
    def refuse(message: str) -> None:
        raise UserError(message)

    ends = [
        robustness.attempt(read, 0.05)[0]
        for read in (
            lambda: None,
            lambda: refuse("a: b: c"),
            lambda: refuse("a\nb"),
            lambda: time.sleep(5),
            lambda: 1 / 0,
        )  # fmt: skip
    ]
    assert ends[:2] == ["read", "refused"]
    assert ends[2].startswith("message") and ends[3].startswith("hang") and ends[4].startswith("ZeroDivisionError")


def test_a_few_damaged_files_of_each_format(tmp_path):
    result = robustness.fuzz(tmp_path, 40, seed=7, limit=10)
    assert result["faults"] == [] and result["tried"] == 40 and len(result["formats"]) == 10
