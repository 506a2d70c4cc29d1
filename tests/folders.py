"""Small data sets and helpers for data tests."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from codi.data.render import COLUMNS
from codi.data.sources import Sample
from codi.errors import UserError


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((x / width, y / height, 0 * x + 0.5), -1).__mul__(255).astype(np.uint8))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shard(folder, path, rows):
    """Write a tar with the samples of these metadata rows of a folder."""
    members = []
    for row in rows:
        key = row["file_name"].replace("/", "_").removesuffix(".png")
        members.append((f"{key}.png", (folder / row["file_name"]).read_bytes()))
        members.append((f"{key}.json", json.dumps({k: row[k] for k in ("text", "instruction")}).encode()))
        members += [
            (f"{key}.{c}.png", (folder / row[f"{c}_file_name"]).read_bytes())
            for c in COLUMNS
            if f"{c}_file_name" in row
        ]
    write_tar(path, members)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read(source, indices, size, crops=None) -> list[Sample]:
    """Read samples and assert that none is corrupt."""
    samples = source.read(indices, size, crops)
    assert all(isinstance(s, Sample) for s in samples)
    return samples


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


def refused(call, *fragments):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message
    return message


def serve(monkeypatch, rows, pictures):
    """Make `datasets.load_dataset` return these rows for any name. `pictures`: names of the image columns."""
    import datasets

    rows = [{k: {"bytes": v, "path": None} if k in pictures and v else v for k, v in row.items()} for row in rows]
    table = datasets.Dataset.from_list(rows)
    for column in pictures:
        table = table.cast_column(column, datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table, raising=False)
