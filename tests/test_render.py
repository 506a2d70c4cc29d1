"""Rendering scenes into a folder: its content is complete, and the same seed gives the same bytes."""

import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from codi.data import render as module
from codi.data.render import COLUMNS, render_folder
from codi.data.scenes import sample_edit, sample_scene
from codi.data.sources import open_source
from codi.files import LOCK
from folders import png, read, refused, rows_of


def test_a_rendered_folder_matches_its_metadata(rendered):
    rows = rows_of(rendered)
    assert [r["file_name"] for r in rows] == [f"{i:06d}.png" for i in range(6)]
    for i, row in enumerate(rows):
        scene, edit = sample_scene(1, "train", i), sample_edit(sample_scene(1, "train", i), 1, "train", i)
        assert row["text"] == scene.caption and row["instruction"] == edit.instruction and row["edit"] == edit.kind
        assert [s["colour"] for s in row["scene"]["solids"]] == [s.colour for s in scene.solids]
        assert row["scene"]["camera_height"] == scene.camera_height
        depth, mask = (png(rendered / row[f"{c}_file_name"]) for c in ("conditioning_image", "mask"))
        assert depth.dtype == mask.dtype == np.uint16 and depth.shape == mask.shape == (32, 32)
        assert depth.max() <= 65_000 and mask.max() == len(scene.solids)
        assert png(rendered / row["edited_image_file_name"]).shape == (32, 32, 3)
    assert not list(rendered.glob("**/.*"))


def test_the_same_seed_writes_the_same_bytes_and_reports_progress(tmp_path, rendered):
    counts = []
    render_folder(6, tmp_path / "again", size=32, seed=1, progress=counts.append)
    assert counts == sorted(counts) and counts[-1] == 6
    files = sorted(p.relative_to(rendered) for p in rendered.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((rendered / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    render_folder(6, tmp_path / "other", size=32, seed=2)
    assert (rendered / "000000.png").read_bytes() != (tmp_path / "other" / "000000.png").read_bytes()


def test_rendering_may_start_later_and_skip_edits(tmp_path, rendered):
    render_folder(2, tmp_path / "part", size=32, seed=1, edits=False, start=4)
    assert [r["file_name"] for r in rows_of(tmp_path / "part")] == ["000004.png", "000005.png"]
    assert "edited_image_file_name" not in rows_of(tmp_path / "part")[0] and not (tmp_path / "part" / "edited").exists()
    assert (tmp_path / "part" / "000004.png").read_bytes() == (rendered / "000004.png").read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_and_kill(monkeypatch, moment, call):
    """Run `call`, and kill it before rename or removal number `moment`. Return whether it finished before that."""
    replace, unlink, remaining = os.replace, Path.unlink, [moment]

    def count():
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Killed

    def killed_unlink(path, missing_ok=False):
        if path.suffix != ".tmp" and path.name != LOCK:  # a killed process does not clean up
            count()
            unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (count(), replace(source, target)))
        patch.setattr(Path, "unlink", killed_unlink)
        try:
            call()
        except Killed:
            return False
    return True


@pytest.mark.parametrize("before", [0, 2, 6])
def test_a_render_killed_at_any_moment_is_not_read_as_complete(tmp_path, monkeypatch, before):
    """The folder holds `before` other scenes. The same command then completes it."""
    render_folder(3, tmp_path / "whole", size=32, seed=1)
    whole, texts = contents(tmp_path / "whole"), [row["text"] for row in rows_of(tmp_path / "whole")]
    if before:
        render_folder(before, tmp_path / "before", size=32, seed=2)
    old = contents(tmp_path / "before")
    for moment in range(40):
        folder = tmp_path / f"killed-{moment}"
        if before:
            shutil.copytree(tmp_path / "before", folder)
        overwrite = before > 0
        if run_and_kill(monkeypatch, moment, lambda: render_folder(3, folder, size=32, seed=1, overwrite=overwrite)):  # noqa: B023
            assert contents(folder).items() >= whole.items() and moment > 12
            return
        listed = (folder / "metadata.jsonl").exists()
        complete = listed and [row["text"] for row in rows_of(folder)] == texts
        if complete or (before and not old.items() <= contents(folder).items()):
            refused(lambda: open_source(folder, COLUMNS), "which is missing")  # noqa: B023
        render_folder(3, folder, size=32, seed=1, overwrite=overwrite and not complete)
        assert contents(folder).items() >= whole.items() and not list(folder.rglob("*.tmp"))
    pytest.fail("the render needs more steps than were tried")


def test_the_same_command_renders_only_what_is_missing(rendered, monkeypatch):
    calls, original = [], module.render_chunk
    monkeypatch.setattr(module, "render_chunk", lambda *args: calls.append(list(args[1])) or original(*args))
    before = (rendered / "mask" / "000005.png").read_bytes()
    render_folder(6, rendered, size=32, seed=1)
    assert calls == []
    (rendered / "mask" / "000005.png").write_bytes(before[:-1])  # truncated by a loss of power
    (rendered / ".000004.png.0123abcd.tmp").write_bytes(b"half")
    (rendered / ".notes.tmp").write_bytes(b"the user's")
    done = []
    render_folder(6, rendered, size=32, seed=1, progress=done.append)
    assert calls and all(5 in call for call in calls) and done[-1] == 6
    assert (rendered / "mask" / "000005.png").read_bytes() == before
    assert [p.name for p in rendered.iterdir() if p.name.startswith(".")] == [".notes.tmp"]
    for settings in ({"size": 64, "seed": 1}, {"size": 32, "seed": 2}, {"size": 32, "seed": 1, "edits": False}):
        refused(lambda settings=settings: render_folder(6, rendered, **settings), "not empty")


def test_a_full_disk_is_reported_and_leaves_only_whole_files(tmp_path, monkeypatch):
    """A file that no longer fits is removed; the rest is rendered once there is room."""
    written, folder, original = [0], tmp_path / "full", Path.open

    class Full(io.FileIO):
        def write(self, data):
            written[0] += len(data)
            super().write(data if written[0] < 12_000 else data[:100])
            if written[0] >= 12_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(data)

    def full_open(path, mode="r", *args, **kwargs):
        return Full(path, mode) if mode == "wb" else original(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_open)
        refused(lambda: render_folder(6, folder, size=32, seed=1), ".png: no space left on the disk")
    pictures = list(folder.rglob("*.png"))
    assert pictures and all(map(module._is_complete, pictures)) and not list(folder.rglob("*.tmp"))
    refused(lambda: open_source(folder), "which is missing")
    render_folder(6, folder, size=32, seed=1)
    assert len(read(open_source(folder, COLUMNS), range(6), 32)) == 6


def test_a_second_render_into_a_folder_is_refused(tmp_path):
    def render_again(done):
        refused(lambda: render_folder(2, tmp_path / "x", size=32), "another process renders into it")

    render_folder(2, tmp_path / "x", size=32, progress=render_again)


def test_an_interrupted_render_restores_the_thread_count(tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        render_folder(6, tmp_path / "new", size=32, progress=interrupt)
    assert torch.get_num_threads() == threads


def test_invalid_renders_are_refused(tmp_path, rendered):
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
