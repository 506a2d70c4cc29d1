"""Colour profiles of users' pictures: what is read is sRGB, and a broken profile is a warning."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from codi.data.images import read_image
from pixels import RGB, levels


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc(gamma: float, primaries=None) -> bytes:
    """A minimal ICC v2 profile: RGB with these D50 XYZ columns, or grey without."""
    xyz = lambda values: b"XYZ \0\0\0\0" + b"".join(map(s15, values))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz((0.9642, 1, 0.8249))}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr",
                         b"GRAY" if primaries is None else b"RGB ", b"XYZ ")  # fmt: skip
    header += bytes(12) + b"acsp" + bytes(28) + s15(0.9642) + s15(1) + s15(0.8249)
    return header.ljust(128, b"\0") + table + body


SRGB_COLUMNS = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
SWAPPED = icc(2.2, (SRGB_COLUMNS[1], SRGB_COLUMNS[0], SRGB_COLUMNS[2]))  # "red" is green and the reverse


def test_profile_is_converted_to_srgb(tmp_path: Path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=SWAPPED)
    picture = read_image(tmp_path / "a.png")
    assert picture.icc == SWAPPED
    assert np.abs(levels(picture.rgb)[0, 0] - (0, 255, 0)).max() <= 3


def test_alpha_passes_a_profile_untouched(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 77)).save(tmp_path / "a.png", icc_profile=SWAPPED)
    picture = read_image(tmp_path / "a.png")
    assert picture.alpha is not None and np.all(levels(picture.alpha) == 77)
    assert np.abs(levels(picture.rgb)[0, 0] - (0, 255, 0)).max() <= 3


def test_grey_profile_and_rgb_profile_on_grey(tmp_path: Path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    for name, profile in (("grey.png", icc(1.0)), ("rgb.png", icc(1.0, SRGB_COLUMNS))):
        ramp.save(tmp_path / name, icc_profile=profile)
        picture = read_image(tmp_path / name)
        assert picture.grey and picture.rgb[0, 0, 55] == pytest.approx(0.5, abs=0.02)  # linear 0.216 is sRGB 0.5


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
    got = read_image(tmp_path / "a.png").rgb[1, 0]
    linear = torch.from_numpy(ramp[0] / 65535)
    assert torch.allclose(got.double(), 1.055 * linear ** (1 / 2.4) - 0.055, atol=0.006)
    assert len(got.unique()) > 400 and (got.diff() >= 0).all()  # 8 bits would leave some seven levels


@pytest.mark.parametrize("profile", [b"rubbish", SWAPPED[:200], icc(2.2)])
def test_a_broken_profile_is_a_warning(tmp_path: Path, profile: bytes):
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match="profile not usable"):
        picture = read_image(tmp_path / "a.png")
    assert np.array_equal(levels(picture.rgb), RGB)
