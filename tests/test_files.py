"""Files and folders are written atomically."""

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


def test_interrupted_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path):
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
def test_file_permissions_follow_the_umask(tmp_path, mask):
    """Also for safetensors files, which the library creates with owner-only permissions."""
    before = os.umask(mask)
    try:
        write_file(tmp_path / "a", lambda temporary: save_file({"a": torch.ones(1)}, temporary))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    assert load_file(tmp_path / "a")["a"].item() == 1


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_write_errors_are_one_line_and_leave_no_files(tmp_path, write, code, message):
    def fill(temporary):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=rf"^.*/a: {message}.*: ?.*$"):
        write(tmp_path / "a", fill)
    assert names(tmp_path) == []


def test_remove_leftovers_deletes_temporaries_of_matching_files_only(tmp_path):
    for name in (".a.json.0123abcd.tmp", ".b.json.0123abcd.tmp", ".a.json.tmp", "a.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, r"a\.json")
    assert names(tmp_path) == [".a.json.tmp", ".b.json.0123abcd.tmp", "a.json"]
