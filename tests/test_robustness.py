"""The benchmark that damages files and kills trainings: it detects faults, and the docs state its results."""

import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import robustness  # noqa: E402

from codi.errors import UserError  # noqa: E402

RESULT = Path(robustness.ROOT, "benchmarks", "results", "robustness.json")


def test_the_docs_state_the_measured_results():
    result = json.loads(RESULT.read_text())
    assert robustness.paragraph(result) in robustness.DOCS.read_text()
    assert result["fuzz"]["tried"] >= 1_500 and result["fuzz"]["faults"] == result["kills"]["faults"] == []
    assert result["kills"]["bit_equal"] == result["kills"]["random"] + result["kills"]["renames"] >= 30


def test_damage_is_seeded_and_changes_the_data():
    data = bytes(range(256)) * 4
    damaged = [robustness.damage(data, random.Random(seed)) for seed in range(50)]
    assert damaged == [robustness.damage(data, random.Random(seed)) for seed in range(50)]
    assert len(set(damaged)) > 45 and damaged.count(data) <= 1
    assert isinstance(robustness.damage(b"", random.Random(0)), bytes)


def test_faults_are_detected():
    def refuse(message: str) -> None:
        raise UserError(message)

    outcomes = [
        robustness.attempt(read, 0.05)[0]
        for read in (
            lambda: None,
            lambda: refuse("a: b: c"),
            lambda: refuse("a\nb"),
            lambda: time.sleep(5),
            lambda: 1 / 0,
        )  # fmt: skip
    ]
    assert outcomes[:2] == ["read", "refused"]
    assert (
        outcomes[2].startswith("message")
        and outcomes[3].startswith("hang")
        and outcomes[4].startswith("ZeroDivisionError")
    )


def test_damaged_files_of_each_format_cause_no_faults(tmp_path):
    result = robustness.fuzz(tmp_path, 40, seed=7, limit=10)
    assert result["faults"] == [] and result["tried"] == 40 and len(result["formats"]) == 10
