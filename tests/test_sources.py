"""Sources of training data: folders, tars and scenes give equal samples; damage is a corrupt sample, never silent."""

import io
import json
import zlib
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from codi.data.batches import batches
from codi.data.check import check_data
from codi.data.samples import PictureSource
from codi.data.scenes import sample_scene
from codi.data.sources import CorruptSample, Sample, open_source
from folders import noise, png, read, refused, rows_of, same, shard, smooth, write_tar


def test_a_folder_without_metadata_is_its_sorted_images(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.webp", ".hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(20, 20).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(tmp_path)
    samples = read(source, range(3), 16)
    assert [s.name for s in samples] == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert [s.text for s in samples] == ["", "", ""]
    assert "3 pictures" in source.describe()


def test_metadata_gives_the_samples_and_their_order(photos):
    noise(20, 20).save(photos / "unlisted.png")
    samples = read(open_source(photos), range(12), 32)
    assert [s.text for s in samples] == [f"picture {i}" for i in (*range(6, 12), *range(6))]
    assert [s.instruction for s in samples][:2] == ["do 6", "do 7"]
    assert all(s.image.shape == (3, 32, 32) and s.image.dtype == torch.float32 for s in samples)
    assert all(s.image.min() >= 0 and s.image.max() <= 1 for s in samples)


def test_metadata_in_sub_folders_names_files_beside_it(tmp_path):
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        noise(20, 20).save(tmp_path / part / "x.png")
        (tmp_path / part / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": part}))
    assert [s.text for s in read(open_source(tmp_path), [0, 1], 16)] == ["one", "two"]


def test_metadata_may_name_files_outside_the_folder(tmp_path, monkeypatch):
    folder, far = tmp_path / "list", tmp_path / "far.png"
    folder.mkdir()
    noise(20, 20).save(far)
    noise(20, 20).save(folder / "near.png")
    rows = [{"file_name": str(far)}, {"file_name": "../far.png"}, {"file_name": str(folder / "near.png")}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [s.name for s in read(open_source(folder), range(3), 16)] == [str(far), "../far.png", "near.png"]
    monkeypatch.chdir(tmp_path)
    assert [s.name for s in read(open_source("list"), [1, 2], 16)] == ["../far.png", str(folder / "near.png")]


def test_images_of_the_requested_size_are_untouched_and_others_center_cropped(tmp_path):
    picture = noise(32, 32)
    picture.save(tmp_path / "a.png")
    smooth(200, 100).save(tmp_path / "b.png")
    noise(8, 8).save(tmp_path / "c.png")
    a, b, c = read(open_source(tmp_path), range(3), 32)
    assert torch.equal((a.image * 255).byte(), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert b.image[0].mean().item() == pytest.approx(0.5, abs=0.01)
    assert b.image[0, :, 0].mean().item() == pytest.approx(0.25, abs=0.02)  # the middle half of the width, all heights
    assert b.image[1, 0].mean().item() < 0.03
    assert c.image.shape == (3, 32, 32)


def test_every_mode_becomes_rgb(tmp_path):
    base = noise(24, 24)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        base.convert(mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    ramp = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "sixteen.png"), ramp)
    samples = {s.name: s for s in read(open_source(tmp_path), range(6), 24)}
    assert all(isinstance(s, Sample) and s.image.shape == (3, 24, 24) for s in samples.values())
    deep = samples["sixteen.png"].image
    torch.testing.assert_close(deep[0], torch.from_numpy(ramp / 65535).float(), atol=0.003, rtol=0)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the image
    smooth(64, 64).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (sample,) = read(open_source(tmp_path), [0], 64)
    assert sample.image[0, 0].mean() < 0.1 and sample.image[0, -1].mean() > 0.9


def test_a_large_jpeg_decoded_at_reduced_size_is_similar(tmp_path):
    smooth(800, 800).save(tmp_path / "a.jpg", quality=95)
    smooth(800, 800).save(tmp_path / "b.png")
    jpeg, png = read(open_source(tmp_path), [0, 1], 32)
    assert (jpeg.image - png.image).abs().max() < 0.03


def test_columns_are_read_and_cropped_like_the_image(rendered):
    rows = rows_of(rendered)
    source = open_source(rendered, columns=("conditioning_image", "mask", "edited_image"))
    sample = read(source, [2], 32)[0]
    depth = png(rendered / rows[2]["conditioning_image_file_name"])
    assert torch.equal(sample.extras["conditioning_image"][0], torch.from_numpy(depth.astype(np.float32)))
    assert sample.extras["mask"].shape == (1, 32, 32) and sample.extras["edited_image"].shape == (3, 32, 32)
    assert sample.extras["mask"].max() == len(rows[2]["scene"]["solids"])
    assert sample.instruction == rows[2]["instruction"]
    assert read(open_source(rendered), [2], 32)[0].extras == {}


def test_random_crops_keep_columns_aligned(tmp_path):
    smooth(160, 120).save(tmp_path / "a.png")
    smooth(80, 60).save(tmp_path / "small.png")  # a column of half the resolution
    smooth(160, 120).getchannel("R").save(tmp_path / "m.png")
    row = {"file_name": "a.png", "edited_image": "small.png", "mask": "m.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    source = open_source(tmp_path, columns=("edited_image", "mask"))
    ranges = set()
    for seed in range(8):
        sample = read(source, [0], 32, [np.random.default_rng(seed)])[0]
        assert (sample.image - sample.extras["edited_image"]).abs().max() < 0.05
        assert (sample.image[0] - sample.extras["mask"][0]).abs().max() < 0.02
        contrast = sample.image[0].max() - sample.image[0].min()
        assert 0.75 * 0.5 - 0.05 < contrast < 0.75 + 0.05  # the shorter side is scaled to between 32 and 64
        ranges.add(round(contrast.item(), 3))
    assert len(ranges) > 4


def test_the_indices_of_a_palette_are_the_ids_of_a_mask(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    ids = np.kron([[0, 1], [2, 7]], np.ones((8, 8))).astype(np.uint8)
    mask = Image.fromarray(ids, "L").convert("P")
    mask.putpalette([0, 0, 0, 90, 90, 90, 90, 90, 90] + [10] * 15)  # 1 and 2 have the same color
    mask.save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "mask": "m.png"}))
    mask_ids = read(open_source(tmp_path, columns=("mask",)), [0], 16)[0].extras["mask"]
    assert torch.equal(mask_ids[0], torch.from_numpy(ids).float())
    assert check_data(tmp_path, ("mask",), 16).columns["mask"].most_ids == 3


def test_soft_or_hard_masks_stay_between_zero_and_one(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "mask": "m.png"}))
    mask = read(open_source(tmp_path, columns=("mask",)), [0], 64)[0].extras["mask"]
    assert mask.shape == (1, 64, 64) and mask.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("layout", ("file", "glob", "folder"))
def test_tars_equal_the_folder(photos, tmp_path, layout):
    rows, shards = rows_of(photos), tmp_path / "shards"
    shards.mkdir()
    shard(photos, shards / "a.tar", rows if layout == "file" else rows[:7])
    if layout != "file":
        shard(photos, shards / "b.tar", rows[7:])
    spec = {"file": shards / "a.tar", "glob": str(shards / "*.tar"), "folder": shards}[layout]
    folder, tars = open_source(photos), open_source(spec)
    assert len(folder) == len(tars) == 12
    assert all(map(same, read(folder, range(12), 32), read(tars, range(12), 32)))
    for a, b in islice(zip(batches(folder, 5, 32, 3), batches(tars, 5, 32, 3), strict=False), 4):
        assert same(a, b) and a.index == b.index


def test_tars_hold_columns_and_texts_and_ignore_other_members(rendered, tmp_path):
    shard(rendered, tmp_path / "x.tar", rows_of(rendered))
    columns = ("mask", "edited_image")
    pairs = (read(open_source(s, columns), range(6), 32) for s in (rendered, tmp_path / "x.tar"))
    assert all(map(same, *pairs))
    picture = (rendered / "000000.png").read_bytes()
    write_tar(
        tmp_path / "y.tar", [("d/k.txt", b"a caption\n"), ("README", b"?"), ("d/k.png", picture), ("n.cls", b"1")]
    )
    (sample,) = read(open_source(tmp_path / "y.tar"), [0], 32)
    assert sample.text == "a caption" and sample.name.endswith("y.tar/d/k")


def test_scenes_equal_the_folder_that_is_rendered_from_them(rendered):
    columns = ("conditioning_image", "mask", "edited_image")
    scenes = open_source("scenes:train:6:1", columns)
    assert all(map(same, read(open_source(rendered, columns), range(6), 32), read(scenes, range(6), 32)))
    assert all(map(same, read(scenes, [5, 0, 5], 32), read(open_source("scenes:train:6:1", columns), [5, 0, 5], 32)))


def test_scene_specs_are_parsed():
    assert len(open_source("scenes:held-out")) == 500
    assert len(open_source("scenes:train:7")) == 7
    assert "composition, seed 5" in open_source("scenes:composition:7:5").describe()
    (sample,) = read(open_source("scenes:held-out:9:2"), [3], 32)
    assert sample.text == sample_scene(2, "held-out", 3).caption


def test_scenes_beyond_the_memory_limit_are_rendered_again():
    from codi.data.sources import SceneSource

    tight = SceneSource("train", 10, memory=12_000)
    first = tight.read(range(6), 32)
    assert len(tight._cache) == 2
    assert all(map(same, first, tight.read(range(6), 32)))


def test_faults_of_a_data_set_are_named(tmp_path):
    empty, file, broken = tmp_path / "empty", tmp_path / "x.zip", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    file.write_bytes(b"PK")
    noise(16, 16).save(broken / "a.png")
    refused(lambda: open_source(tmp_path / "none"), tmp_path / "none", "no such file or folder")
    refused(lambda: open_source(str(tmp_path / "*.tar")), "no such file or folder")
    refused(lambda: open_source(empty), empty, "no pictures")
    refused(lambda: open_source(file), file, "neither a folder nor a .tar")
    refused(lambda: open_source("scene:train"), "unknown scheme 'scene'", "'scenes'")
    refused(lambda: open_source("s3://bucket/x"), "s3://bucket/x: not a .tar")
    refused(lambda: open_source(broken, ("mask",)), "no metadata.jsonl", "mask")

    def listed(text):
        (broken / "metadata.jsonl").write_text(text)
        return lambda: open_source(broken, columns=("mask",) if "mask" in text else ())

    good = '{"file_name": "a.png"}\n'
    refused(listed(good + "\n{nonsense}\n"), "metadata.jsonl: line 3", "not JSON")
    refused(listed(good + '{"text": "no file"}'), "line 2", "no file_name")
    refused(listed(good + '["a.png"]'), "line 2", "not a JSON object")
    refused(listed(good + '{"file_name": "b.png"}'), "line 2", "b.png", "missing")
    refused(listed('{"file_name": "a.png", "text": 3}'), "line 1", "text is 3")
    refused(listed('{"file_name": "a.png", "mask": "m.png"}'), "line 1", "m.png", "missing")
    refused(listed('{"file_name": "a.png", "mask": "a.png"}\n' + good), "line 2", "no mask")
    refused(listed(""), "no pictures")


def test_faults_of_a_tar_are_named(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    refused(lambda: open_source(path), path, "not a whole, uncompressed tar")
    path.write_bytes(b"junk" * 1000)
    refused(lambda: open_source(path), path, "not a whole, uncompressed tar")
    write_tar(path, [("a.txt", b"no picture")])
    refused(lambda: open_source(path), path, "no pictures")
    write_tar(path, [("a.png", bytes(5000)), ("b.png", bytes(5000))])
    path.write_bytes(path.read_bytes()[:8000])
    refused(lambda: open_source(path), path, "not a whole")
    write_tar(path, [("a.png", b"x")])
    refused(lambda: open_source(path, ("mask",)), path, "a has no mask", "a.mask.png")


def test_faults_of_a_scene_spec_are_named():
    refused(lambda: open_source("scenes:test"), "unknown split 'test'", "held-out")
    refused(lambda: open_source("scenes:heldout"), "'held-out'")
    refused(lambda: open_source("scenes:train:0"), "count of at least 1")
    refused(lambda: open_source("scenes:train:-5"), "count of at least 1")
    refused(lambda: open_source("scenes:train:5:-1"), "seed of at least 0")
    refused(lambda: open_source("scenes:train:many"), "whole numbers")
    refused(lambda: open_source("scenes:train:1:2:3"), "whole numbers")
    refused(lambda: open_source("scenes:train", ("depth",)), "no depth")
    refused(lambda: open_source("scenes:train:4").read([0], 1024), "size 1024", "512")


def test_every_kind_of_damage_is_a_corrupt_sample(tmp_path):
    picture = io.BytesIO()
    noise(64, 64).save(picture, "PNG")
    whole = picture.getvalue()
    jpeg = io.BytesIO()
    noise(64, 64).save(jpeg, "JPEG")
    header = bytearray(whole)
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    damage = {
        "bomb.png": bytes(header),
        "empty.png": b"",
        "page.png": b"<html>404</html>",
        "short.jpg": jpeg.getvalue()[:-500],
        "short.png": whole[: len(whole) // 2],
        "wrong.png": whole[:60] + b"\0\0\0\0" + whole[64:],
    }
    for name, data in damage.items():
        (tmp_path / name).write_bytes(data)
    results = [r for r in open_source(tmp_path).read(range(6), 32) if isinstance(r, CorruptSample)]
    assert [r.file for r in results] == sorted(damage)
    assert all(r.why and "\n" not in r.why for r in results)
    assert "pixels" in results[0].why


def test_a_damaged_member_of_a_tar_and_a_vanished_file_are_corrupt_samples(tmp_path, photos):
    good = (photos / "00.png").read_bytes()
    members = [("a.png", b"junk"), ("b.png", good), ("b.json", b"{"), ("c.png", good), ("c.json", b'{"text": "c"}')]
    write_tar(tmp_path / "x.tar", members)
    source = open_source(tmp_path / "x.tar")
    assert all(isinstance(s, CorruptSample) for s in source.read([0, 1], 32))
    assert read(source, [2], 32)[0].text == "c"
    source = open_source(photos)
    (photos / "06.png").unlink()
    gone = source.read([0], 32)[0]
    assert isinstance(gone, CorruptSample) and gone.file == "06.png" and "No such file" in gone.why


# Names and places that other tools use.


def test_metadata_csv_equals_metadata_jsonl(photos):
    expected = read(open_source(photos), range(12), 32)
    rows = [f'{row["file_name"]},"{row["text"]}",{row["instruction"]}' for row in rows_of(photos)]
    (photos / "metadata.csv").write_text("\n".join(["file_name,text,instruction", *rows]))
    refused(lambda: open_source(photos), "metadata.jsonl: the folder also has metadata.csv: keep one of them")
    (photos / "metadata.jsonl").unlink()
    source = open_source(photos)
    assert isinstance(source, PictureSource) and source.unused() == [] and "metadata.csv" in source.describe()
    assert all(map(same, expected, read(source, range(12), 32)))
    (photos / "metadata.parquet").write_bytes(b"PAR1")
    refused(lambda: open_source(photos), "metadata.parquet: cannot be read here: give datasets:")


def test_caption_files_beside_images_are_read(tmp_path):
    for name in ("a.png", "b.jpg", "c.png"):
        noise(20, 20).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa caf\u00e9\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("a hill".encode("utf-16"))
    source = open_source(tmp_path)
    one, two, three = source.read(range(3), 16)
    assert "3 pictures, 2 with captions" in source.describe()
    assert isinstance(one, Sample) and one.text == "a caf\u00e9" and isinstance(three, Sample) and three.text == ""
    assert isinstance(two, CorruptSample) and "its b.txt: is UTF-16 text: save it as UTF-8" in two.why
    rows = [{"file_name": "a.png"}, {"file_name": "c.png", "caption": "a lake"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [s.text for s in read(open_source(tmp_path), range(2), 16)] == ["a caf\u00e9", "a lake"]


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_member_names_of_other_tools_are_read(tmp_path):
    """KEY.image.jpg, `caption` in the json, distances as numpy arrays."""
    picture = io.BytesIO()
    noise(32, 32).save(picture, "PNG")
    depth = np.arange(1024, dtype=np.float32).reshape(32, 32) / 100
    holes = depth.copy()
    holes[0, 0], holes[0, 1] = np.nan, np.inf
    arrays = {
        "a": depth, "b": depth[None].astype(np.float64), "c": depth.astype(">f2"), "d": holes[..., None],
        "e": (depth * 1000).astype(np.uint16), "f": (depth * 1000).astype(np.int64),
    }  # fmt: skip
    members = []
    for number, (key, array) in enumerate(arrays.items()):
        members.append((f"{key}.image.png" if number % 2 else f"{key}.png", picture.getvalue()))
        members.append((f"{key}.depth.npy" if number % 3 else f"{key}.conditioning_image.npy", npy(array)))
        members.append((f"{key}.json", json.dumps({"caption": key, "url": "x"}).encode()))
    write_tar(tmp_path / "x.tar", members)
    samples = read(open_source(tmp_path / "x.tar", ("conditioning_image",)), range(6), 32)
    assert [s.text for s in samples] == list("abcdef")
    expected = np.nan_to_num(holes, nan=0, posinf=0)
    maps = [s.extras["conditioning_image"][0].numpy() for s in samples]
    assert np.array_equal(maps[0], depth) and np.array_equal(maps[1], depth) and np.array_equal(maps[3], expected)
    assert np.allclose(maps[2], depth, rtol=1e-3)
    assert all(np.array_equal(f, (depth * 1000).astype(np.uint16)) for f in maps[4:])
    column = check_data(tmp_path / "x.tar", ("conditioning_image",), 16).columns["conditioning_image"]
    assert column.found == 6 and column.bits == [16, 32] and column.low == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros(4), np.zeros((4, 4), complex), np.zeros((0, 4)), np.array([[{}]])]
)
def test_arrays_that_are_not_maps_are_corrupt_samples(tmp_path, array):
    noise(4, 4).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    row = {"file_name": "a.png", "conditioning_image_file_name": "a.npy"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (sample,) = open_source(tmp_path, ("conditioning_image",)).read([0], 16)
    assert isinstance(sample, CorruptSample) and "its conditioning_image: " in sample.why


@pytest.mark.parametrize("name", ["text", "caption", "instruction", "edit_prompt"])
def test_a_lone_surrogate_in_a_caption_is_named(tmp_path, name):
    """No tokenizer accepts a lone surrogate; json.loads joins pairs to whole characters."""
    noise(16, 16).save(tmp_path / "a.png")
    row = {"file_name": "a.png", name: "a \U0001f600"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    open_source(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, name: "a \ud83d cat"}))
    refused(lambda: open_source(tmp_path), f"line 1: {name} holds U+D83D, half of a surrogate pair")
    fields = json.dumps({name: "\udc00"}).encode()
    write_tar(tmp_path / "x.tar", [("a.png", (tmp_path / "a.png").read_bytes()), ("a.json", fields)])
    (sample,) = open_source(tmp_path / "x.tar").read([0], 16)
    assert isinstance(sample, CorruptSample) and f"its json: {name} holds U+DC00" in sample.why


@pytest.mark.parametrize("data", [b"[1]", b"[" * 50_000, b'{"text": ["a"]}', b"{"])
def test_a_malformed_json_is_a_corrupt_sample(tmp_path, data):
    noise(16, 16).save(tmp_path / "a.png")
    write_tar(tmp_path / "x.tar", [("a.png", (tmp_path / "a.png").read_bytes()), ("a.json", data)])
    (sample,) = open_source(tmp_path / "x.tar").read([0], 16)
    assert isinstance(sample, CorruptSample) and "its json" in sample.why
