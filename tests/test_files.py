"""Files and folders are written whole or not at all."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from codi.errors import UserError
from codi.files import remove_leftovers, write_file, write_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_it_is_whole(tmp_path):
    """And of what fails on the way nothing stays."""
    file = tmp_path / "new" / "a.json"
    write_text(file, "\u00e4")

    def fill(temporary):
        temporary.write_text("half")
        assert file.read_text(encoding="utf-8") == "\u00e4" and temporary.parent == file.parent
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(file, fill)
    assert file.read_text(encoding="utf-8") == "\u00e4" and names(file.parent) == ["a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_rights_that_the_user_set(tmp_path, mask):
    """Those of safetensors, too, which gives them to their owner alone."""
    before = os.umask(mask)
    try:
        write_file(tmp_path / "a", lambda temporary: save_file({"a": torch.ones(1)}, temporary))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    assert load_file(tmp_path / "a")["a"].item() == 1


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_what_cannot_be_written_is_one_line(tmp_path, write, code, words):
    def fill(temporary):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=rf"^.*/a: {words}.*: ?.*$"):
        write(tmp_path / "a", fill)
    assert names(tmp_path) == []


def test_leftovers_of_the_files_that_are_meant_go(tmp_path):
    for name in (".a.json.0123abcd.tmp", ".b.json.0123abcd.tmp", ".a.json.tmp", "a.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, r"a\.json")
    assert names(tmp_path) == [".a.json.tmp", ".b.json.0123abcd.tmp", "a.json"]
