"""Hub data sets, alternative column names and optional columns: read like folders and tars."""

import json
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from codi.data.batches import batches
from codi.data.render import COLUMNS, render_folder
from codi.data.sources import CorruptSample, Sample, open_source
from folders import noise, read, refused, rows_of, same, serve, shard


def test_hub_data_sets_are_read_through_the_datasets_library(monkeypatch, tmp_path):
    import datasets

    noise(20, 20).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()

    def load_dataset(name, split):
        assert split == "train"
        if name != "some/photos":
            raise FileNotFoundError(f"no {name}\non the hub")
        on_disk = {"bytes": None, "path": str(tmp_path / "a.png")}
        rows = [{"image": {"bytes": data, "path": None}, "text": "one"}, {"image": on_disk, "text": None}]
        return datasets.Dataset.from_list([*rows, {"image": {"bytes": b"junk", "path": None}, "text": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("datasets:some/photos")
    (first, second), corrupt = read(source, range(2), 20), source.read([2], 20)[0]
    assert first.text == "one" and second.text == "" and torch.equal(first.image, second.image)
    assert isinstance(corrupt, CorruptSample)
    refused(lambda: open_source("datasets:other"), "datasets:other", "check the name")
    refused(lambda: open_source("datasets:some/photos", ("mask",)), "no column mask", "image, text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: open_source("datasets:some/photos"), "pip install datasets")


def test_folder_tar_and_datasets_give_the_same_batches(tmp_path, monkeypatch):
    """Exactly, over two epochs of random crops, with every column, caption and instruction."""
    folder = tmp_path / "folder"
    render_folder(6, folder, size=48, seed=1)
    columns, rows = ("conditioning_image", "mask", "edited_image"), rows_of(folder)
    shard(folder, tmp_path / "a.tar", rows[:4])
    shard(folder, tmp_path / "b.tar", rows[4:])
    served = [
        {"image": (folder / row["file_name"]).read_bytes(), "text": row["text"], "instruction": row["instruction"]}
        | {c: (folder / row[f"{c}_file_name"]).read_bytes() for c in columns}
        for row in rows
    ]
    serve(monkeypatch, served, ("image", *columns))
    specs = (folder, str(tmp_path / "*.tar"), "datasets:served")
    of_folder, *others = [list(islice(batches(open_source(s, columns), 4, 32, seed=7), 3)) for s in specs]
    assert set(of_folder[0].extras) == set(columns) and all(b.text[0] and b.instruction[0] for b in of_folder)
    for other in others:
        assert all(map(same, of_folder, other))
        assert [b.index for b in of_folder] == [b.index for b in other]


def test_common_column_names_of_the_hub_are_recognized(tmp_path, monkeypatch):
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
    for tensor, picture in ((sample.image, one), (sample.extras["edited_image"], two)):
        assert torch.equal((tensor * 255).byte(), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    refused(lambda: open_source("datasets:x", ("mask",)), "no column mask", "original_image, edit_prompt")


def test_columns_may_be_optional(rendered, tmp_path, monkeypatch):
    rows = rows_of(rendered)
    del rows[1]["mask_file_name"]
    rows[2]["mask_file_name"] = "mask/gone.png"
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


def test_datasets_library_reads_a_rendered_folder(rendered, tmp_path, monkeypatch):
    """Loaded as in diffusers' training scripts; columns hold images, not file names."""
    import datasets

    cache = str(tmp_path / "cache")
    table = datasets.load_dataset("imagefolder", data_dir=str(rendered), split="train", cache_dir=cache)
    assert isinstance(table, datasets.Dataset) and len(table) == 6
    assert [isinstance(table.features[c], datasets.Image) for c in ("image", *COLUMNS)] == [True] * 4
    row = table[2]
    assert row["image"].size == row["mask"].size == (32, 32) and row["text"] == rows_of(rendered)[2]["text"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    pairs = (read(open_source(spec, COLUMNS), range(6), 32) for spec in (rendered, "datasets:x"))
    assert all(map(same, *pairs))


def test_old_column_names_are_read(rendered):
    expected = read(open_source(rendered, COLUMNS), range(6), 32)
    text = (rendered / "metadata.jsonl").read_text()
    for column in COLUMNS:
        text = text.replace(f"{column}_file_name", column)
    (rendered / "metadata.jsonl").write_text(text)
    assert "_file_name" not in text
    assert all(map(same, expected, read(open_source(rendered, COLUMNS), range(6), 32)))


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"image": "a.png"}, ("image is not an image column, it holds string", "image_file_name")),
        ({"image": b"a", "conditioning_image": "a.png"}, ("conditioning_image is not an image", "_image_file_name")),
        ({"image": 3}, ("image is not an image column, it holds int64: cast it",)),
        ({"image": ["a", "b"]}, ("image is not an image column, it holds List",)),
        ({"image": b"a", "caption": ["one", "two"]}, ("caption is not a text column", "List")),
        ({"image": b"a", "text": 3}, ("text is not a text column", "int64")),
    ],
)
def test_columns_of_the_wrong_type_are_refused(monkeypatch, row, fragments):
    serve(monkeypatch, [row], ())
    refused(lambda: open_source("datasets:x", [c for c in row if c in COLUMNS]), "datasets:x: ", *fragments)
