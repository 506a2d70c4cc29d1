"""`codi upscale` on users' files: kept metadata and profiles, resumed folders, and inputs enlarged before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from codi.apps.upscale import enlarged_already
from codi.data.images import read_image
from codi.files import locked
from codi.models.backbones import load_backbone
from folders import smooth
from originals import save_original
from pixels import SWAPPED, icc
from shell import picture
from tiny import rand


def test_resume_makes_only_missing_images(tiny, shell, tmp_path):
    for name in "ab":
        picture(tmp_path / "in" / f"{name}.png", seed=ord(name))
    command = ("upscale", tmp_path / "in", "-o", tmp_path / "out", *tiny.options, "--steps", 1)
    assert shell(*command).code == 0
    first = (tmp_path / "out/a.png").read_bytes()
    (tmp_path / "out/a.png").write_bytes(b"earlier")
    (tmp_path / "out/b.png").unlink()
    result = shell(*command, "--resume")
    assert result.code == 0 and "b.png" in result.out and "a.png" not in result.out and len(first) > 100
    assert (tmp_path / "out/a.png").read_bytes() == b"earlier" and (tmp_path / "out/b.png").stat().st_size > 100
    assert shell(*command, "--resume").code == 0  # nothing is missing
    (tmp_path / "out" / "b.png").unlink()
    with locked(tmp_path / "out", "busy"):
        shell(*command, "--resume").failed(1, "out: another codi upscale --resume is running there")
    assert shell(*command, "--resume").code == 0 and (tmp_path / "out" / "b.png").is_file()
    shell(*command, "--resume", "--overwrite").failed(2, "--resume --overwrite")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_is_kept_and_the_orientation_applied(tiny, shell, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6  # the maker; the orientation, a quarter turn
    exif.get_ifd(0x8769)[0x829D] = 2.8  # the aperture
    smooth(20, 12).save(tmp_path / "in.jpg", exif=exif)
    out = tmp_path / f"out.{suffix}"
    assert shell("upscale", tmp_path / "in.jpg", "-o", out, *tiny.options, "--steps", 1).code == 0
    image = Image.open(out)
    exif_kept = image.getexif()
    assert exif_kept[0x010F] == "a camera" and float(exif_kept.get_ifd(0x8769)[0x829D]) == pytest.approx(2.8)
    assert exif_kept.get(0x0112, 1) == 1 and image.height > image.width


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_keeps_its_color_profile(tiny, shell, tmp_path, suffix, mode):
    """Including the PNG, which is written row by row."""
    profile = icc(2.2) if mode == "L" else SWAPPED
    smooth(20, 12).convert(mode).save(tmp_path / "in.png", icc_profile=profile)
    smooth(20, 12).convert(mode).save(tmp_path / "plain.png")
    for name in ("in", "plain"):
        assert shell("upscale", tmp_path / f"{name}.png", "-o", tmp_path / f"made-{name}.{suffix}", *tiny.options,
                     "--steps", 1).code == 0  # fmt: skip
    upscaled, plain = (Image.open(tmp_path / f"made-{name}.{suffix}") for name in ("in", "plain"))
    assert upscaled.info["icc_profile"] == profile and "icc_profile" not in plain.info
    assert np.array_equal(np.asarray(upscaled), np.asarray(plain))  # the same levels in another profile


def test_an_image_that_was_enlarged_before_is_detected():
    octaves = [n * F.interpolate(rand(1, 3, 96 // n, 96 // n, seed=n), (96, 96), mode="bicubic") for n in (1, 2, 4, 8)]
    fine = torch.cat(octaves).sum(0) / 15  # coarse ones are stronger, as in photographs
    assert not enlarged_already(fine)
    assert enlarged_already(F.interpolate(fine[None], scale_factor=2, mode="bicubic")[0])
    assert not enlarged_already(torch.full((3, 80, 80), 0.5)) and not enlarged_already(fine[:, :20])


def test_a_single_file_gets_its_configs_from_a_folder(tiny, shell, tmp_path):
    folder = tiny.options[tiny.options.index("--model") + 1]
    file = save_original(load_backbone(folder), tmp_path / "one.safetensors")
    options = [file if option == folder else option for option in tiny.options]
    source, out = picture(tmp_path / "in.png"), tmp_path / "out.png"
    result = shell("upscale", source, "-o", out, *options, "--steps", 1, "--config", folder)
    assert result.code == 0 and Image.open(out).width == 28, result
    assert shell("upscale", source, "-o", tmp_path / "same.png", *tiny.options, "--steps", 1).code == 0
    assert (read_image(out).rgb == read_image(tmp_path / "same.png").rgb).all()
