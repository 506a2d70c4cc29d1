"""`codi benchmark`: the stages of a suite, and a tiny suite trained, measured, resumed and reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from codi.apps.benchmark import with_disk_cache
from codi.errors import UserError
from codi.evaluation import Method
from codi.evaluation.suite import load_suite
from codi.evaluation.tables import ratio_rows, report, task_table
from codi.training.distill import DistillRecipe
from codi.training.recipe import build
from tiny import rand

MINI = load_suite("mini")


def test_every_stage_of_the_shipped_suite_can_be_trained():
    for plan in MINI.plans():
        for stage in plan.stages:
            references = dict.fromkeys(stage.refers, "before")
            build(DistillRecipe, {**stage.recipe, **references, "out": "out"}, plan.method).validate()
        assert not any(stage.refers for stage in plan.stages[:1])


def test_methods_share_every_setting_they_do_not_name():
    """All methods use the same data, seed and image budget; the stages of one method split the budget."""
    for plan in MINI.plans():
        share = {"autoencoder": 0, "pe-decoupled/equal-passes": 4 / 7}.get(plan.method, 1)
        assert sum(stage.recipe["images"] for stage in plan.stages) == pytest.approx(MINI.images * share, abs=2)
        for number, stage in enumerate(plan.stages):
            same = {key: stage.recipe[key] for key in ("data", "size", "batch_size", "model", "seed")}
            own = {"data": MINI.data, "seed": plan.seed + 100 * number}  # every stage draws new images
            assert same == {key: MINI.base.get(key) for key in same} | own


def test_equal_trainings_have_equal_keys():
    plans = {(plan.method, plan.task, plan.seed): plan for plan in MINI.plans()}
    ldm, solver = plans["ldm", "depth", 0], plans["ldm/dpm-solver", "depth", 0]
    gd, cm, lcm = (plans[name, "depth", 0] for name in ("gd-ii", "cm-ii", "lcm"))
    assert ldm.key() == solver.key() and gd.key(1) == lcm.key(1) != cm.key(1)
    assert len({plans[key].key() for key in plans if key[0] in ("ldm", "codi", "decoupled")}) == 3 * 3 * len(MINI.tasks)


def test_measurement_keys_depend_on_data_task_and_sampler():
    """The codec's row has no training, but its task changes the key; so do samplers, with the same training."""
    keys = {plan.key() for plan in MINI.plans(rows=["autoencoder"])}
    assert len(keys) == 3
    plans = [p for p in MINI.plans(["depth"], ["ldm", "ldm/dpm-solver", "ldm/dpm-solver++"]) if p.seed == 0]
    assert len({plan.measure(MINI, n) for plan in plans for n in (4, 8)}) == 6
    changed = replace(MINI, held_out="scenes:held-out:7")
    assert plans[0].measure(MINI, 4) != plans[0].measure(changed, 4)


def test_rows_and_tasks_are_selected_and_the_quick_suite_is_smaller():
    few = list(MINI.plans(["depth"], ["codi", "lcm"]))
    assert [(p.method, p.seed) for p in few] == [("codi", 0), ("lcm", 0), ("codi", 1), ("codi", 2)]
    quick = MINI.quickly()
    assert quick.images < MINI.images and {p.task for p in quick.plans()} == {"upscale"}
    assert next(p for p in quick.plans() if p.method == "ldm").steps == (1, 4)
    with pytest.raises(UserError, match="row 'cody': not in suite mini"):
        list(MINI.plans(rows=["cody"]))
    with pytest.raises(UserError, match="no such suite"):
        load_suite("maxi")


@pytest.fixture(scope="module")
def tiny_suite(tiny, tmp_path_factory):
    """A suite of two tasks and of methods with one, two and three kinds of stages."""
    base = {"model": str(tiny.model), "size": 32, "batch_size": 4, "warmup": 4, "preview_every": 1000,
            "held_out": "scenes:held-out:2", "device": "cpu"}  # fmt: skip
    suite = {
        "images": 16, "seeds": 2, "count": 4, "data": "scenes:train:64", "held_out": "scenes:held-out:4", "base": base,
        "tasks": {"upscale": {"task_options": {"degradation": "bicubic"}}, "depth": {}},
        "methods": {
            name: MINI.methods[name] | ({"steps": [1, 2]} if MINI.methods[name]["stages"] else {})
            for name in ("autoencoder", "ldm", "ldm/dpm-solver++", "gd-i", "cm-ii", "codi", "decoupled")
        },
    }  # fmt: skip
    path = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def test_a_suite_from_scratch_resumes_and_reports(tiny_suite, shell, tmp_path):
    out = tmp_path / "out"
    command = ("benchmark", "--suite", tiny_suite, "--out", out, "--tasks", "upscale", "--json")
    first = shell(*command, "--rows", "ldm,gd-i,decoupled")
    assert first.code == 0, first.err
    result = json.loads(first.out)
    measured = {(row["method"], row["steps"], row["seed"]) for row in result["rows"]}
    assert measured == {(m, n, s) for m in ("ldm", "gd-i", "decoupled") for n in (1, 2) for s in (0, 1)} - {
        ("gd-i", n, 1) for n in (1, 2)
    }
    for row in result["rows"]:
        assert row["task"] == "upscale" and row["images"] == pytest.approx(16, abs=4) and row["seconds"] >= 0
        assert row["fd"] >= 0 and row["distance"] > 0 and row["latency_ms"] > 0 and row["passes"] > row["images"]
    runs = sorted((out / "runs").iterdir())
    bound = shell(*command, "--rows", "autoencoder")
    assert bound.code == 0, bound.err
    row = json.loads(bound.out)["rows"][0]
    assert (row["method"], row["steps"], row["images"], row["passes"]) == ("autoencoder", 0, 0, 0)
    assert row["distance"] > 0 and row["fd"] > 0
    changed = {path: (path / "config.json").stat().st_mtime_ns for path in runs}
    remaining = [row for row in result["rows"] if row["method"] != "ldm"]  # the rows of ldm are lost
    (out / "results.json").write_text(json.dumps(result | {"rows": remaining}))
    again = shell(*command, "--rows", "ldm,ldm/dpm-solver++")
    assert again.code == 0, again.err
    repeated = json.loads(again.out)["rows"]
    assert {path: (path / "config.json").stat().st_mtime_ns for path in runs} == changed  # trained once
    figures = ("method", "steps", "seed", "fd", "distance", "psnr")
    before, after = ({tuple(row[k] for k in figures) for row in rows} for rows in (result["rows"], repeated))
    assert before <= after and {row[0] for row in after} - {row[0] for row in before} == {"ldm/dpm-solver++"}
    report = (out / "benchmark.md").read_text()
    assert "## upscale" in report and "| ldm/dpm-solver++ | 2 |" in report and (out / "benchmark-upscale.png").is_file()
    assert "- upscale: autoencoder 0, cm-ii 1/2, codi 1/2\n" in report  # not measured
    timed = shell(*command, "--time")
    assert timed.code == 0, timed.err
    result = json.loads(timed.out)
    assert result["rows"] == repeated
    times = {(time["method"], time["steps"]): time["ms"] for time in result["times"]["upscale"]}
    assert times.keys() == {(row["method"], row["steps"]) for row in repeated} and min(times.values()) > 0


def test_a_benchmark_stopped_by_its_time_limit_resumes(tiny_suite, shell, tmp_path):
    command = ("benchmark", "--suite", tiny_suite, "--out", tmp_path / "out", "--tasks", "depth", "--rows", "cm-ii")
    stopped = shell(*command, "--minutes", "0.01")
    assert stopped.code == 0 and "still to run" in stopped.err
    done = shell(*command, "--json")
    assert done.code == 0 and {row["method"] for row in json.loads(done.out)["rows"]} == {"cm-ii"}


def test_generated_batches_are_cached_on_disk(tmp_path):
    """Batches are cached so that a benchmark can resume; single images, whose latency is timed, are not."""
    calls = []

    def run(conditions, prompts, steps, seeds):
        calls.append((steps, seeds))
        return conditions * steps + torch.tensor(seeds).view(-1, 1, 1, 1)

    conditions, arguments = rand(3, 3, 4, 4), (["a"] * 3, 2, [5, 6, 7])
    folders = {n: tmp_path / f"made-{n}" for n in (2, 4)}
    first = with_disk_cache(Method("m", run, (2,)), folders).run(conditions, *arguments)
    again = with_disk_cache(Method("m", run, (2,)), folders)
    assert torch.equal(again.run(conditions, *arguments), first) and len(calls) == 1
    for changed in ((["a"] * 3, 4, [5, 6, 7]), (["a"] * 3, 2, [8, 9, 10])):
        assert not torch.equal(again.run(conditions, *changed), first)
    again.run(conditions[:1], ["a"], 2, [5])
    again.run(conditions[:1], ["a"], 2, [5])
    assert len(calls) == 5


def test_single_step_counts_and_seeds_can_be_measured(tiny_suite, shell, tmp_path):
    command = ("benchmark", "--suite", tiny_suite, "--out", tmp_path, "--tasks", "depth", "--rows", "codi", "--json")
    results = [
        json.loads(shell(*command, *more).out)["rows"]
        for more in (("--steps", "2", "--seeds", "1"), ("--seeds", "1"), ())
    ]
    assert [[(row["seed"], row["steps"]) for row in rows] for rows in results] == [
        [(0, 2)], [(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 1), (1, 2)],
    ]  # fmt: skip
    assert results[2][1] == results[1][1] == results[0][0]
    shell(*command, "--steps", "four").failed(2, "--steps four", "whole numbers")
    shell(*command, "--steps", "3").failed(2, "--steps 3", "no row")
    changed = yaml.safe_load(tiny_suite.read_text())
    changed["methods"]["codi"]["shift"] = 0.5
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    again = shell("benchmark", "--suite", tmp_path / "tiny.yaml", *command[3:])  # measured again, not trained
    before, after = ([row | {"fd": 0} for row in rows] for rows in (results[2], json.loads(again.out)["rows"]))
    assert {row["shift"] for row in after} == {0.5} and len(after) == len(before)
    assert {row["training"] for row in after} == {row["training"] for row in before}


def test_unknown_names_are_usage_errors(shell, tmp_path):
    shell("benchmark", "--out", tmp_path, "--rows", "cody").failed(2, "cody", "codi")
    shell("benchmark", "--out", tmp_path, "--suite", "maxi").failed(2, "maxi", "mini")
    (tmp_path / "results.json").write_text('{"rows": [], "backbone": "another"}')
    shell("benchmark", "--out", tmp_path, "--report").failed(1, "results.json", "backbone another", "another --out")
    (tmp_path / "results.json").write_text('{"rows": [], "count": 24}')
    shell("benchmark", "--out", tmp_path, "--report").failed(1, "results.json", "count 24, not 2000", "another --out")
    (tmp_path / "results.json").write_text("{")
    shell("benchmark", "--out", tmp_path, "--report").failed(1, "results.json")


def test_ratios_are_medians_over_common_seeds():
    def row(method, steps, seed, fd):
        return {"task": "upscale", "method": method, "steps": steps, "seed": seed, "fd": fd, "distance": fd}

    rows = [row("codi", 4, s, fd) for s, fd in enumerate((1.0, 2.0, 4.0))]
    rows += [row("ldm", 250, s, fd) for s, fd in enumerate((1.0, 1.0))] + [row("ldm", 4, 0, 4.0)]
    rows += [row("autoencoder", 0, 0, 0.5)]
    ratios = {name: cells for _, name, *cells in ratio_rows(rows)}
    assert ratios["fd of codi 4 / ldm 250"] == ["1.500", "0.500", "1.023", "1.00"]
    assert ratios["fd of codi 4 / ldm 4"] == ["0.250", "0.125", "0.671", "0.60"]
    assert ratios["fd of codi-tuned 4 / ldm 4"] == ["not measured", "0.125", "0.671", "0.60"]


def test_tables_show_ratios_next_to_those_of_the_paper():
    row = {"task": "upscale", "seed": 0, "distance": 0.1, "psnr": 30.0, "obedience": None,
           "images": 4000, "passes": 16000, "seconds": 60}  # fmt: skip
    rows = [row | {"method": m, "steps": n, "fd": fd} for m, n, fd in (("ldm", 250, 20.0), ("codi", 4, 22.0))]
    times = [{"method": "codi", "steps": 4, "ms": 5.0}]
    line = next(line for line in task_table(rows, "upscale", times).splitlines() if line.startswith("| codi"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["codi", "4", "22.00", "0.1000", "30.00", "-", "1.100", "1.023", "5", "4,000", "16,000", "60"]
    assert "paper" not in task_table([row | {"task": "canny", "method": "ldm", "steps": 4, "fd": 2.0}], "canny")


def test_the_committed_page_matches_the_committed_results():
    docs = Path(__file__).parents[1] / "docs"
    results = json.loads((docs / "results.json").read_text())
    assert report(results, load_suite(results["suite"])) == (docs / "benchmark.md").read_text()


def test_every_stage_has_the_same_warmup_fraction():
    default = DistillRecipe(out="out").warmup
    for plan in MINI.plans():
        for stage in plan.stages if len(plan.stages) > 1 else ():
            warmup = stage.recipe.get("warmup", default)
            assert warmup / stage.recipe["images"] == pytest.approx(default / MINI.images, rel=0.01)


def test_text_to_image_stages_are_shared_by_all_tasks():
    keys = {plan.key(3) for plan in MINI.plans(rows=["gd-i"])}
    assert len(keys) == 1
