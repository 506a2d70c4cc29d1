"""Color profiles of users' images: they are converted to sRGB, and a broken profile is a warning."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from codi.data.images import read_image
from pixels import RGB, SRGB_COLUMNS, SWAPPED, icc, levels


def test_a_profile_is_converted_to_srgb(tmp_path: Path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=SWAPPED)
    picture = read_image(tmp_path / "a.png")
    assert picture.icc is None
    assert np.abs(levels(picture.rgb)[0, 0] - (0, 255, 0)).max() <= 3


def test_a_profile_does_not_change_alpha(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 77)).save(tmp_path / "a.png", icc_profile=SWAPPED)
    picture = read_image(tmp_path / "a.png")
    assert picture.alpha is not None and np.all(levels(picture.alpha) == 77)
    assert np.abs(levels(picture.rgb)[0, 0] - (0, 255, 0)).max() <= 3


def test_grey_images_take_grey_and_rgb_profiles(tmp_path: Path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    for name, profile in (("grey.png", icc(1.0)), ("rgb.png", icc(1.0, SRGB_COLUMNS))):
        ramp.save(tmp_path / name, icc_profile=profile)
        picture = read_image(tmp_path / name)
        assert picture.grey and picture.rgb[0, 0, 55] == pytest.approx(0.5, abs=0.02)  # linear 0.216 is sRGB 0.5


@pytest.mark.parametrize(
    ("mode", "profile", "stays"),
    [("RGB", SWAPPED, True), ("L", icc(1.8), True), ("LA", icc(1.8), False), ("RGB", icc(1.0, SRGB_COLUMNS), False),
     ("L", SWAPPED, False), ("RGB", b"rubbish", False)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*profile not usable")
def test_colors_may_stay_in_their_own_profile(tmp_path: Path, mode: str, profile: bytes, stays: bool):
    """Only if they look like sRGB to a network, unlike linear light, and fit the file to be written."""
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    own, converted = read_image(tmp_path / "a.png", own_profile=True), read_image(tmp_path / "a.png")
    assert converted.icc is None and own.icc == (profile if stays else None)
    if stays:
        assert np.array_equal(levels(own.rgb), np.asarray(image.convert("RGB")))
    else:
        assert torch.equal(own.rgb, converted.rgb)


def test_an_srgb_profile_changes_nothing(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(levels(read_image(tmp_path / "a.png").rgb), RGB)


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_profiles_keep_more_than_eight_bits(tmp_path: Path, channels: int):
    ramp = np.linspace(20000, 22000, 500).astype(np.uint16)[None]
    stored = ramp if channels == 1 else ramp[..., None].repeat(3, 2)
    data = cv2.imencode(".png", stored)[1].tobytes()
    body = b"iCCPx\0\0" + zlib.compress(icc(1.0, None if channels == 1 else SRGB_COLUMNS))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    converted_row = read_image(tmp_path / "a.png").rgb[1, 0]
    linear = torch.from_numpy(ramp[0] / 65535)
    assert torch.allclose(converted_row.double(), 1.055 * linear ** (1 / 2.4) - 0.055, atol=0.006)
    assert (
        len(converted_row.unique()) > 400 and (converted_row.diff() >= 0).all()
    )  # 8 bits would leave about seven levels


@pytest.mark.parametrize("profile", [b"rubbish", SWAPPED[:200], icc(2.2)])
def test_a_broken_profile_is_a_warning(tmp_path: Path, profile: bytes):
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match="profile not usable"):
        picture = read_image(tmp_path / "a.png")
    assert np.array_equal(levels(picture.rgb), RGB)
