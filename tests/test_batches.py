"""Batches depend only on seed and position; corrupt files are replaced, counted and reported."""

import json
import threading
from itertools import islice

import cv2
import numpy as np
import pytest
import torch

from codi.data.batches import batches
from codi.data.sources import open_source
from codi.models import codec
from codi.training.checkpoint import Progress
from codi.training.events import Events
from codi.training.latents import encode_all, npy_bytes
from codi.training.pretrain_recipe import first_pictures
from folders import noise, read, refused, rows_of, same
from tiny import tiny_vae


def test_batches_are_a_pure_function_of_seed_and_position(photos):
    source = open_source(photos)
    run = list(islice(batches(source, 4, 32, seed=5), 8))
    repeated = list(islice(batches(open_source(photos), 4, 32, seed=5), 8))
    assert all(map(same, run, repeated))
    resumed = list(islice(batches(source, 4, 32, seed=5, start=12), 5))
    assert all(map(same, run[3:], resumed)) and [b.index for b in run[3:]] == [b.index for b in resumed]
    singles = list(islice(batches(source, 1, 32, seed=5), 32))
    assert torch.equal(torch.cat([b.image for b in singles]), torch.cat([b.image for b in run]))
    other_seed = next(batches(source, 12, 32, seed=6))
    assert other_seed.index != [i for b in run[:3] for i in b.index]


def test_each_epoch_has_a_new_permutation_and_new_crops(photos):
    one, two = islice(batches(open_source(photos), 12, 32, seed=0), 2)
    assert sorted(one.index) == sorted(two.index) == list(range(12)) and one.index != two.index
    assert one.text[one.index.index(0)] == two.text[two.index.index(0)] == "picture 6"
    large = one.index.index(5), two.index.index(5)  # 95 x 83 pixels: room for a crop
    assert not torch.equal(one.image[large[0]], two.image[large[1]])


def test_batch_holds_images_texts_columns_and_indices(rendered):
    batch = next(batches(open_source(rendered, ("mask", "edited_image")), 4, 32, seed=0))
    assert batch.image.shape == (4, 3, 32, 32) and batch.image.is_contiguous()
    assert batch.extras["mask"].shape == (4, 1, 32, 32) and batch.extras["edited_image"].shape == (4, 3, 32, 32)
    rows = rows_of(rendered)
    assert batch.text == [rows[i]["text"] for i in batch.index]
    assert batch.instruction == [rows[i]["instruction"] for i in batch.index]


def test_zoom_crops_at_full_resolution(tmp_path):
    noise(90, 70, 3).save(tmp_path / "a.png")
    image = torch.from_numpy(np.asarray(noise(90, 70, 3)).copy()).permute(2, 0, 1)
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 55, 75, 16, 16)
    positions = set()
    for batch in islice(batches(open_source(tmp_path, zoom=(9, 9)), 1, 16, seed=0), 4):
        crop = (batch.image[0] * 255).round().byte()
        places = (windows == crop[:, None, None]).flatten(3).all(3).all(0).nonzero()
        assert len(places) == 1
        positions.add(tuple(places[0].tolist()))
    assert len(positions) == 4
    (center,) = open_source(tmp_path, zoom=(2, 3)).read([0], 16)
    assert torch.allclose(center.image.mean(), image[:, 17:52, 27:62].float().mean() / 255, atol=0.02)
    refused(lambda: open_source("scenes:held-out:4", zoom=(4, 8)), "zoom", "scenes:held-out:4")


def test_prefetching_gives_the_same_batches_and_stops_its_thread(photos):
    source = open_source(photos)
    expected = list(islice(batches(source, 4, 32, seed=5), 6))
    stream = batches(source, 4, 32, seed=5, prefetch=True)
    assert all(map(same, expected, islice(stream, 6)))
    assert "batches" in [t.name for t in threading.enumerate()]
    stream.close()
    assert "batches" not in [t.name for t in threading.enumerate()]


def test_arguments_out_of_range_are_refused(photos):
    source = open_source(photos)
    refused(lambda: batches(source, 0, 32, 0), "batch size 0")
    refused(lambda: batches(source, 4, 0, 0), "size 0")
    refused(lambda: batches(source, 4, 32, -1), "seed -1")
    refused(lambda: batches(source, 4, 32, 0, start=-4), "start -4")


def folder_with(tmp_path, good, bad):
    """Write a folder of `good` images and `bad` unreadable files."""
    folder = tmp_path / f"{good}-{bad}"
    folder.mkdir()
    for i in range(good):
        noise(16, 16, i).save(folder / f"good{i:03d}.png")
    for i in range(bad):
        (folder / f"bad{i:03d}.png").write_bytes(b"not a picture")
    return folder


def test_corrupt_files_are_replaced_counted_once_and_reported(tmp_path):
    source, report = open_source(folder_with(tmp_path, 97, 3)), tmp_path / "new" / "report.json"
    stream = batches(source, 10, 16, seed=0, report=report)
    run = list(islice(stream, 30))
    stream.close()
    assert all(b.image.shape[0] == 10 and min(b.index) >= 3 for b in run)
    summary = json.loads(report.read_text())
    assert summary["read"] == 100 and summary["skipped"] == 3
    assert [f["file"] for f in summary["files"]] == ["bad000.png", "bad001.png", "bad002.png"]
    assert all("is not an image" in f["why"] for f in summary["files"])
    assert list(report.parent.iterdir()) == [report]
    # A corrupt file, known or new, is replaced by the next readable one in order.
    order = np.random.default_rng([0, 0, 0]).permutation(100).tolist()
    expected = [next(i for i in order[p:] if i >= 3) for p in range(90)]
    assert [i for b in run[:9] for i in b.index] == expected
    resumed = list(islice(batches(source, 10, 16, seed=0, start=50), 25))
    assert all(map(same, run[5:], resumed)) and [b.index for b in run[5:]] == [b.index for b in resumed]


def test_too_many_corrupt_files_stop_the_run_with_a_report(tmp_path):
    source, report = open_source(folder_with(tmp_path, 60, 40)), tmp_path / "report.json"
    stream = batches(source, 4, 16, seed=0, report=report)
    message = refused(lambda: list(stream), "bad0", "corrupt", "5%", report)
    assert json.loads(report.read_text())["skipped"] >= 5
    read = int(message.split(" of ")[1].split()[0])
    assert 20 <= read < 60
    assert len(list(islice(batches(source, 4, 16, seed=0, max_corrupt=0.5), 60))) == 60
    refused(lambda: list(batches(source, 4, 16, seed=0, prefetch=True)), "corrupt")


def test_corrupt_share_is_exact_after_all_files_are_read(tmp_path):
    over, at = (open_source(folder_with(tmp_path, good, bad)) for good, bad in ((46, 4), (57, 3)))
    refused(lambda: list(batches(over, 10, 16, seed=1)), "4 of 50")
    assert len(list(islice(batches(at, 10, 16, seed=1), 12))) == 12


def test_corrupt_limit_ignores_tiny_data_sets_unless_no_file_is_readable(tmp_path):
    run = list(islice(batches(open_source(folder_with(tmp_path, 2, 3)), 4, 16, seed=0), 5))
    assert all(set(b.index) <= {3, 4} for b in run)
    refused(lambda: next(batches(open_source(folder_with(tmp_path, 0, 3)), 2, 16, seed=0)), "no other file is readable")
    refused(
        lambda: next(batches(open_source(folder_with(tmp_path, 0, 90)), 2, 16, seed=0, max_corrupt=1.0)), "readable"
    )


def test_batch_of_mixed_bit_depths_is_refused(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((16, 16), np.uint16))
    rows = [{"file_name": "a.png", "conditioning_image": name} for name in ("deep.png", "a.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path, ("conditioning_image",))
    refused(lambda: next(batches(source, 2, 16, seed=0)), "bit depth")


def test_corrupt_share_for_pretraining_counts_all_files(tmp_path):
    """A whole block of 64 files may be unreadable."""
    source, vae = open_source(folder_with(tmp_path, 40, 70)), tiny_vae()
    latents, captions = encode_all(vae, source, 16, tmp_path / "work", max_corrupt=0.7)
    assert latents.shape == (40, 4, 4, 4) and captions == [""] * 40
    with torch.no_grad():
        expected = codec.encode(vae, read(source, range(109, 110), 16)[0].image[None])
    torch.testing.assert_close(torch.from_numpy(np.array(latents[-1:])), expected.half(), atol=2e-3, rtol=2e-3)
    summary = json.loads((tmp_path / "work" / "corrupt.json").read_text())
    assert (summary["read"], summary["skipped"], summary["files"][69]["file"]) == (110, 70, "bad069.png")
    refused(lambda: encode_all(vae, source, 16, tmp_path / "b"), "bad000.png", "70 of 110", "5%", "corrupt.json")
    none = open_source(folder_with(tmp_path, 0, 3))
    refused(lambda: encode_all(vae, none, 16, tmp_path / "c"), "no other file is readable")
    refused(lambda: first_pictures(none, 2, 16), "no picture could be read")
    assert torch.equal(first_pictures(source, 2, 16)[0], torch.stack([s.image for s in read(source, [70, 71], 16)]))
    assert len(first_pictures(source, 90, 16)[0]) == 40


def test_npy_bytes_equal_those_of_numpy(tmp_path):
    array = noise_latents()
    np.save(tmp_path / "plain.npy", array)
    assert b"".join(npy_bytes(array)) == (tmp_path / "plain.npy").read_bytes()


def noise_latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float16)


def test_full_disk_error_names_the_training_log(tmp_path):
    events = Events(tmp_path, 8, Progress(), quiet=True)
    events.log.close()
    events.log = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError) as raised:
        events.scalars(Progress(), {"loss": 1.0})
    assert raised.value.filename == "/dev/full"
