"""Rendering scenes into a folder: it holds what it says, and the same seed gives the same bytes."""

import numpy as np
import pytest
import torch

from codi.data.render import render_folder
from codi.data.scenes import sample_edit, sample_scene
from folders import png, refused, rows_of


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
