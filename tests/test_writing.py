"""Writing images: every level comes back, and a failure leaves no file behind."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codi.data.images import check_writable, read_image, write_image, write_png
from codi.data.writing import write_png_bands
from codi.errors import UserError
from pixels import DEEP, fault, gradient, levels
from tiny import rand


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_png_round_trip_keeps_every_level_and_the_metadata(tmp_path: Path, bits: int, alpha: bool):
    source = DEEP if bits == 16 else (DEEP >> 8)
    values = torch.from_numpy(source.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)
    metadata = {"codi": "upscale 4 steps, seed 0", "prompt": "a café 紅"}
    write_png(tmp_path / "new" / "a.png", values[:3], values[3:] if alpha else None, metadata, bits)
    assert os.listdir(tmp_path / "new") == ["a.png"]
    picture = read_image(tmp_path / "new" / "a.png")
    assert picture.bits == bits and torch.equal(picture.rgb, values[:3])
    assert torch.equal(picture.alpha, values[3:]) if alpha and picture.alpha is not None else picture.alpha is None
    with Image.open(tmp_path / "new" / "a.png") as image:
        image.load()
        assert getattr(image, "text") == metadata  # noqa: B009 (PNG's own attribute)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_is_written_grey(tmp_path: Path, bits: int):
    write_png(tmp_path / "a.png", gradient(), bits=bits, grey=True)
    picture = read_image(tmp_path / "a.png")
    assert picture.grey and picture.bits == bits
    assert torch.allclose(picture.rgb, gradient(), atol=0.51 / (2**bits - 1))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["rgb", "alpha", "grey"])
def test_an_image_written_in_bands_equals_the_whole(tmp_path: Path, kind: str, bits: int):
    rgb, alpha = rand(3, 50, 33), rand(1, 50, 33, seed=1) if kind == "alpha" else None
    metadata, grey = {"codi": "a", "prompt": "a café 紅"}, kind == "grey"
    write_png(tmp_path / "whole.png", rgb.clone(), alpha, metadata, bits, grey)
    parts = [(rgb[None, :, a:b], None if alpha is None else alpha[:, a:b]) for a, b in ((0, 20), (20, 21), (21, 50))]
    write_png_bands(tmp_path / "bands.png", iter(parts), 50, 33, metadata, bits, grey)
    whole, banded = (read_image(tmp_path / f"{name}.png") for name in ("whole", "bands"))
    assert torch.equal(whole.rgb, banded.rgb) and (whole.grey, whole.bits) == (banded.grey, banded.bits) == (grey, bits)
    assert alpha is None or torch.equal(whole.alpha, banded.alpha)
    with Image.open(tmp_path / "bands.png") as image:
        assert image.size == (33, 50) and getattr(image, "text") == metadata  # noqa: B009 (PNG's own attribute)


def test_bands_that_fail_leave_nothing_behind(tmp_path: Path):
    def bands():
        yield rand(1, 3, 20, 33), None
        raise UserError("tile 1: failed: try again")

    with pytest.raises(UserError, match="tile 1"):
        write_png_bands(tmp_path / "a.png", bands(), 50, 33)
    assert not list(tmp_path.iterdir())


def test_values_are_clamped_and_rounded_to_nearest(tmp_path: Path):
    write_png(tmp_path / "a.png", torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0]).expand(3, 1, 4))
    assert levels(read_image(tmp_path / "a.png").rgb)[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp", "A.PNG"])
def test_the_extension_selects_the_format(tmp_path: Path, name: str):
    write_image(tmp_path / name, gradient(), metadata={"steps": "4"})
    assert (read_image(tmp_path / name).rgb - gradient()).abs().max() < 0.03
    with Image.open(tmp_path / name) as image:
        assert image.info.get("steps") == "4" or '"steps": "4"' in image.getexif()[0x010E]


def test_jpeg_blends_alpha_with_white_and_webp_keeps_it(tmp_path: Path):
    alpha = torch.zeros(1, 8, 64)
    write_image(tmp_path / "a.jpg", gradient() * 0, alpha)
    assert read_image(tmp_path / "a.jpg").rgb.min() > 0.98
    write_image(tmp_path / "a.webp", gradient() * 0, alpha)
    picture = read_image(tmp_path / "a.webp")
    assert picture.alpha is not None and picture.alpha.max() == 0


def test_unusable_targets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(path):
        write_image(path, gradient())

    target = tmp_path / "a.png"
    write(target)
    before = target.read_bytes()
    for call in (write, check_writable):
        fault(target, "exists already", "--overwrite", call=call)
        fault(tmp_path / "a.pmg", "cannot write .pmg", "did you mean '.png'", call=call)
        fault(tmp_path / "noextension", "use .png", call=call)
        fault(target / "b.png", "is a file, not a folder", call=call)
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        fault(tmp_path / "folder.png", "is a folder", call=call)
        fault(tmp_path / ("x" * 300 + ".png"), "cannot be written", call=call)
    with monkeypatch.context() as patch:  # permissions do not bind root, so patch the check
        patch.setattr(os, "access", lambda *_: False)
        fault(tmp_path / "b.png", "may not be written", call=write)
    assert target.read_bytes() == before
    check_writable(tmp_path / "deeper" / "still" / "b.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.png"]

    write_png(target, 1 - gradient(), overwrite=True)
    assert torch.allclose(read_image(target).rgb, 1 - gradient(), atol=0.003)


@pytest.mark.parametrize("moment", ["open", "write", "replace"])
@pytest.mark.parametrize("code, message", [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int, message: str
):
    target = tmp_path / "a.png"
    write_png(target, gradient())
    before = target.read_bytes()
    error = OSError(code, os.strerror(code))

    class Full(io.FileIO):
        def write(self, data):  # part of it fits
            super().write(bytes(data)[:100])
            raise error

    def fail(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr(os, "replace", fail)
        else:
            patch.setattr(Path, "open", fail if moment == "open" else lambda self, mode: Full(self, mode))
        fault(target, message, call=lambda path: write_png(path, 1 - gradient(), overwrite=True))
        fault(tmp_path / "b.png", message, call=lambda path: write_png(path, gradient()))
    assert os.listdir(tmp_path) == ["a.png"] and target.read_bytes() == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", gradient())
    assert os.listdir(tmp_path) == []


def test_images_that_cannot_be_written_are_refused(tmp_path: Path):
    fault(tmp_path / "a.png", "NaN", call=lambda path: write_png(path, gradient() * torch.nan))
    fault(tmp_path / "a.jpg", "write it as .png", call=lambda path: write_image(path, torch.zeros(3, 1, 70_000)))
    with pytest.raises(UserError, match="8 or 16 bits"):
        write_png(tmp_path / "a.png", gradient(), bits=12)
    assert os.listdir(tmp_path) == []
