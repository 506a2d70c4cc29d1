"""`codi data check`: counts of images, captions and columns; exit code 1 if training on the data set would fail."""

import json
import os
import tarfile
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from codi.apps.data import first_batch
from codi.data import check
from codi.data.batches import batches
from codi.data.check import check_data, contact_sheet
from codi.data.duplicates import near_groups, perceptual_hash
from codi.data.samples import PictureSource
from codi.data.sources import open_source
from codi.errors import UserError
from codi.tasks import TASKS, get_task
from codi.training.trainer import Job, RunSettings, train
from folders import noise, refused, rows_of, serve, shard, smooth
from shell import picture


def rewrite(folder, change):
    """Edit each row of a folder's metadata.jsonl in place with `change(number, row)`."""
    rows = rows_of(folder)
    for number, row in enumerate(rows):
        change(number, row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Reading.


def test_images_are_counted_and_measured(tmp_path):
    for i, side in enumerate((20, 64, 100)):
        noise(side, side + 9, i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    rows = [{"file_name": f"{i}.png", "text": "a good caption" if i == 1 else ""} for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    calls = []
    report = check_data(tmp_path, size=64, progress=lambda *done: calls.append(done))
    assert (report.images, report.side_min, report.side_median, report.side_max) == (4, 20, 64, 100)
    assert report.captions_missing == 2 and report.caption_words == (3, 3, 3) and report.too_small == ["0.png"]
    assert [c.file for c in report.corrupt] == ["3.png"] and report.readable == 3
    assert calls == [(n, 4) for n in (1, 2, 3, 4)]
    assert check_data(tmp_path, size=16, count=2).looked == 2
    assert report.faults() == []


def test_columns_are_measured(rendered):
    names = ("conditioning_image", "mask", "edited_image")
    depth, mask = (
        np.stack([cv2.imread(str(rendered / row[f"{c}_file_name"]), cv2.IMREAD_UNCHANGED) for row in rows_of(rendered)])
        for c in names[:2]
    )
    (rendered / "edited" / "000003.png").write_bytes((rendered / "000003.png").read_bytes())
    columns = check_data(rendered, names).columns
    assert [c.found for c in columns.values()] == [6, 6, 6] and [c.bits for c in columns.values()] == [[16], [16], [8]]
    depth_column = columns["conditioning_image"]
    assert (depth_column.low, depth_column.high) == (depth[depth > 0].min(), depth.max())
    assert depth_column.zero_share == pytest.approx((depth == 0).mean())
    assert columns["mask"].most_ids == max(len(np.unique(m)) - 1 for m in mask)
    assert columns["edited_image"].unchanged == 1


def test_every_kind_of_source_is_read(rendered, tmp_path, monkeypatch):
    shard(rendered, tmp_path / "x.tar", rows_of(rendered))
    rows = [
        {"image": (rendered / row["file_name"]).read_bytes(), "text": row["text"], "instruction": row["instruction"]}
        | {"mask": (rendered / row["mask_file_name"]).read_bytes()}
        for row in rows_of(rendered)
    ]
    serve(monkeypatch, rows, ("image", "mask"))
    specs = (rendered, tmp_path / "x.tar", "datasets:served", "scenes:train:6:1")
    reports = [check_data(spec, ("mask",), size=32) for spec in specs]
    for report in reports:
        assert report.columns == reports[0].columns and report.faults() == []
        assert report.caption_words == reports[0].caption_words and report.images == report.looked == 6


def test_only_a_sample_of_unlimited_scenes_is_checked(monkeypatch):
    monkeypatch.setattr("codi.data.check.SCENES", 3)
    report = check_data("scenes:train", size=32)
    assert (report.images, report.looked) == (20_000, 3)
    assert check_data("scenes:train", size=32, count=2).looked == 2


def test_duplicates_and_near_duplicates_are_found(tmp_path):
    photo = smooth(200, 160)
    photo.paste(noise(60, 60).resize((90, 90)), (40, 30))
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.jpg", quality=80)
    photo.resize((150, 120)).save(tmp_path / "c.png")
    for name in ("d", "e"):
        noise(50, 50, seed=3).save(tmp_path / f"{name}.png")
    noise(50, 50, seed=4).save(tmp_path / "f.png")
    report = check_data(tmp_path, size=32)
    assert report.duplicates == [["d.png", "e.png"]]
    assert [sorted(group) for group in report.near_duplicates] == [["a.png", "b.jpg", "c.png"]]
    assert report.faults() == []


def test_repeated_images_are_decoded_once(rendered, monkeypatch):
    """Metadata may list one image many times; the caption of each row counts."""
    rows, decoded, original = rows_of(rendered), [], PictureSource.decode
    other_mask = {**rows[0], "mask_file_name": rows[1]["mask_file_name"]}
    rows = [*({**rows[0], "text": "word " * n} for n in (1, 2, 3)), other_mask]
    (rendered / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(check.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(PictureSource, "decode", staticmethod(lambda row: decoded.append(row) or original(row)))
    report = check_data(rendered, ("mask",), size=32)
    assert len(decoded) == 2 and report.looked == 4 and report.columns["mask"].found == 4
    assert report.caption_words[:2] == (1, 2) and report.duplicates == [["000000.png"] * 4]


def test_file_names_that_are_not_utf_8_are_shown(shell, tmp_path):
    noise(20, 20).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    ran = shell("data", "check", tmp_path, "--task", "canny", "--size", "32")
    assert ran.code == 0 and "caf\\udce9.png" in ran.out
    ran = shell("data", "check", tmp_path, "--task", "canny", "--size", "32", "--json")
    assert ran.code == 0 and json.loads(ran.out)["too_small"] == ["caf\udce9.png"]


def test_unused_files_are_reported(rendered, tmp_path, shell):
    """An image without a metadata row, and a caption in a tar without its image. Neither is a fault."""
    rows = rows_of(rendered)
    (rendered / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    unused = [rows[0][key] for key in rows[0] if key.endswith("file_name")]
    report = check_data(rendered, ("mask",), size=32)
    assert report.unused == sorted(unused) and report.faults() == [] and report.images == 5
    ran = shell("data", "check", rendered, "--task", "inpaint", "--size", "32")
    line = f"4 left out, without a line in the metadata or a picture in the tar: {min(unused)}"
    assert ran.code == 0 and line in ran.out
    shard(rendered, tmp_path / "x.tar", rows[1:3])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        tar.add(rendered / "metadata.jsonl", "alone.txt")
    assert check_data(tmp_path / "x.tar", size=32).unused == ["x.tar: alone"]
    assert check_data("scenes:train", size=32, count=2).unused == []


def test_only_near_hashes_are_grouped():
    rng = np.random.default_rng(0)
    hashes = [int(h) for h in rng.integers(0, 2**63, 200, dtype=np.uint64)]
    hashes += [hashes[0] ^ 0b111, hashes[0] ^ 0b111 ^ (0b11 << 40), hashes[1] ^ (0b1111 << 20), hashes[2]]
    assert sorted(near_groups(hashes)) == [[0, 200, 201], [2, 203]]
    crowded = [int(h) << 16 for h in rng.integers(0, 2**48, 5_000)]  # share one band with many others
    began = time.perf_counter()
    assert near_groups([*crowded, crowded[7] ^ (1 << 20)]) == [[7, 5_000]] and time.perf_counter() - began < 5
    assert near_groups([]) == [] and near_groups([5]) == []
    assert perceptual_hash(noise(40, 40)) < 2**64


# Faults that would stop training.


def test_missing_columns_are_a_fault(rendered):
    def drop(number, row):
        if number in (2, 4):
            del row["mask_file_name"]

    rewrite(rendered, drop)
    report = check_data(rendered, ("mask",))
    assert report.columns["mask"].missing == ["000002.png", "000004.png"] and report.columns["mask"].found == 4
    assert report.faults() == ["2 of 6 pictures have no mask (000002.png is the first)"]
    refused(lambda: open_source(rendered, ("mask",)), "no mask")


def test_mixed_bit_depths_are_a_fault(rendered):
    noise(32, 32).convert("L").save(rendered / "depth" / "000001.png")
    assert "8 and of 16 bits" in check_data(rendered, ("conditioning_image",)).faults()[0]
    mask = rendered / rows_of(rendered)[1]["mask_file_name"]  # instance ids may be of any depth
    Image.fromarray(np.asarray(Image.open(mask)).astype(np.uint8)).save(mask)
    report = check_data(rendered, ("mask",))
    assert report.columns["mask"].bits == [8, 16] and report.faults() == []
    assert next(batches(open_source(rendered, ("mask",)), 6, 32, seed=0)).extras["mask"].shape == (6, 1, 32, 32)


def test_16_bit_images_are_brightness_not_ids(rendered):
    name = rows_of(rendered)[1]["edited_image_file_name"]
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(grey).save(rendered / name)
    assert check_data(rendered, ("edited_image",)).faults() == []
    truth = next(batches(open_source(rendered, ("edited_image",)), 6, 32, seed=0)).extras["edited_image"]
    assert truth.shape == (6, 3, 32, 32) and truth.max() <= 1
    first_batch(get_task("edit"), str(rendered), 32, 0, 6)


def test_size_must_be_a_multiple_of_the_latent_cell(shell, rendered, tmp_path):
    command = ("data", "check", rendered, "--task", "canny", "--size", 36)
    assert shell(*command).code == 0
    (tmp_path / "model" / "vae").mkdir(parents=True)  # the config is enough
    (tmp_path / "model" / "vae" / "config.json").write_text('{"block_out_channels": [4, 8, 8, 8]}')
    shell(*command, "--model", tmp_path / "model").failed(1, "size 36 is not a multiple of 8", "use 32")
    shell(*command, "--model", tmp_path / "gone").failed(1, "gone: no model there")


def test_missing_instructions_are_a_fault_only_for_tasks_that_use_them(rendered):
    rewrite(rendered, lambda number, row: row.pop("instruction") if number < 2 else None)
    report = check_data(rendered, ("edited_image",))
    assert report.instructions_missing == 2 and report.faults("text") == []
    assert report.faults("instruction") == ["2 of 6 pictures have no instruction"]
    assert report.faults("instruction", max_corrupt=0.5) == []


def test_pairs_of_another_shape_are_corrupt_and_of_another_size_scaled(rendered):
    noise(32, 24).save(rendered / "edited" / "000000.png")
    noise(64, 64).save(rendered / "edited" / "000001.png")
    (rendered / "edited" / "000002.png").write_bytes(b"junk")
    report = check_data(rendered, ("edited_image",), size=32)
    assert [c.file for c in report.corrupt] == ["000000.png", "000002.png"]
    assert "its edited_image has another shape" in report.corrupt[0].why
    assert "its edited_image: is not an image" in report.corrupt[1].why
    assert report.columns["edited_image"].resized == 1 and report.columns["edited_image"].found == 4


# The command.


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_is_checked_with_a_sheet_of_its_conditions(shell, rendered, tmp_path, task):
    ran = shell("data", "check", rendered, "--task", task, "--size", 32, "--sheet", tmp_path / "sheet.png")
    assert (ran.code, ran.err) == (0, "") and "6 pictures" in ran.out
    assert all(f"{column}: 6 of 6 pairs" in ran.out for column in get_task(task).columns)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height > 6 * 96 and len(json.loads(sheet.text["prompts"])) == 6
    assert shell("data", "check", "scenes:train:4", "--task", task, "--size", 32).code == 0


def test_first_batch_equals_the_training_batch(rendered):
    task = get_task("edit")
    first = first_batch(task, str(rendered), size=32, seed=3, count=4)
    batch = next(batches(open_source(rendered, task.columns), 4, 32, seed=3))
    assert torch.equal(first.condition, batch.image) and torch.equal(first.truth, batch.extras["edited_image"])
    assert first.prompts == batch.instruction


@pytest.mark.parametrize("name", ["inpaint", "upscale"])
def test_first_batch_draws_the_same_inputs_as_the_trainer(rendered, tmp_path, name):
    """Task inputs (masks, degradations) are random: those of the first update must match."""
    drawn, task = [], get_task(name)

    class RecordingJob(Job):
        def __init__(self):
            super().__init__()
            self.online, self.average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

        def batches(self, start, stride):
            return batches(open_source(rendered, task.columns), 4, 32, seed=3, start=start)

        def forward(self, batch, generator):
            drawn.append(task.given(batch, generator))
            return {"loss": self.online(torch.ones(1, 1)).square().mean()}

        def preview(self, out, progress):
            return {}

    train(RecordingJob(), RunSettings(images=4, batch_size=4, seed=3, device="cpu"), tmp_path / "run", quiet=True)
    inputs = first_batch(task, str(rendered), size=32, seed=3, count=6).given
    assert torch.equal(inputs[:4], drawn[0]) and not torch.equal(inputs[:4, -1], inputs[1:5, -1])


def test_task_options_apply(shell, rendered, tmp_path):
    (tmp_path / "plain").mkdir()
    noise(40, 40).save(tmp_path / "plain" / "a.png")
    options = ("--task", "inpaint", "--task-options", "{masks: [objects]}", "--size", 32)
    ran = shell("data", "check", rendered, *options)
    assert ran.code == 0 and "mask: 6 of 6 pairs; 16 bit" in ran.out
    shell("data", "check", tmp_path / "plain", *options).failed(1, "1 of 1 pictures have no mask")
    assert shell("data", "check", tmp_path / "plain", "--task", "inpaint", "--size", 32).code == 0
    shell("data", "check", rendered, "--task-options", "{scale: 5}").failed(2, "--size 64", "scale 5", "use 60")
    shell("data", "check", rendered, "--task-options", "scale").failed(2, "--task-options scale", "key: value")
    shell("data", "check", rendered, "--task-options", "{sale: 2}").failed(2, "sale", "did you mean 'scale'")


def test_faults_are_printed_last_and_listed_in_json(shell, rendered):
    rewrite(rendered, lambda number, row: row.pop("instruction"))
    ran = shell("data", "check", rendered, "--task", "edit", "--size", 32, "--json")
    ran.failed(1, "6 of 6 pictures have no instruction")
    report = json.loads(ran.out)
    assert (
        report["faults"] == ["6 of 6 pictures have no instruction"] and report["columns"]["edited_image"]["found"] == 6
    )
    rewrite(rendered, lambda number, row: row.pop("edited_image_file_name"))
    shell("data", "check", rendered, "--task", "edit", "--size", 32).failed(1, "6 of 6 pictures have no edited_image")
    assert shell("data", "check", rendered, "--task", "depth", "--size", 32).code == 0


def test_uninformative_conditions_and_missing_captions_are_remarked(shell, tmp_path):
    for k in range(3):
        Image.new("RGB", (40, 40), (k, k, k)).save(tmp_path / f"{k}.png")
    ran = shell("data", "check", tmp_path, "--task", "canny", "--size", 32)
    assert ran.code == 0 and "3 of 3 conditions are flat" in ran.out and "would learn to ignore prompts" in ran.out
    assert "flat" not in shell("data", "check", tmp_path, "--task", "generate", "--size", 32).out


def test_invalid_conditions_and_targets_of_a_task_are_refused(tmp_path):
    picture(tmp_path / "a.png", 40, 40)
    task = SimpleNamespace(
        name="own", columns=(), condition_channels=3, given=lambda batch, generator: batch.image,
        condition=lambda given: given * 2, truth=lambda batch: batch.image, prompts=lambda batch: [""],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"task own: its condition leaves \[0, 1\]"):
        first_batch(task, str(tmp_path), 32, 0, 1)  # type: ignore[arg-type]
    task.condition = lambda given: given[:, :1]
    with pytest.raises(UserError, match=r"its condition is \(1, 1, 32, 32\), not \(1, 3, 32, 32\)"):
        first_batch(task, str(tmp_path), 32, 0, 1)  # type: ignore[arg-type]
    task.condition = lambda given: given
    for truth, message in (
        (lambda batch: batch.image[:, :1], r"its truth is \(1, 1, 32, 32\)"),
        (lambda batch: batch.image * 300, "its truth leaves"),
    ):
        task.truth = truth
        with pytest.raises(UserError, match=message):
            first_batch(task, str(tmp_path), 32, 0, 1)  # type: ignore[arg-type]


# The contact sheet.


def test_contact_sheet_shows_all_images():
    sheet = np.asarray(
        contact_sheet([torch.full((3, 8, 8), v) for v in (0.0, 0.5, 1.0, 2.0)] + [torch.zeros(3, 4, 6)], 2)
    )
    assert sheet.shape == (3 * 10 + 2, 2 * 10 + 2, 3) and sheet.dtype == np.uint8
    assert (sheet[2:10, 2:10] == 0).all() and (sheet[2:10, 12:20] == 128).all() and (sheet[12:20, 2:10] == 255).all()
    assert (sheet[22:26, 2:8] == 0).all() and (sheet[22:30, 12:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], 2)
