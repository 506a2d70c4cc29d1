"""Tests of benchmarks/: decoding the reader's output, the judges that use it, the result tables."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts that import one another

import command  # noqa: E402
import finetune  # noqa: E402
import judges  # noqa: E402
import one_step  # noqa: E402
import reader as training  # noqa: E402
import reading  # noqa: E402
import readme  # noqa: E402
import tasks as task_figures  # noqa: E402
from reading import DetectedObject, Reader, Reading, decode  # noqa: E402

from codi.data.batches import Batch  # noqa: E402
from codi.data.scenes import MAX_OBJECTS, sample_scene  # noqa: E402
from codi.models.backbones import digest, load_backbone  # noqa: E402
from codi.sampling.guidance import resolve  # noqa: E402
from codi.tasks import get_task  # noqa: E402
from shell import make_adapter  # noqa: E402
from tiny import tiny_checkpoint  # noqa: E402

SIDE = 64


@pytest.fixture(scope="module")
def data():
    """Twelve held-out scenes."""
    return training.labelled("held-out", range(12), SIDE)


def exact_maps(data):
    """Return the output maps of a perfect reader."""
    mask = data.mask.long()
    classes = data.classes.gather(1, mask.flatten(1)[..., None].expand(-1, -1, 3)).view(*mask.shape, 3)
    pixels = reading.pixels(SIDE)
    offset, heat = torch.zeros(len(mask), 2, SIDE, SIDE), torch.full((len(mask), 1, SIDE // 2, SIDE // 2), -9.0)
    for b in range(len(mask)):
        for k in range(1, 1 + MAX_OBJECTS):
            inside = mask[b] == k
            if inside.any():
                center = pixels[:, inside].mean(1)
                offset[b][:, inside] = (center[:, None] - pixels[:, inside]) * reading.OFFSET_UNIT / SIDE
                heat[b, 0, int(center[1] / 2), int(center[0] / 2)] = 9.0
    sizes = zip(("colour", "shape", "material"), (9, 4, 2), strict=True)
    maps = {name: 20.0 * F.one_hot(classes[..., k], n).permute(0, 3, 1, 2) for k, (name, n) in enumerate(sizes)}
    return {**maps, "centre": heat, "offset": offset, "disparity": data.disparity.float()[:, None]}


def exact_reading(data):
    """Return the reading of a perfect reader, computed from the instance masks."""
    all_objects, instances = [], torch.zeros_like(data.mask, dtype=torch.long)
    for b, scene in enumerate(data.scenes):
        objects = []
        for index, solid in enumerate(scene.solids, 1):
            y, x = (data.mask[b] == index).nonzero().float().mean(0).tolist()
            objects.append((DetectedObject(solid.colour, solid.shape, solid.material, x / SIDE, y / SIDE, 0.1), index))
        objects.sort(key=lambda entry: entry[0].x)
        for instance, (_, index) in enumerate(objects, 1):
            instances[b][data.mask[b] == index] = instance
        all_objects.append([f for f, _ in objects])
    return Reading(all_objects, instances, data.disparity.float())


def batch_of(data):
    """Return the scenes as an evaluation batch."""
    extras = {"mask": data.mask[:, None].float()}
    captions = [scene.caption for scene in data.scenes]
    return Batch(data.image.float() / 255, captions, extras, list(range(len(captions))), [""] * len(captions))


def test_exact_output_is_decoded_to_the_scene(data):
    decoded, expected = decode(exact_maps(data)), exact_reading(data)
    for objects, true_objects in zip(decoded.objects, expected.objects, strict=True):
        assert [f.attributes for f in objects] == [f.attributes for f in true_objects]
    assert torch.equal(decoded.instances, expected.instances)
    assert torch.equal(decoded.disparity, expected.disparity)
    assert all([f.x for f in detected] == sorted(f.x for f in detected) for detected in decoded.objects)


def test_touching_objects_of_one_color_are_separated_by_their_centers(data):
    maps = {name: torch.zeros(1, n, SIDE, SIDE) for name, n in reading.HEADS.items()}
    maps["colour"][:, 3, 20:30, 10:50] = 20.0  # one yellow bar ...
    maps["centre"] = torch.full((1, 1, SIDE // 2, SIDE // 2), -9.0)
    pixels = reading.pixels(SIDE)
    for x in (20, 40):  # ... of two objects, each 20 px wide
        maps["centre"][0, 0, 12, x // 2] = 9.0
        half = slice(x - 10, x + 10)
        offset = torch.tensor([x + 1.0, 25.0])[:, None, None] - pixels[:, 20:30, half]
        maps["offset"][0, :, 20:30, half] = offset * reading.OFFSET_UNIT / SIDE
    maps["shape"][:, 1, :, :30], maps["shape"][:, 2, :, 30:] = 5.0, 5.0
    (objects,) = decode(maps).objects
    assert [(f.colour, f.shape) for f in objects] == [("yellow", "box"), ("yellow", "cylinder")]
    assert objects[0].area == pytest.approx(200 / SIDE**2)


def test_regions_of_too_few_pixels_are_dropped(data):
    maps = {name: torch.zeros(1, n, SIDE, SIDE) for name, n in reading.HEADS.items()}
    maps["centre"] = torch.full((1, 1, SIDE // 2, SIDE // 2), -9.0)
    maps["centre"][0, 0, 5, 5] = 9.0
    maps["colour"][:, 1, 10:13, 10:13] = 20.0
    assert decode(maps).objects == [[]]
    maps["colour"][:, 1, 10:14, 10:14] = 20.0
    assert [f.colour for f in decode(maps).objects[0]] == ["red"]
    maps["centre"][:] = -9.0
    assert decode(maps).objects == [[]]


def test_exact_output_minimizes_the_losses_and_training_lowers_them(data):
    truth = data.mask, data.disparity.float(), data.classes
    best = training.losses(exact_maps(data), *truth)
    assert all(float(value) < 0.01 for name, value in best.items() if name != "centre")
    torch.manual_seed(0)
    net = Reader((8, 8, 8))
    images = data.image.float() / 255
    first = torch.stack(list(training.losses(net(images), *truth).values())).sum()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(8):
        loss = torch.stack(list(training.losses(net(images), *truth).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * float(first.detach())


def test_saved_reader_weights_load(tmp_path):
    torch.manual_seed(0)
    net = Reader()
    torch.nn.init.normal_(net.heads.weight)
    reading.save_reader(net, tmp_path / "reader.safetensors")
    assert (tmp_path / "reader.safetensors").stat().st_size < 1.5e6
    loaded = reading.load_reader(tmp_path / "reader.safetensors")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(image)["colour"], loaded(image)["colour"], atol=0.1)


def test_measure_scores_exact_output_1_and_counts_missed_objects(data):
    maps = exact_maps(data)
    figures = training.measure(lambda images: maps, data, data.image.float() / 255)
    assert [figures[key] for key in ("count", "colour", "shape", "material")] == [1, 1, 1, 1]
    assert figures["disparity_error"] == 0
    maps["centre"][0] = -9.0  # the first scene's objects are missed
    figures = training.measure(lambda images: maps, data, data.image.float() / 255)
    assert figures["count"] == pytest.approx(11 / 12)
    assert figures["colour"] == pytest.approx(1 - len(data.scenes[0].solids) / figures["objects"])


def test_captions_list_objects_in_the_order_of_instance_ids():
    for index in range(20):
        scene = sample_scene(0, "held-out", index)
        assert judges.caption_objects(scene.caption) == [(s.colour, s.shape, s.material) for s in scene.solids]
    assert judges.caption_objects("nothing on a white plain floor at noon") == []


def detected(*attributes):
    """Return detected objects with these attributes, from left to right."""
    return [DetectedObject(*a, x=0.2 * i, y=0.5, area=0.1) for i, a in enumerate(attributes)]


RED_BOX, RED_CONE, BLUE_CONE = ("red", "box", "matte"), ("red", "cone", "matte"), ("blue", "cone", "shiny")


def test_matching_prefers_agreement_then_order():
    assert [f.attributes for f in judges.match(detected(BLUE_CONE, RED_BOX), [RED_BOX, BLUE_CONE])] == [
        RED_BOX,
        BLUE_CONE,
    ]
    pair = detected(RED_CONE, RED_CONE)
    assert judges.match(pair, [RED_CONE, RED_CONE]) == pair
    assert judges.match(detected(RED_CONE), [RED_BOX, BLUE_CONE])[1] is None  # the red object matches the red request
    assert judges.match([], [RED_BOX]) == [None]
    assert judges.match(detected(RED_BOX), []) == []


def test_caption_figures_count_each_attribute_separately(data):
    scenes = [sample_scene(0, "held-out", i, 2) for i in range(4)]
    captions = [scene.caption for scene in scenes]
    objects = [detected(*judges.caption_objects(caption)) for caption in captions]
    objects[1][0] = replace(objects[1][0], colour="red" if objects[1][0].colour != "red" else "blue")
    objects[2] = objects[2][:1]
    objects[3] = objects[3] + detected(BLUE_CONE)
    figures = judges.caption_figures(Reading(objects, torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)), captions)
    assert figures["all"].tolist() == [1, 0, 0, 0]
    assert figures["count"].tolist() == [1, 1, 0, 0]
    assert figures["colour"].tolist() == [1, 0.5, 0.5, 1]
    assert figures["shape"].tolist() == figures["material"].tolist() == [1, 1, 0.5, 1]
    nothing = judges.caption_figures(Reading([[]], torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)), ["nothing"])
    assert nothing["all"].tolist() == [1] and nothing["colour"].isnan().all()


def test_caption_judge_accepts_ground_truth_renders(data):
    judge = judges.caption_judge(lambda images: exact_reading(data))
    figures = judge(batch_of(data).image, torch.zeros(12, 0, SIDE, SIDE), batch_of(data))
    assert all(bool((values == 1).all()) for values in figures.values())
    assert next(iter(figures)) == "caption_all"


def test_hole_judge_checks_only_objects_in_the_hole(data):
    batch, condition = batch_of(data), torch.zeros(12, 4, SIDE, SIDE)
    condition[:, 3] = (data.mask == 1).float()  # the hole is the first object of each scene
    judge = judges.hole_judge(lambda images: exact_reading(data))
    assert judge(batch.image, condition, batch)["hole_objects"].tolist() == [1] * 12

    missing = exact_reading(data)
    for b in range(12):  # remove the objects in the hole only
        instance = int(missing.instances[b][data.mask[b] == 1][0])
        missing.instances[b][missing.instances[b] == instance] = 0
    assert judges.hole_judge(lambda images: missing)(batch.image, condition, batch)["hole_objects"].tolist() == [0] * 12

    reshaped = exact_reading(data)
    for b, objects in enumerate(reshaped.objects):  # right color, wrong shape
        index = int(reshaped.instances[b][data.mask[b] == 1][0]) - 1
        objects[index] = replace(objects[index], shape="cone" if objects[index].shape != "cone" else "box")
    figures = judges.hole_judge(lambda images: reshaped)(batch.image, condition, batch)
    assert figures["hole_objects"].tolist() == [0] * 12 and figures["hole_colours"].tolist() == [1] * 12

    condition[:, 3] = 0
    assert judge(batch.image, condition, batch)["hole_objects"].isnan().all()


def test_depth_judge_measures_disparity_error(data):
    batch, condition = batch_of(data), data.disparity.float()[:, None]
    exact = exact_reading(data)
    figures = judges.depth_judge(lambda images: exact)(batch.image, condition, batch)
    assert figures["depth_db"].tolist() == [60] * 12 and figures["caption_all"].tolist() == [1] * 12
    shifted = replace(exact, disparity=exact.disparity + 0.1)
    figures = judges.depth_judge(lambda images: shifted)(batch.image, condition, batch)
    assert torch.allclose(figures["depth_db"], torch.full((12,), 20.0, dtype=torch.float64), atol=0.01)
    assert torch.allclose(figures["depth_closeness"], torch.full((12,), 0.9, dtype=torch.float64), atol=1e-3)


def test_ground_truth_is_judged_once_per_batch(data):
    means = []

    def judge(output, condition, batch):
        means.append(float(output.mean()))
        brightness = output.mean((1, 2, 3))
        return {"brightness": brightness, "seldom": brightness.where(torch.arange(12) < 5, torch.nan)}

    batch = batch_of(data)
    witness = task_figures.RecordingJudge(judge, get_task("depth"))
    for _ in range(2):
        assert witness(torch.zeros_like(batch.image), torch.zeros(12, 1, SIDE, SIDE), batch)["brightness"].max() == 0
    assert len(means) == 3
    truth = witness.figures()
    assert float(truth["brightness"].mean()) == pytest.approx(float(batch.image.mean()))
    assert [int((~values.isnan()).sum()) for values in truth.values()] == [12, 5]


def test_composition_passes_each_adapter_its_input(data):
    batch = batch_of(data)
    batch.extras["conditioning_image"] = torch.full((12, 1, SIDE, SIDE), 4000.0)
    batch.extras["conditioning_image"][..., 0] = 8000.0
    task = task_figures.DepthInpaint()
    inputs = task.given(batch, torch.Generator().manual_seed(0))
    assert inputs.shape == (12, 5, SIDE, SIDE)
    assert torch.equal(inputs[:, :4], get_task("inpaint").given(batch, torch.Generator().manual_seed(0)))
    assert inputs[:, 4].amax() == 1 and inputs[..., 0][:, 4].amax() == 0
    judged = []
    judge = task_figures.composition_judge(lambda images: judged.append(images) or exact_reading(data))
    assert set(judge(batch.image, inputs, batch)) == {"hole_objects", "hole_colours", "hole_depth_db"}
    assert len(judged) == 1


class FakePipe:
    """A pipeline that records its calls; `info` is its adapter's info dict."""

    def __init__(self, task=None, **info):
        self.task, self.info, self.calls = task, info, []

    def guidance(self):
        return resolve(None, None, [self.info])

    def __call__(self, *, steps, guidance_scale, **inputs):
        self.calls.append((steps, guidance_scale))
        return argparse.Namespace(images=None)


def write_adapter(folder, task, images=16, **info_entries):
    """Write a folder with the config.json of an adapter of `task`."""
    folder.mkdir(exist_ok=True)
    info = {"task": task.name, "task_options": task.config(), "images": images, **info_entries}
    (folder / "config.json").write_text(json.dumps({"info": info}))
    return folder


def measure_rows(name, monkeypatch, tmp_path, pipes):
    """Return the rows (method, steps, guidance scale, adapter name) of a benchmark task, and the task measured.

    `pipes` maps adapter names to pipelines; "" is the backbone without an adapter.
    """
    for adapter, pipe in pipes.items():
        if adapter:
            write_adapter(tmp_path / adapter, pipe.task)
    rows = [("codi", tmp_path / f"{name}-full")] if f"{name}-full" in pipes else []
    load = lambda args, task=None, adapter=None: pipes[adapter.name if adapter else ""]  # noqa: E731
    monkeypatch.setattr(task_figures, "load", load)
    args = argparse.Namespace(model="mini", adapters=tmp_path, finetuned=tmp_path, rows=rows, guidance=3.0)
    methods, task = task_figures.methods_of(name, args)
    rows = []
    for method in methods:
        for steps in method.steps:
            method.run(torch.zeros(1, 3, 8, 8), [""], steps, [0])
            (adapter,) = [key for key, pipe in pipes.items() if pipe.calls]
            rows.append((method.name, *pipes[adapter].calls.pop(), adapter))
    return rows, task


def test_finetuned_reference_runs_with_the_adapters_guidance_and_without(monkeypatch, tmp_path):
    task = get_task("depth", soften=0.5)
    few = {"guidance": {"text": [1, 4]}, "guidance_scale": 2.0}
    pipes = {"depth": FakePipe(task, **few), "depth-finetuned": FakePipe(task), "depth-full": FakePipe(task, **few)}
    rows, measured = measure_rows("depth", monkeypatch, tmp_path, pipes)
    assert measured == get_task("depth", soften=0.0)
    few = (("pe-codi-tuned", "depth"), ("codi", "depth-full"))
    assert rows[:6] == [(method, n, None, adapter) for method, adapter in few for n in (1, 2, 4)]
    assert rows[6:] == [
        ("finetuned", 4, 2.0, "depth-finetuned"),
        ("finetuned", 50, 2.0, "depth-finetuned"),
        ("finetuned, no guidance", 50, 1.0, "depth-finetuned"),
    ]


def test_unguided_tasks_have_one_reference_and_generate_compares_with_the_backbone(monkeypatch, tmp_path):
    task = get_task("upscale")
    pipes = {"upscale": FakePipe(task), "upscale-finetuned": FakePipe(task)}
    rows, _ = measure_rows("upscale", monkeypatch, tmp_path, pipes)
    assert [row[:3] for row in rows[3:]] == [("finetuned", 4, 1.0), ("finetuned", 50, 1.0)]
    guided = FakePipe(get_task("generate"), guidance={"text": [1, 4]}, guidance_scale=2.0)
    rows, _ = measure_rows("generate", monkeypatch, tmp_path, {"generate": guided, "": FakePipe()})
    expected = [("backbone", 4, 2.0, ""), ("backbone", 50, 2.0, ""), ("backbone, guidance 3", 50, 3.0, "")]
    assert rows[3:] == expected


def test_entries_use_only_existing_adapters(monkeypatch, tmp_path):
    monkeypatch.setattr(task_figures, "find_adapter", Path)  # none is embedded
    runs, soft = tmp_path / "runs", get_task("depth", soften=0.5)
    runs.mkdir()
    for name, task in (("upscale-x8", get_task("upscale", scale=8)), ("depth", get_task("depth"))):
        write_adapter(runs / name, task)
    more = [("hint", write_adapter(tmp_path / "a", soft)), ("codi", write_adapter(tmp_path / "b", get_task("upscale")))]
    args = argparse.Namespace(model="mini", adapters=runs, finetuned=runs, rows=more)
    assert task_figures.adapters_of("depth", args) == {"pe-codi-tuned": runs / "depth", "hint": tmp_path / "a"}
    assert task_figures.adapters_of("upscale-x8", args) == {"pe-codi-tuned": runs / "upscale-x8"}  # the codi row is x4
    assert task_figures.adapters_of("upscale", args) == task_figures.adapters_of("composition", args) == {}
    write_adapter(runs / "inpaint", get_task("inpaint"))
    assert list(task_figures.adapters_of("composition", args)) == ["inpaint", "depth"]
    pipes = {"upscale-x8": FakePipe(get_task("upscale", scale=8))}
    rows, measured = measure_rows("upscale-x8", monkeypatch, runs, pipes)
    assert [row[:2] for row in rows] == [("pe-codi-tuned", n) for n in (1, 2, 4)] and measured.scale == 8


def test_entry_is_stale_when_an_adapter_changed(tmp_path):
    task = get_task("depth")
    adapters = {name: write_adapter(tmp_path / name, task, backbone="a" * 12) for name in ("depth", "depth-finetuned")}
    (adapters["depth"] / "a.safetensors").write_bytes(bytes(7))
    args = argparse.Namespace(model="mini", adapters=tmp_path, finetuned=tmp_path, rows=[])
    saved = {"adapters": task_figures.described(task_figures.adapters_of("depth", args))}
    assert saved["adapters"]["pe-codi-tuned"] == {"images": 16, "bytes": 7, "backbone": "a" * 12}
    assert task_figures.stale("depth", {}, args) and not task_figures.stale(
        "depth", json.loads(json.dumps(saved)), args
    )
    for changes in ({"images": 32}, {"backbone": "b" * 12}):
        write_adapter(adapters["depth-finetuned"], task, **{"backbone": "a" * 12, **changes})
        assert task_figures.stale("depth", saved, args)
    (adapters["depth-finetuned"] / "config.json").unlink()  # a deleted adapter keeps its measured entry
    assert not task_figures.stale("depth", saved, args)


def test_finetune_results_compare_the_adapter_on_fine_tune_and_backbone(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", "generate", {"text": [1, 3]})
    arguments = ["finetune.py", "--model", model, "--adapter", adapter, "--scenes", 3, "--updates", 2, "--batch", 2]
    arguments += ["--count", 2, "--size", 32, "--out", tmp_path / "results.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
    monkeypatch.setattr(finetune, "MANY", 5)
    finetune.main()
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [(row["method"], row["steps"]) for row in results["rows"]]
    assert rows == [("fine-tune", 5), ("fine-tune", 4), ("fine-tune + generate", 4), ("backbone + generate", 4)]
    assert results["rows"][2]["psnr"] != results["rows"][3]["psnr"]  # another backbone, another image
    assert results["judge_on_truth"]["night"] == 1 and results["backbone"] == digest(load_backbone(model).unet)
    assert "| fine-tune + generate | 4 |" in "\n".join(readme.finetune_lines(results))


def test_night_scenes_are_complete_and_captions_omit_the_night():
    source = finetune.NightScenes("held-out", 5)
    nights = [i for i in range(source.numbers[-1] + 1) if sample_scene(0, "held-out", i).time == "night"]
    assert source.numbers == nights and len(source) == 5
    (sample,) = source.read([3], 32)
    caption = sample_scene(0, "held-out", nights[3]).caption
    assert caption == f"{sample.text} at night" and judges.caption_objects(sample.text) == judges.caption_objects(
        caption
    )


def row(method, steps, fd, obedience, **more):
    """Return a result row."""
    figures = {"method": method, "steps": steps, "fd": fd, "obedience": obedience, "latency_ms": 10.0 * steps}
    return {**figures, "psnr": 20.0, "ssim": 0.8, "distance": 0.5, "measures": {}, **more}


def test_ratios_compare_with_the_better_many_step_row():
    rows = [row("pe-codi-tuned", 4, 11.0, 0.9), row("codi", 1, 5.0, 0.3), row("finetuned", 4, 3.0, 0.1)]
    rows.append(row("bicubic", 0, 30.0, None))  # no model, so no ratio
    many = [row("finetuned", 50, 20.0, 0.9), row("finetuned, no guidance", 50, 10.0, 0.6)]
    against = {"against": "finetuned, no guidance"}
    assert task_figures.ratios(rows + many, decibels=False) == {
        "pe-codi-tuned": {"4": {**against, "fd": 1.1, "obedience": pytest.approx(1.5), "speed": 12.5}},
        "codi": {"1": {**against, "fd": 0.5, "obedience": 0.5, "speed": 50}},
    }
    assert task_figures.ratios(rows + many[:1], decibels=False)["codi"]["1"]["against"] == "finetuned"
    assert task_figures.ratios(rows, decibels=False) == {}
    in_db = task_figures.ratios(rows + many, decibels=True)["pe-codi-tuned"]["4"]
    assert "obedience" not in in_db and in_db["obedience_db"] == pytest.approx(0.3)
    in_words = {name for name, (words, _) in readme.OBEDIENCE.items() if words.startswith("dB")}
    assert in_words == task_figures.DECIBELS


def test_recorded_command_has_no_local_paths(monkeypatch):
    arguments = ["benchmarks/tasks.py", "--adapters", "runs/a b", "--rows", "hint=/there/hint", "--out=../x/y.json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--data", "scenes:held-out:500"])
    line = "python benchmarks/tasks.py --adapters 'runs/a b' --rows hint=hint --out=y.json --data scenes:held-out:500"
    assert command.command_line() == line


def test_readme_shows_every_row_between_its_markers(tmp_path, monkeypatch):
    shared = {"count": 5, "device": "cpu", "machine": {"cpus": 2, "threads": 1}, "command": "python tasks.py"}
    rows = [row("pe-codi-tuned", n, 11.0, 22.25) for n in (1, 2, 4)] + [row("finetuned", 50, 10.0, 20.0)]
    rows.append(row("finetuned, no guidance", 50, 12.0, None))
    entry = {**shared, "obedience": "depth_db", "judge_on_truth": {"depth_db": 33.0}, "judged": {"depth_db": 5}}
    entry |= {"rows": rows, "ratios": task_figures.ratios(rows, decibels=True)}
    entry["adapters"] = {"pe-codi-tuned": {"images": 5000, "bytes": 3_140_000, "backbone": None}}
    shares = [row("pe-codi-tuned", 4, 11.0, 0.8), row("finetuned", 50, 10.0, 0.9)]
    canny = {**entry, "obedience": "edge_f1", "rows": shares, "ratios": task_figures.ratios(shares, decibels=False)}
    holes = row("inpaint + 1 depth", 4, 9.0, 0.5, measures={"hole_objects": 0.5, "hole_depth_db": 17.0})
    both = {**shared, "obedience": "hole_objects", "judge_on_truth": {}, "judged": {"hole_objects": 3}, "rows": [holes]}
    inpaint = {
        **both,
        "device": "cuda",
        "machine": {"gpu": "H100"},
        "rows": [],
        "ratios": {},
        "command": "python gpu.py",
    }
    figures = dict.fromkeys(("all", "count", "colour", "shape", "material"), 0.5)
    counts = figures | {"by_count": {"1": figures}}
    results = {
        "tasks.json": {"tasks": {"depth": entry, "canny": canny, "inpaint": inpaint, "composition": both}},
        "backbone.json": {
            "codec_psnr_db": 33.0,
            "fd_codec": 3.0,
            "prompts": 4,
            "steps": 25,
            "guidance_scale": 3.0,
            "judge_on_true_renders": counts,
            "rows": [{"fd": 20.0, **counts}],
        },
        "reader.json": {
            "held_out": {**figures, "disparity_error": 0.01},
            "held_out_through_codec": {**figures, "colour": 0.25, "disparity_error": 0.02},
        },
        "decoder.json": {
            "size": 64,
            "count": 500,
            "psnr_db": {"scenes": {"to_full": 33.0, "tiny": 30.0, "full": 31.0, "fd_tiny": 42.0, "fd_full": 41.0}},
            "decode": {"64": {"ratio": 3.5}, "256": {"ratio": 4.0}},
            "decoder_parameters": {"tiny": 230_000, "full": 1_000_000},
            "command": "python decoder.py",
        },
    }
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name, result in results.items():
        (tmp_path / "benchmarks" / "results" / name).write_text(json.dumps(result))
    (tmp_path / "README.md").write_text("before\n" + readme.BEGIN + "old\n" + readme.END + "after\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "benchmarks" / "results")
    readme.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n" + readme.BEGIN) and text.endswith(readme.END + "after\n") and "old" not in text
    assert "| depth | pe-codi-tuned | 4 | 11.0 | 0.5000 | 22.2 | 40 |" in text
    assert "| depth | finetuned, no guidance | 50 | 12.0 | 0.5000 | - | 500 |" in text
    ratios = "x1.10 · +2.2 dB · x50 | x1.10 · +2.2 dB · x25 | x1.10 · +2.2 dB · x12"
    assert f"| depth | pe-codi-tuned | 5,000 | 3.1 | finetuned | {ratios} | missed: FD |" in text
    assert "| canny | pe-codi-tuned | 5,000 | 3.1 | finetuned | x1.10 · x0.89 · x12 | missed: FD, obedience |" in text
    assert "on 1 of 2 CPU cores or H100." in text
    assert text.count("`python tasks.py`") == text.count("`python gpu.py`") == 1
    assert text.count("(3 of the scenes have any)") == 2 and "colour 50.0% (25.0%)" in text
    assert "| inpaint + 1 depth | 4 | 9.0 | 50% | 17.0 |" in text
    assert "| 1 to 4 | 50% (50%) |" in text
    assert "3.5 times at 64 px and 4.0 times at 256 px" in text and "| 33.0 | 30.0 | 31.0 |" in text
    assert set(readme.OBEDIENCE) >= set(task_figures.HEADLINES.values())
    readme.main()
    assert (tmp_path / "README.md").read_text() == text


def test_only_the_exact_flow_map_has_zero_for_both_losses():
    """Its samples have the data's standard deviation at any step count; those of the mean have 0 in one step."""
    rows = {name: one_step.errors(function, 20_000) for name, (function, _) in one_step.FUNCTIONS.items()}
    both = [name for name, (data, *_, end, half) in rows.items() if max(abs(data), end, half) < 1e-6]
    assert both == ["flow map"]
    paper, release = {name: row[1] for name, row in rows.items()}, {name: row[4] for name, row in rows.items()}
    assert min(paper, key=lambda name: paper[name]) == "straight coupling" and paper["straight coupling"] < 1e-9
    assert min(release, key=lambda name: release[name]) == "end of the ODE" and release["end of the ODE"] < 1e-5
    for steps in (1, 3):
        assert one_step.deviation(one_step.ode_map, "map", steps) == pytest.approx(0.5)
    assert one_step.deviation(one_step.denoiser, "ddim", 1) == pytest.approx(0, abs=1e-6)
