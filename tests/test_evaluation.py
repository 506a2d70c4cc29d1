"""The evaluation loop on methods with known results, and its report."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codi.data.sources import CorruptSample, Sample, open_source
from codi.errors import UserError
from codi.evaluation import (
    Features,
    Method,
    contact_sheet,
    evaluate,
    markdown_table,
    pipeline_method,
    rich_table,
    write_json,
)
from codi.evaluation.evaluate import _stream, sample_seeds
from codi.tasks import Task, get_task
from test_metrics import SIZE, blur, pictures


@pytest.fixture(scope="module")
def features() -> Features:
    return Features(size=96)  # a fifth of the cost of 224 px


class Pictures:
    """An in-memory source; the samples at the indices in `corrupt` are unreadable."""

    def __init__(self, count: int, corrupt: tuple[int, ...] = ()):
        self.images, self.corrupt = pictures(count, seed=5), corrupt

    def __len__(self):
        return len(self.images)

    def describe(self):
        return "pictures in memory"

    def read(self, indices, size, crops=None):
        assert size == SIZE
        return [
            CorruptSample(index=i, file=f"{i}.png", why="truncated")
            if i in self.corrupt
            else Sample(index=i, name=f"{i}.png", image=self.images[i], text=f"picture {i}")
            for i in indices
        ]


class Shrink(Task):
    """Averages blocks of 4 x 4 and adds a little noise: an upscaling task in four lines."""

    name = "upscale"
    obedience_unit = "dB PSNR of the downscaled result to the input"

    def given(self, batch, generator):
        small = F.avg_pool2d(batch.image, 4)
        return (small + 0.01 * torch.randn(small.shape, generator=generator)).clamp(0, 1)

    def condition(self, given):
        return F.interpolate(given, scale_factor=4, mode="bicubic").clamp(0, 1)

    def obedience(self, output, given, batch):
        return {"input_psnr": -10 * (F.avg_pool2d(output, 4) - given).square().mean((1, 2, 3)).log10()}


def nearest(given, prompts, steps, seeds):
    return F.interpolate(given, scale_factor=4, mode="nearest")


def noisy(given, prompts, steps, seeds):
    """Nearest-neighbor upscaling plus noise seeded per image, of standard deviation 0.2 / steps."""
    noise = [torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return nearest(given, prompts, steps, seeds) + 0.2 / steps * torch.stack(noise)


def run(features, **options):
    options = {"count": 6, "batch": 4, "size": SIZE, "features": features, "calls": 1, "seed": 3} | options
    methods = options.pop("methods", [Method("nearest", nearest, (0,)), Method("noisy", noisy, (1, 2, 4))])
    return evaluate(methods, options.pop("task", Shrink()), options.pop("source", Pictures(8)), **options)


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_rows_of_every_method_follow_the_baseline(features):
    results = run(features)
    assert [(row.method, row.steps) for row in results.rows] == [
        ("bicubic", 0),
        ("nearest", 0),
        ("noisy", 1),
        ("noisy", 2),
        ("noisy", 4),
    ]
    by_steps = {row.steps: row for row in results.rows if row.method == "noisy"}
    assert by_steps[1].psnr < by_steps[2].psnr < by_steps[4].psnr < results.rows[1].psnr
    assert by_steps[1].distance > by_steps[4].distance
    assert by_steps[1].obedience < by_steps[4].obedience < results.rows[1].obedience
    assert all(row.latency_ms > 0 for row in results.rows)


def test_blur_worsens_every_figure(features):
    source = Pictures(8)

    def blurred(given, prompts, steps, seeds):
        return blur(torch.stack([source.images[int(prompt.split()[1])] for prompt in prompts]), steps)

    _, none, slight, strong = run(features, source=source, count=8, methods=[Method("blur", blurred, (0, 1, 4))]).rows
    for name in ("psnr", "ssim"):
        assert getattr(none, name) > getattr(slight, name) > getattr(strong, name)
    for name in ("distance", "fd"):
        assert getattr(none, name) < getattr(slight, name) < getattr(strong, name)


def test_ground_truth_scores_perfectly(features):
    source = Pictures(4)

    def truth(given, prompts, steps, seeds):
        return torch.stack([source.images[int(prompt.split()[1])] for prompt in prompts])

    row = run(features, source=source, count=4, methods=[Method("truth", truth, (1,))]).rows[-1]
    assert (row.psnr, row.distance) == (100.0, 0.0)
    assert row.ssim == pytest.approx(1, abs=1e-6) and row.fd == pytest.approx(0, abs=1e-6)


def test_perfect_obedience_is_finite(features):
    class Exact(Shrink):
        name = "exact"  # no baseline

        def given(self, batch, generator):
            return F.avg_pool2d(batch.image, 4).mul(256).round().div(256)

    results = run(features, task=Exact(), methods=[Method("nearest", nearest, (0,))])
    assert [(row.method, row.obedience) for row in results.rows] == [("nearest", 100.0)]


def figures(results):
    return [[row.psnr, row.ssim, row.distance, row.fd, row.obedience] for row in results.rows]


def test_figures_do_not_depend_on_batch_size(features):
    expected = figures(run(features, batch=6))
    assert np.allclose(figures(run(features, batch=1)), expected, rtol=1e-3)
    assert np.allclose(figures(run(features, batch=4)), expected, rtol=1e-3)


def test_figures_depend_on_the_seed_alone(features):
    assert figures(run(features)) == figures(run(features))
    assert figures(run(features)) != figures(run(features, seed=4))


def test_every_method_gets_the_same_inputs_and_seeds_for_any_batch_size(features):
    def recorder(inputs):
        def method(given, prompts, steps, seeds):
            for k, (condition, prompt, seed) in enumerate(zip(given, prompts, seeds, strict=True)):
                inputs.setdefault(prompt, (condition, seed))
                assert torch.equal(given[k], inputs[prompt][0]) and seed == inputs[prompt][1]
            return nearest(given, prompts, steps, seeds)

        return method

    inputs: dict = {}
    run(features, batch=4, methods=[Method("a", recorder(inputs), (1, 2)), Method("b", recorder(inputs), (1,))])
    run(features, batch=1, methods=[Method("c", recorder(inputs), (1,))])
    assert [inputs[f"picture {k}"][1] for k in range(6)] == sample_seeds(3, range(6)) == [300009 + k for k in range(6)]


def test_degradation_and_sampling_use_separate_random_streams():
    """With one seed for both, the noise on the input would equal the initial noise of sampling."""
    keys = [(seed, k) for seed in (0, 1) for k in range(50)]
    streams = {_stream(seed, k).initial_seed() for seed, k in keys}
    noises = {sample_seeds(seed, [k])[0] for seed, k in keys}
    assert len(streams) == len(noises) == 100 and not streams & noises


def test_corrupt_samples_are_skipped_and_counted(features):
    results = run(features, source=Pictures(8, corrupt=(0, 2)), count=5)
    assert (results.count, results.skipped, results.to_json()["skipped"]) == (5, 2, 2)
    assert run(features, source=Pictures(4, corrupt=(1,)), count=100).count == 3


def test_loop_runs_a_real_task_and_source(features):
    results = run(features, task=get_task("upscale"), source=open_source("scenes:held-out:5"), batch=2, methods=[])
    (bicubic,) = results.rows
    assert (results.task, results.count, bicubic.method) == ("upscale", 5, "bicubic")
    assert results.pictures["given"].shape == (5, 3, 8, 8) and results.pictures["truth"].shape == (5, 3, 32, 32)
    assert 15 < bicubic.psnr < 40 and bicubic.obedience > 20 and bicubic.fd > 0


def test_too_few_images_are_refused(features):
    with pytest.raises(UserError, match="pictures in memory: .*at least 2"):
        run(features, source=Pictures(3, corrupt=(0, 1)))


def test_non_finite_output_names_the_method_and_steps(features):
    broken = Method("broken", lambda given, prompts, steps, seeds: nearest(given, 0, 0, 0) * math.nan, (2,))
    with pytest.raises(UserError, match="broken: .*non-finite.* 2 steps"):
        run(features, methods=[broken])


def test_output_of_the_wrong_size_is_refused(features):
    with pytest.raises(ValueError, match="small: returned shape"):
        run(features, methods=[Method("small", lambda given, prompts, steps, seeds: given, (1,))])


def test_pipeline_serves_as_a_method(features):
    class Pipe:
        def __call__(self, image, prompt, steps, guidance_scale, seed, output_type):
            assert output_type == "pt" and guidance_scale is None and len(prompt) == len(seed) == len(image)
            self.images = noisy(image, prompt, steps, seed)
            return self

    rows = run(features, methods=Pipe(), steps=(1, 4)).rows
    assert [(row.method, row.steps) for row in rows] == [("bicubic", 0), ("codi", 1), ("codi", 4)]
    assert pipeline_method(Pipe(), (2,), "mine").name == "mine"


def test_progress_counts_up_to_the_total(features):
    calls = []
    run(features, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (30, 30) and {total for _, total in calls} == {30}


# --- obedience and the judge -----------------------------------------------------------------------------------------


def nan_for_odd(output, given, batch):
    """A judge that returns NaN for odd samples."""
    odd = torch.tensor(batch.index) % 2 == 1
    return {"brightness": output.mean((1, 2, 3)).masked_fill(odd, math.nan), "nothing": odd * math.nan}


def test_judge_gives_the_headline_figure_and_the_task_the_rest(features):
    results = run(features, judge=nan_for_odd)
    unjudged = run(features)
    for row, other in zip(results.rows, unjudged.rows, strict=True):
        assert list(row.measures) == ["brightness", "input_psnr"] and row.obedience == row.measures["brightness"]
        assert row.measures["input_psnr"] == other.obedience
    assert "brightness" in results.obedience_unit and unjudged.obedience_unit == Shrink.obedience_unit
    row = run(features, judge=nan_for_odd, batch=1).rows[0]
    assert row.obedience == pytest.approx(results.rows[0].obedience)
    even = Pictures(8).images[0:6:2]
    assert results.rows[0].obedience == pytest.approx(float(even.mean()), abs=0.01)
    assert "input_psnr ↑" in markdown_table(results) and "nothing" not in markdown_table(results)


def test_tables_show_a_dash_for_missing_measures(features):
    class Silent(Shrink):
        def obedience(self, output, given, batch):
            return {}

    results = run(features, task=Silent())
    assert all(row.obedience is None and row.measures == {} for row in results.rows)
    assert markdown_table(results).splitlines()[2].split("|")[-3].strip() == "-"
    assert json.loads(json.dumps(results.to_json(), allow_nan=False))["rows"][0]["obedience"] is None


def test_targets_and_prompts_come_from_the_task(features):
    used_prompts = []

    def redden(given, prompts, steps, seeds):
        used_prompts.extend(prompts)
        return given * torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)

    class Reddened(Pictures):
        def read(self, indices, size, crops=None):
            red = torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)
            images = [self.images[i] for i in indices]
            return [
                Sample(i, "", image, instruction="make it redder", extras={"edited_image": image * red})
                for i, image in zip(indices, images, strict=True)
            ]

    (row,) = run(features, task=get_task("edit"), source=Reddened(4), methods=[Method("red", redden, (1,))]).rows
    assert row.psnr == 100.0 and row.obedience == row.measures["psnr_inside"] == 60.0
    assert set(used_prompts) == {"make it redder"}


@pytest.mark.parametrize("task, inputs", [("inpaint", {"image", "mask"}), ("generate", {"height", "width"})])
def test_pipeline_gets_the_arguments_of_users(features, task, inputs):
    class Pipe:
        def __call__(self, prompt, steps, guidance_scale, seed, output_type, **inputs):
            self.inputs, self.images = inputs, torch.rand(len(prompt), 3, SIZE, SIZE)
            return self

    pipe = Pipe()
    results = run(features, task=get_task(task), methods=pipe, steps=(1,))
    assert set(pipe.inputs) == inputs
    assert all(value.shape[1] in (1, 3) for value in pipe.inputs.values() if isinstance(value, torch.Tensor))
    assert results.pictures["given"].shape[1] == 3  # a color image for the sheet


# --- report ----------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_form_and_is_written_atomically(features, tmp_path):
    results = run(features, command="codi evaluate --task upscale")
    path = write_json(results, tmp_path / "new" / "results.json")
    report = json.loads(path.read_text())
    assert report == results.to_json()
    assert {"task", "count", "seed", "command", "rows", "machine"} <= set(report)
    assert (report["task"], report["count"], report["seed"]) == ("upscale", 6, 3)
    for row in report["rows"]:
        names = ["method", "steps", "psnr", "ssim", "distance", "fd", "obedience", "latency_ms", "measures"]
        assert list(row) == names and row["measures"] == {"input_psnr": row["obedience"]}
        assert all(math.isfinite(row[name]) for name in names[1:-1])
    assert {"cpus", "torch"} <= set(report["machine"])
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_unwritable_json_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        write_json({"rows": []}, tmp_path / "file" / "results.json")


def test_failed_write_keeps_the_old_file(tmp_path):
    path = write_json({"rows": [1]}, tmp_path / "results.json")
    with pytest.raises(ValueError):
        write_json({"rows": [math.nan]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert len(list(tmp_path.iterdir())) == 1


def test_tables_show_every_row(features):
    from rich.console import Console

    results = run(features)
    lines = markdown_table(results).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(results.rows)
    assert f"{results.rows[0].psnr:.2f}" in lines[2] and "FD-ENLite0" in lines[0]
    assert "6 held-out samples, seed 3" in lines[-1]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(results))
    text = console.export_text()
    assert text.count("noisy") == 3 and "bicubic" in text


def test_contact_sheet_has_samples_in_rows_and_methods_in_columns(features):
    results = run(features, keep=3, batch=2)
    assert list(results.pictures) == ["given", "bicubic", "nearest", "noisy · 1", "noisy · 2", "noisy · 4", "truth"]
    assert all(len(pictures) == 3 for pictures in results.pictures.values())
    sheet = contact_sheet(results.pictures, side=64, gap=4)
    head = sheet.height - 3 * 68
    assert sheet.width == 7 * 68 + 4 and 0 < head < 40
    cell = np.asarray(sheet)[head : head + 64, sheet.width - 68 : sheet.width - 4]
    expected = (results.pictures["truth"][0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(cell, expected.repeat(2, 0).repeat(2, 1))


def test_contact_sheet_shows_masks_and_wide_images():
    sheet = contact_sheet({"mask": torch.ones(2, 1, 16, 16), "wide": torch.rand(2, 3, 10, 20)}, side=40, gap=2)
    assert sheet.size[0] == 2 * 42 + 2
    with pytest.raises(ValueError, match="same number"):
        contact_sheet({"one": torch.ones(1, 3, 8, 8), "two": torch.ones(2, 3, 8, 8)})
