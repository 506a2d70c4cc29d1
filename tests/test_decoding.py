"""Training decodes image files as the commands do, refuses animations, and keeps the values of depth and id maps."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from codi.data.crops import load_picture
from codi.data.images import read_image
from codi.data.sources import CorruptSample, open_source
from folders import noise, read
from pixels import SWAPPED


def files_of_all_kinds(folder):
    """Write one file of each kind that plain Pillow reads differently from the commands, or not at all."""
    flat, deep = noise(20, 16), np.random.default_rng(3).integers(0, 65536, (16, 20, 4), dtype=np.uint16)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(flat, to_lab)
    assert lab is not None
    lab.save(folder / "lab.tif")
    (clear := flat.copy()).putalpha(flat.getchannel("R"))
    clear.save(folder / "alpha.png")
    flat.convert("P").save(folder / "palette.png", transparency=1)
    flat.convert("CMYK").save(folder / "cmyk.jpg")
    flat.save(folder / "wide.png", icc_profile=SWAPPED)
    flat.save(folder / "broken-profile.png", icc_profile=b"none")
    cv2.imwrite(str(folder / "deep.png"), deep[..., :3])
    cv2.imwrite(str(folder / "deep-alpha.png"), deep)
    cv2.imwrite(str(folder / "deep-grey.tif"), deep[..., 0])
    cv2.imwrite(str(folder / "float.tif"), deep[..., 0].astype(np.float32) / 65535)
    cv2.imwrite(str(folder / "float-color.tif"), deep[..., :3].astype(np.float32) / 65535)
    cv2.imwrite(str(folder / "double.tif"), deep[..., 0] / 65535)
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        flat.save(folder / f"turned-{orientation}.png", exif=exif)
        Image.fromarray(deep[..., 0]).save(folder / f"turned-deep-{orientation}.png", exif=exif)
        flat.convert("L").save(folder / f"turned-grey-{orientation}.jpg", exif=exif)


@pytest.mark.filterwarnings("ignore:.*color profile not usable")
def test_training_and_commands_decode_the_same_pixels(tmp_path):
    files_of_all_kinds(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 33
    for file in files:
        pixels = np.asarray(load_picture(file.read_bytes()).convert("RGB"), np.float32)
        difference = torch.from_numpy(pixels) - read_image(file).rgb.permute(1, 2, 0) * 255
        assert difference.abs().max() < 0.51, file.name


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_gray_keeps_its_brightness(tmp_path, bits):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * (1 if bits == 8 else 257)
    Image.fromarray(grey.astype(f"uint{bits}")).save(tmp_path / "a.png", transparency=int(grey[3, 3]))
    (sample,) = read(open_source(tmp_path), [0], 16)
    assert torch.equal((sample.image[0] * 255).round(), torch.arange(256.0).reshape(16, 16))


@pytest.mark.parametrize("column", ["file_name", "edited_image", "conditioning_image", "mask"])
def test_animations_are_corrupt_samples(tmp_path, column):
    """It is ambiguous which frame is meant."""
    frames = [noise(16, 16, seed) for seed in range(2)]
    frames[0].save(tmp_path / "still.png")
    deep = [Image.fromarray(np.full((16, 16), n, np.uint16)) for n in (1, 2)]
    deep[0].save(tmp_path / "deep.tif", save_all=True, append_images=deep[1:])
    for name in ("a.gif", "a.png", "a.webp", "a.tif", "a.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
    names = ["a.gif", "a.png", "a.webp", "a.tif", "a.avif", "deep.tif"]
    rows = [{"file_name": "still.png"} | {column: name} for name in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path, () if column == "file_name" else (column,))
    for sample in source.read(range(len(names)), 16):
        assert isinstance(sample, CorruptSample) and "several frames or pages" in sample.why


def test_map_values_are_kept_and_rotated_upright(tmp_path):
    """For every file format and data type."""
    noise(8, 6).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    grid = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1001
    Image.fromarray(np.ascontiguousarray(np.rot90(grid, -1))).save(tmp_path / "turned.png", exif=exif)
    for name, values in (("a.tif", grid), ("b.tif", grid.astype(np.float32)), ("c.tif", grid.astype(np.float64))):
        cv2.imwrite(str(tmp_path / name), values)
    names = ["turned.png", "a.tif", "b.tif", "c.tif"]
    for column in ("conditioning_image", "mask"):
        rows = [{"file_name": "a.png", column: name} for name in names]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for sample in read(open_source(tmp_path, (column,)), range(len(names)), 6):
            assert torch.equal(sample.extras[column][0], torch.from_numpy(grid[:, 1:7].astype(np.float32)))


def test_size_limits_apply_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr("codi.data.crops.MAX_PIXELS", 255)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((16, 16, 3), np.uint16))
    cv2.imwrite(str(tmp_path / "b.tif"), np.zeros((16, 16, 3), np.float32))
    cv2.imwrite(str(tmp_path / "c.tif"), np.zeros((16, 16)))
    Image.new("L", (1, 250)).save(tmp_path / "d.tif", tiffinfo={278: 1}, compression="tiff_lzw")
    monkeypatch.setattr("codi.data.deep.STRIP_LIMIT", 200)
    samples = open_source(tmp_path).read(range(4), 16)
    assert ["above the limit" in sample.why for sample in samples if isinstance(sample, CorruptSample)] == [True] * 4
