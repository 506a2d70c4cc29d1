"""Training data: sources read alike, batches depend on (seed, position) alone, corrupt files are never silent."""

import io
import json
import sys
import tarfile
import threading
import zlib
from itertools import islice
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from codi.data.batches import batches
from codi.data.check import check_data
from codi.data.render import COLUMNS, render_folder
from codi.data.scenes import sample_edit, sample_scene
from codi.data.sources import CorruptSample, Sample, open_source
from codi.errors import UserError
from codi.training.pretrain_recipe import read_pictures


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((x / width, y / height, 0 * x + 0.5), -1).__mul__(255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of different sizes with captions, in metadata's own order."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    lines = []
    for i in (*range(6, 12), *range(6)):
        name = f"sub/{i:02d}.png" if i % 2 else f"{i:02d}.png"
        noise(40 + 5 * i, 50 + 3 * i, i).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {i}", "instruction": f"do {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def rendered(tmp_path):
    render_folder(6, tmp_path / "rendered", size=32, seed=1)
    return tmp_path / "rendered"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shard(folder, path, rows):
    """The tar that holds what these metadata rows of a folder hold."""
    members = []
    for row in rows:
        key = row["file_name"].replace("/", "_").removesuffix(".png")
        members.append((f"{key}.png", (folder / row["file_name"]).read_bytes()))
        members.append((f"{key}.json", json.dumps({k: row[k] for k in ("text", "instruction")}).encode()))
        members += [(f"{key}.{c}.png", (folder / row[c]).read_bytes()) for c in COLUMNS if c in row]
    write_tar(path, members)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read(source, indices, size, crops=None) -> list[Sample]:
    """Samples, none of them corrupt."""
    found = source.read(indices, size, crops)
    assert all(isinstance(s, Sample) for s in found)
    return found


def png(path) -> np.ndarray:
    grid = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert grid is not None
    return grid


def same(a, b):
    return (
        torch.equal(a.image, b.image)
        and a.text == b.text
        and a.instruction == b.instruction
        and a.extras.keys() == b.extras.keys()
        and all(torch.equal(a.extras[c], b.extras[c]) for c in a.extras)
    )


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


# Sources.


def test_a_folder_without_metadata_is_its_pictures_sorted(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.webp", ".hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(20, 20).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(tmp_path)
    samples = read(source, range(3), 16)
    assert [s.name for s in samples] == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert [s.text for s in samples] == ["", "", ""]
    assert "3 pictures" in source.describe()


def test_metadata_is_the_list_and_its_order(photos):
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


def test_pictures_of_the_asked_size_are_untouched_and_centred_otherwise(tmp_path):
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
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the picture
    smooth(64, 64).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (sample,) = read(open_source(tmp_path), [0], 64)
    assert sample.image[0, 0].mean() < 0.1 and sample.image[0, -1].mean() > 0.9


def test_a_large_jpeg_decoded_small_looks_the_same(tmp_path):
    smooth(800, 800).save(tmp_path / "a.jpg", quality=95)
    smooth(800, 800).save(tmp_path / "b.png")
    jpeg, png = read(open_source(tmp_path), [0, 1], 32)
    assert (jpeg.image - png.image).abs().max() < 0.03


def test_columns_are_read_and_cut_like_the_image(rendered):
    rows = rows_of(rendered)
    source = open_source(rendered, columns=("conditioning_image", "mask", "edited_image"))
    sample = read(source, [2], 32)[0]
    depth = png(rendered / rows[2]["conditioning_image"])
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
    seen = set()
    for seed in range(8):
        sample = read(source, [0], 32, [np.random.default_rng(seed)])[0]
        assert (sample.image - sample.extras["edited_image"]).abs().max() < 0.05
        assert (sample.image[0] - sample.extras["mask"][0]).abs().max() < 0.02
        across = sample.image[0].max() - sample.image[0].min()
        assert 0.75 * 0.5 - 0.05 < across < 0.75 + 0.05  # the shorter side is scaled to between 32 and 64
        seen.add(round(across.item(), 3))
    assert len(seen) > 4


def test_the_indices_of_a_palette_are_the_ids_of_a_mask(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    ids = np.kron([[0, 1], [2, 7]], np.ones((8, 8))).astype(np.uint8)
    mask = Image.fromarray(ids, "L").convert("P")
    mask.putpalette([0, 0, 0, 90, 90, 90, 90, 90, 90] + [10] * 15)  # 1 and 2 look alike
    mask.save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "mask": "m.png"}))
    found = read(open_source(tmp_path, columns=("mask",)), [0], 16)[0].extras["mask"]
    assert torch.equal(found[0], torch.from_numpy(ids).float())
    assert check_data(tmp_path, ("mask",), 16).columns["mask"].most_ids == 3


def test_soft_or_hard_masks_stay_between_zero_and_one(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "mask": "m.png"}))
    mask = read(open_source(tmp_path, columns=("mask",)), [0], 64)[0].extras["mask"]
    assert mask.shape == (1, 64, 64) and mask.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("how", ("file", "glob", "folder"))
def test_tars_equal_the_folder(photos, tmp_path, how):
    rows, shards = rows_of(photos), tmp_path / "shards"
    shards.mkdir()
    shard(photos, shards / "a.tar", rows if how == "file" else rows[:7])
    if how != "file":
        shard(photos, shards / "b.tar", rows[7:])
    spec = {"file": shards / "a.tar", "glob": str(shards / "*.tar"), "folder": shards}[how]
    folder, tars = open_source(photos), open_source(spec)
    assert len(folder) == len(tars) == 12
    assert all(map(same, read(folder, range(12), 32), read(tars, range(12), 32)))
    for a, b in islice(zip(batches(folder, 5, 32, 3), batches(tars, 5, 32, 3), strict=False), 4):
        assert same(a, b) and a.index == b.index


def test_tar_columns_texts_and_strangers(rendered, tmp_path):
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


def test_scene_specs():
    assert len(open_source("scenes:held-out")) == 500
    assert len(open_source("scenes:train:7")) == 7
    assert "composition, seed 5" in open_source("scenes:composition:7:5").describe()
    (sample,) = read(open_source("scenes:held-out:9:2"), [3], 32)
    assert sample.text == sample_scene(2, "held-out", 3).caption


def test_scenes_beyond_the_memory_limit_are_rendered_again():
    from codi.data.sources import SceneSource

    tight = SceneSource("train", 10, memory=12_000)
    first = tight.read(range(6), 32)
    assert len(tight._kept) == 2
    assert all(map(same, first, tight.read(range(6), 32)))


def test_datasets_are_read_through_their_library(monkeypatch, tmp_path):
    noise(20, 20).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()

    class Table(list):
        column_names = ("image", "text")

        def cast_column(self, column, kind):
            assert column == "image" and kind == {"decode": False}
            return self

    def load_dataset(name, split):
        assert split == "train"
        if name != "some/photos":
            raise FileNotFoundError(f"no {name}\non the hub")
        on_disk = {"bytes": None, "path": str(tmp_path / "a.png")}
        rows = [{"image": {"bytes": data, "path": None}, "text": "one"}, {"image": on_disk, "text": None}]
        return Table([*rows, {"image": {"bytes": b"junk", "path": None}, "text": ""}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, Image=dict))
    source = open_source("datasets:some/photos")
    (one, two), three = read(source, range(2), 20), source.read([2], 20)[0]
    assert one.text == "one" and two.text == "" and torch.equal(one.image, two.image)
    assert isinstance(three, CorruptSample)
    refused(lambda: open_source("datasets:other"), "datasets:other", "check the name")
    refused(lambda: open_source("datasets:some/photos", ("mask",)), "no column mask", "image, text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: open_source("datasets:some/photos"), "pip install datasets")


def serve(monkeypatch, rows, pictures):
    """Makes the rows what `datasets` loads under any name: by the library itself, or by the least that stands for it.
    `pictures`: their columns of picture bytes."""
    rows = [{k: {"bytes": v, "path": None} if k in pictures and v else v for k, v in row.items()} for row in rows]
    try:
        import datasets
    except ImportError:

        class Table(list):
            column_names = list(rows[0])

            def cast_column(self, column, kind):
                assert column in pictures and kind == {"decode": False}
                return self

        datasets, table = SimpleNamespace(Image=dict), Table(rows)
        monkeypatch.setitem(sys.modules, "datasets", datasets)
    else:
        table = datasets.Dataset.from_list(rows)
        for column in pictures:
            table = table.cast_column(column, datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table, raising=False)


def test_folder_tar_and_datasets_give_the_same_batches(tmp_path, monkeypatch):
    """Bit for bit, over two epochs of random crops, with every column, caption and instruction."""
    folder = tmp_path / "folder"
    render_folder(6, folder, size=48, seed=1)
    columns, rows = ("conditioning_image", "mask", "edited_image"), rows_of(folder)
    shard(folder, tmp_path / "a.tar", rows[:4])
    shard(folder, tmp_path / "b.tar", rows[4:])
    served = [
        {"image": (folder / row["file_name"]).read_bytes(), "text": row["text"], "instruction": row["instruction"]}
        | {c: (folder / row[c]).read_bytes() for c in columns}
        for row in rows
    ]
    serve(monkeypatch, served, ("image", *columns))
    specs = (folder, str(tmp_path / "*.tar"), "datasets:served")
    of_folder, *others = [list(islice(batches(open_source(s, columns), 4, 32, seed=7), 3)) for s in specs]
    assert set(of_folder[0].extras) == set(columns) and all(b.text[0] and b.instruction[0] for b in of_folder)
    for other in others:
        assert all(map(same, of_folder, other))
        assert [b.index for b in of_folder] == [b.index for b in other]


def test_names_that_the_hub_gives_to_columns_are_understood(tmp_path, monkeypatch):
    one, two = (noise(20, 20, seed) for seed in (0, 1))
    one.save(tmp_path / "one.png")
    two.save(tmp_path / "two.png")
    rows = [
        {"original_image": (tmp_path / "one.png").read_bytes(), "edit_prompt": "make it snow", "caption": "a hill"}
        | {"edited_image": (tmp_path / "two.png").read_bytes()}
    ]
    serve(monkeypatch, rows, ("original_image", "edited_image"))
    (sample,) = read(open_source("datasets:timbrooks/instructpix2pix-clip-filtered", ("edited_image",)), [0], 20)
    assert (sample.instruction, sample.text) == ("make it snow", "a hill")
    for shown, picture in ((sample.image, one), (sample.extras["edited_image"], two)):
        assert torch.equal((shown * 255).byte(), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    refused(lambda: open_source("datasets:x", ("mask",)), "no column mask", "original_image, edit_prompt")


def test_columns_may_be_optional(rendered, tmp_path, monkeypatch):
    rows = rows_of(rendered)
    del rows[1]["mask"]
    rows[2]["mask"] = "mask/gone.png"
    shard(rendered, tmp_path / "x.tar", [*rows[:2], *rows[3:]])
    (rendered / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read(open_source(rendered, ("edited_image",), optional=("mask",)), range(4), 32)
    assert [sorted(s.extras) for s in samples] == [
        ["edited_image", "mask"],
        *[["edited_image"]] * 2,
        ["edited_image", "mask"],
    ]
    assert [sorted(s.extras) for s in read(open_source(tmp_path / "x.tar", optional=("mask",)), range(2), 32)] == [
        ["mask"],
        [],
    ]
    assert list(read(open_source("scenes:train:1", optional=("mask", "other")), [0], 32)[0].extras) == ["mask"]
    data = (rendered / rows[0]["file_name"]).read_bytes()
    serve(
        monkeypatch, [{"image": data, "mask": data}, {"image": data, "mask": data} | {"mask": None}], ("image", "mask")
    )
    assert [list(s.extras) for s in read(open_source("datasets:x", optional=("mask", "other")), [0, 1], 32)] == [
        ["mask"],
        [],
    ]
    needed = open_source("datasets:x", ("mask",)).read([0, 1], 32)
    assert isinstance(needed[0], Sample) and isinstance(needed[1], CorruptSample) and "no mask" in needed[1].why


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
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
    refused(lambda: open_source("s3://bucket/x"), "unknown scheme 's3'")
    refused(lambda: open_source(broken, ("mask",)), "no metadata.jsonl", "mask")

    def listed(text):
        (broken / "metadata.jsonl").write_text(text)
        return lambda: open_source(broken, columns=("mask",) if "mask" in text else ())

    good = '{"file_name": "a.png"}\n'
    refused(listed(good + "\n{nonsense}\n"), "metadata.jsonl: line 3", "not JSON")
    refused(listed(good + '{"text": "no file"}'), "line 2", "no file_name")
    refused(listed(good + '["a.png"]'), "line 2", "no file_name")
    refused(listed(good + '{"file_name": "b.png"}'), "line 2", "b.png", "missing")
    refused(listed('{"file_name": "a.png", "text": 3}'), "line 1", "text is 3")
    refused(listed('{"file_name": "a.png", "mask": "m.png"}'), "line 1", "m.png", "missing")
    refused(listed('{"file_name": "a.png", "mask": "a.png"}\n' + good), "line 2", "no mask")
    refused(listed(""), "no pictures")


def test_what_is_wrong_with_a_tar_is_said(tmp_path):
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


def test_what_is_wrong_with_a_scene_spec_is_said():
    refused(lambda: open_source("scenes:test"), "unknown split 'test'", "held-out")
    refused(lambda: open_source("scenes:heldout"), "'held-out'")
    refused(lambda: open_source("scenes:train:0"), "count of at least 1")
    refused(lambda: open_source("scenes:train:-5"), "count of at least 1")
    refused(lambda: open_source("scenes:train:5:-1"), "seed of at least 0")
    refused(lambda: open_source("scenes:train:many"), "whole numbers")
    refused(lambda: open_source("scenes:train:1:2:3"), "whole numbers")
    refused(lambda: open_source("scenes:train", ("depth",)), "no depth")
    refused(lambda: open_source("scenes:train:4").read([0], 1024), "size 1024", "512")


# Batches.


def test_batches_are_a_pure_function_of_seed_and_position(photos):
    source = open_source(photos)
    run = list(islice(batches(source, 4, 32, seed=5), 8))
    again = list(islice(batches(open_source(photos), 4, 32, seed=5), 8))
    assert all(map(same, run, again))
    resumed = list(islice(batches(source, 4, 32, seed=5, start=12), 5))
    assert all(map(same, run[3:], resumed)) and [b.index for b in run[3:]] == [b.index for b in resumed]
    ones = list(islice(batches(source, 1, 32, seed=5), 32))
    assert torch.equal(torch.cat([b.image for b in ones]), torch.cat([b.image for b in run]))
    other = next(batches(source, 12, 32, seed=6))
    assert other.index != [i for b in run[:3] for i in b.index]


def test_each_epoch_is_a_new_permutation_with_new_crops(photos):
    one, two = islice(batches(open_source(photos), 12, 32, seed=0), 2)
    assert sorted(one.index) == sorted(two.index) == list(range(12)) and one.index != two.index
    assert one.text[one.index.index(0)] == two.text[two.index.index(0)] == "picture 6"
    large = one.index.index(5), two.index.index(5)  # 95 x 83 pixels: room for a crop
    assert not torch.equal(one.image[large[0]], two.image[large[1]])


def test_a_batch_carries_texts_columns_and_numbers(rendered):
    batch = next(batches(open_source(rendered, ("mask", "edited_image")), 4, 32, seed=0))
    assert batch.image.shape == (4, 3, 32, 32) and batch.image.is_contiguous()
    assert batch.extras["mask"].shape == (4, 1, 32, 32) and batch.extras["edited_image"].shape == (4, 3, 32, 32)
    rows = rows_of(rendered)
    assert batch.text == [rows[i]["text"] for i in batch.index]
    assert batch.instruction == [rows[i]["instruction"] for i in batch.index]


def test_prefetching_changes_nothing_and_ends(photos):
    source = open_source(photos)
    plain = list(islice(batches(source, 4, 32, seed=5), 6))
    stream = batches(source, 4, 32, seed=5, prefetch=True)
    assert all(map(same, plain, islice(stream, 6)))
    assert "batches" in [t.name for t in threading.enumerate()]
    stream.close()
    assert "batches" not in [t.name for t in threading.enumerate()]


def test_arguments_out_of_range_are_refused_at_once(photos):
    source = open_source(photos)
    refused(lambda: batches(source, 0, 32, 0), "batch size 0")
    refused(lambda: batches(source, 4, 0, 0), "size 0")
    refused(lambda: batches(source, 4, 32, -1), "seed -1")
    refused(lambda: batches(source, 4, 32, 0, start=-4), "start -4")


def folder_with(tmp_path, good, bad):
    folder = tmp_path / f"{good}-{bad}"
    folder.mkdir()
    for i in range(good):
        noise(16, 16, i).save(folder / f"good{i:03d}.png")
    for i in range(bad):
        (folder / f"bad{i:03d}.png").write_bytes(b"not a picture")
    return folder


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


def test_corrupt_files_are_replaced_counted_once_and_reported(tmp_path):
    source, report = open_source(folder_with(tmp_path, 97, 3)), tmp_path / "made" / "report.json"
    stream = batches(source, 10, 16, seed=0, report=report)
    run = list(islice(stream, 30))
    stream.close()
    assert all(b.image.shape[0] == 10 and min(b.index) >= 3 for b in run)
    said = json.loads(report.read_text())
    assert said["read"] == 100 and said["skipped"] == 3
    assert [f["file"] for f in said["files"]] == ["bad000.png", "bad001.png", "bad002.png"]
    assert all("not a picture" in f["why"] for f in said["files"])
    assert list(report.parent.iterdir()) == [report]
    # The replacement is the next in order, whether or not the file is known to be corrupt already.
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


def test_the_share_is_exact_once_all_files_are_read(tmp_path):
    over, at = (open_source(folder_with(tmp_path, good, bad)) for good, bad in ((46, 4), (57, 3)))
    refused(lambda: list(batches(over, 10, 16, seed=1)), "4 of 50")
    assert len(list(islice(batches(at, 10, 16, seed=1), 12))) == 12


def test_a_few_files_are_not_judged_but_none_readable_is_an_error(tmp_path):
    run = list(islice(batches(open_source(folder_with(tmp_path, 2, 3)), 4, 16, seed=0), 5))
    assert all(set(b.index) <= {3, 4} for b in run)
    refused(lambda: next(batches(open_source(folder_with(tmp_path, 0, 3)), 2, 16, seed=0)), "no other file is readable")
    refused(
        lambda: next(batches(open_source(folder_with(tmp_path, 0, 90)), 2, 16, seed=0, max_corrupt=1.0)), "readable"
    )


def test_columns_of_different_depth_do_not_mix(tmp_path):
    noise(16, 16).save(tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((16, 16), np.uint16))
    rows = [{"file_name": "a.png", "conditioning_image": name} for name in ("deep.png", "a.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path, ("conditioning_image",))
    refused(lambda: next(batches(source, 2, 16, seed=0)), "bit depth")


def test_pictures_read_part_by_part_are_reported_alike(tmp_path):
    source, report = open_source(folder_with(tmp_path, 4, 3)), tmp_path / "run" / "corrupt.json"
    for _ in range(2):  # a second round starts anew
        parts = [read_pictures(source, indices, 16, report)[0] for indices in (range(0, 4), range(4, 7))]
        assert [len(part) for part in parts] == [1, 3]
        said = json.loads(report.read_text())
        assert (said["read"], said["skipped"]) == (7, 3)
        assert [f["file"] for f in said["files"]] == ["bad000.png", "bad001.png", "bad002.png"]
    refused(lambda: read_pictures(source, range(0, 3), 16, report), "no picture could be read")
    assert json.loads(report.read_text())["skipped"] == 3


# Rendering.


def test_a_rendered_folder_holds_what_it_says(rendered):
    rows = rows_of(rendered)
    assert [r["file_name"] for r in rows] == [f"{i:06d}.png" for i in range(6)]
    for i, row in enumerate(rows):
        scene, edit = sample_scene(1, "train", i), sample_edit(sample_scene(1, "train", i), 1, "train", i)
        assert row["text"] == scene.caption and row["instruction"] == edit.instruction and row["edit"] == edit.kind
        assert [s["colour"] for s in row["scene"]["solids"]] == [s.colour for s in scene.solids]
        assert row["scene"]["camera_height"] == scene.camera_height
        depth, mask = (png(rendered / row[c]) for c in ("conditioning_image", "mask"))
        assert depth.dtype == mask.dtype == np.uint16 and depth.shape == mask.shape == (32, 32)
        assert depth.max() <= 65_000 and mask.max() == len(scene.solids)
        assert png(rendered / row["edited_image"]).shape == (32, 32, 3)
    assert not list(rendered.glob("**/*.partial"))


def test_the_same_seed_writes_the_same_bytes_and_progress_is_told(tmp_path, rendered):
    told = []
    render_folder(6, tmp_path / "again", size=32, seed=1, progress=told.append)
    assert told == sorted(told) and told[-1] == 6
    files = sorted(p.relative_to(rendered) for p in rendered.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((rendered / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    render_folder(6, tmp_path / "other", size=32, seed=2)
    assert (rendered / "000000.png").read_bytes() != (tmp_path / "other" / "000000.png").read_bytes()


def test_start_and_no_edits(tmp_path, rendered):
    render_folder(2, tmp_path / "part", size=32, seed=1, edits=False, start=4)
    assert [r["file_name"] for r in rows_of(tmp_path / "part")] == ["000004.png", "000005.png"]
    assert "edited_image" not in rows_of(tmp_path / "part")[0] and not (tmp_path / "part" / "edited").exists()
    assert (tmp_path / "part" / "000004.png").read_bytes() == (rendered / "000004.png").read_bytes()


def test_an_interrupted_render_has_no_metadata(tmp_path, rendered):
    def interrupt(done):
        raise KeyboardInterrupt

    for folder, overwrite in ((tmp_path / "new", False), (rendered, True)):
        threads = torch.get_num_threads()
        with pytest.raises(KeyboardInterrupt):
            render_folder(6, folder, size=32, overwrite=overwrite, progress=interrupt)
        assert torch.get_num_threads() == threads
        assert (folder / "000000.png").exists() and not (folder / "metadata.jsonl").exists()


def test_what_cannot_be_rendered_is_said(tmp_path, rendered):
    refused(lambda: render_folder(0, tmp_path / "x"), "count 0")
    refused(lambda: render_folder(1, tmp_path / "x", size=16), "size 16")
    refused(lambda: render_folder(1, tmp_path / "x", split="hold-out"), "hold-out", "'held-out'")
    refused(lambda: render_folder(1, tmp_path / "x", seed=-1), "seed -1")
    refused(lambda: render_folder(1, tmp_path / "x", start=-1), "start -1")
    assert not (tmp_path / "x").exists()
    before = (rendered / "metadata.jsonl").read_bytes()
    refused(lambda: render_folder(1, rendered), rendered, "not empty", "overwrite")
    assert (rendered / "metadata.jsonl").read_bytes() == before
    render_folder(1, rendered, size=32, overwrite=True)
    assert len(rows_of(rendered)) == 1
    (tmp_path / "file").write_text("")
    refused(lambda: render_folder(1, tmp_path / "file"), tmp_path / "file", "cannot be written")
