"""Data sets of the hub, and columns by other names or not there: read like folders and tars."""

import json
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch

from codi.data.batches import batches
from codi.data.render import render_folder
from codi.data.sources import CorruptSample, Sample, open_source
from folders import noise, read, refused, rows_of, same, serve, shard


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
