"""Reading and writing users' pictures: every kind of file becomes upright sRGB, every fault one clear line."""

import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from codi.data import images
from codi.data.images import check_writable, read_image, write_image, write_png
from codi.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)  # odd sides, and not square
DEEP = np.random.default_rng(1).integers(0, 65536, (7, 5, 4), dtype=np.uint16)


def levels(tensor: torch.Tensor, top: int = 255) -> np.ndarray:
    return (tensor * top).round().permute(1, 2, 0).numpy().astype(int)


def gradient(height: int = 8, width: int = 64) -> torch.Tensor:
    return torch.linspace(0, 1, width).expand(3, height, width).clone()


def fault(path, *words: str, call=read_image) -> None:
    with pytest.raises(UserError) as caught:
        call(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and message.count(": ") >= 2, message
    for word in words:
        assert word in message, message


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def float_tiff(array: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".tiff", array)
    assert ok
    return data.tobytes()


# --- what files become ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tif", "a.ppm"])
def test_colour_is_read_exactly(tmp_path: Path, name: str):
    Image.fromarray(RGB).save(tmp_path / name, lossless=True)  # which WebP alone asks about
    picture = read_image(tmp_path / name)
    assert picture.rgb.dtype == torch.float32 and picture.rgb.shape == (3, 7, 5)
    assert np.array_equal(levels(picture.rgb), RGB)
    assert picture.alpha is None and not picture.grey and picture.bits == 8 and picture.path == str(tmp_path / name)


def test_grey_and_bilevel(tmp_path: Path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(RGB[..., 0] > 128).save(tmp_path / "two.png")
    picture = read_image(tmp_path / "grey.png")
    assert picture.grey and np.array_equal(levels(picture.rgb), RGB[..., :1].repeat(3, axis=2))
    picture = read_image(tmp_path / "two.png")
    assert picture.grey and np.array_equal(levels(picture.rgb)[..., 0], np.where(RGB[..., 0] > 128, 255, 0))


def test_alpha_of_rgba_la_and_palette(tmp_path: Path):
    alpha = RGB[..., 1]
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "rgba.png")
    picture = read_image(tmp_path / "rgba.png")
    assert picture.alpha is not None and picture.alpha.shape == (1, 7, 5)
    assert np.array_equal(levels(picture.rgb), RGB) and np.array_equal(levels(picture.alpha)[..., 0], alpha)

    Image.fromarray(np.dstack([RGB[..., 0], alpha]), "LA").save(tmp_path / "la.png")
    picture = read_image(tmp_path / "la.png")
    assert picture.grey and picture.alpha is not None and np.array_equal(levels(picture.alpha)[..., 0], alpha)
    assert np.array_equal(levels(picture.rgb)[..., 0], RGB[..., 0])

    index = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    index.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    index.save(tmp_path / "palette.png", transparency=1)
    picture = read_image(tmp_path / "palette.png")
    assert levels(picture.rgb)[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert picture.alpha is not None and picture.alpha.flatten().tolist() == [1, 0, 1]
    index.save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png").alpha is None


def test_cmyk_and_lab(tmp_path: Path):
    patches = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8), 16, 1)
    Image.fromarray(patches.repeat(16, 0)).convert("CMYK").save(tmp_path / "c.jpg", quality=100, subsampling=0)
    assert np.abs(levels(read_image(tmp_path / "c.jpg").rgb)[8, 8::16] - patches[0, 8::16]).max() < 12
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    patches = np.array([[[200, 80, 60], [60, 180, 90], [70, 90, 160]]], np.uint8)
    lab = ImageCms.applyTransform(Image.fromarray(patches), to_lab)
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    assert np.abs(levels(read_image(tmp_path / "lab.tif").rgb) - patches).max() < 5


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_keep_every_level(tmp_path: Path, extension: str, channels: int):
    path = tmp_path / f"deep.{extension}"
    stored = {1: DEEP[..., 0], 3: DEEP[..., 2::-1], 4: DEEP[..., [2, 1, 0, 3]]}[channels]  # OpenCV's order
    cv2.imwrite(str(path), stored)
    picture = read_image(path)
    assert picture.bits == 16 and picture.grey == (channels == 1)
    assert np.array_equal(levels(picture.rgb, 65535), DEEP[..., :1].repeat(3, 2) if channels == 1 else DEEP[..., :3])
    if channels == 4:
        assert picture.alpha is not None and np.array_equal(levels(picture.alpha, 65535), DEEP[..., 3:])


def test_sixteen_bit_grey_with_alpha_and_pgm(tmp_path: Path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP[..., :2])
    (tmp_path / "la.png").write_bytes(png(5, 7, rows, bits=16, colour=4))
    picture = read_image(tmp_path / "la.png")
    assert picture.grey and picture.bits == 16 and np.array_equal(levels(picture.rgb, 65535)[..., 1], DEEP[..., 0])
    assert picture.alpha is not None and np.array_equal(levels(picture.alpha, 65535)[..., 0], DEEP[..., 1])
    cv2.imwrite(str(tmp_path / "a.pgm"), DEEP[..., 0])
    picture = read_image(tmp_path / "a.pgm")
    assert picture.bits == 16 and np.array_equal(levels(picture.rgb, 65535)[..., 0], DEEP[..., 0])


def test_float_tiff_within_0_and_1(tmp_path: Path):
    for name, values in (("grey.tif", DEEP[..., 0]), ("rgb.tif", DEEP[..., :3]), ("double.tif", DEEP[..., 0])):
        values = (values / 65535).astype(np.float64 if name == "double.tif" else np.float32)
        (tmp_path / name).write_bytes(float_tiff(values if values.ndim == 2 else values[..., ::-1]))
        picture = read_image(tmp_path / name)
        want = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
        assert picture.bits == 16 and np.allclose(picture.rgb.permute(1, 2, 0).numpy(), want, atol=1e-6)


def test_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
        red, green, _ = read_image(tmp_path / name).rgb.mean((1, 2))
        assert red > 0.7 and green < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["a.png", "deep.png", "a.tif", "deep.tif"])
def test_exif_rotation(tmp_path: Path, orientation: int, kind: str):
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
               6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    path = tmp_path / kind
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "deep.png":  # Pillow writes no 16-bit colour: add its EXIF chunk to OpenCV's file
        data = cv2.imencode(".png", DEEP[..., 2::-1])[1].tobytes()
        chunk = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(data[:33] + chunk + data[33:])
    elif kind == "deep.tif":
        path.write_bytes(_tiff16(DEEP[..., :3], orientation))
    else:
        Image.fromarray(RGB).save(path, exif=exif)
    picture = read_image(path)
    top, stored = (65535, DEEP[..., :3]) if kind.startswith("deep") else (255, RGB)
    assert np.array_equal(levels(picture.rgb, top), upright[orientation](stored))


def _tiff16(pixels: np.ndarray, orientation: int) -> bytes:
    """A minimal little-endian TIFF of one strip."""
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
            (274, 3, 1, orientation), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 14 + len(data))
        + struct.pack("<HHH", 16, 16, 16)
        + data
        + (struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    )


def test_broken_exif_turns_nothing(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*rubbish")
    assert np.array_equal(levels(read_image(tmp_path / "a.png").rgb), RGB)


# --- colour profiles -----------------------------------------------------------------------------------------------


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


# --- faults of files -----------------------------------------------------------------------------------------------


def test_missing_folder_empty_and_other_files(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "photo.png")
    fault(tmp_path / "phto.png", "no such file", "did you mean 'photo.png'")
    fault(tmp_path / "nowhere" / "a.png", "no such file")
    fault(tmp_path, "is a folder")
    (tmp_path / "empty.png").touch()
    fault(tmp_path / "empty.png", "0 bytes")
    (tmp_path / "text.png").write_text("hello")
    fault(tmp_path / "text.png", "not an image")


def test_truncated_files(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for keep in (len(whole) // 2, 24):
            (tmp_path / name).write_bytes(whole[:keep])
            fault(tmp_path / name, "truncated or damaged")
    deep = {"deep.png": cv2.imencode(".png", DEEP)[1].tobytes(), "float.tif": float_tiff(noise / np.float32(255))}
    for name, whole in deep.items():
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        fault(tmp_path / name, "truncated or damaged")


def test_huge_headers_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(png(100_000, 100_000, b"0"))
    fault(tmp_path / "a.png", "100000 x 100000", "178 megapixels")
    data = bytearray(float_tiff(np.zeros((4, 4, 3), np.float32)))
    directory = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, directory)[0]):
        at = directory + 2 + 12 * entry
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            struct.pack_into("<HII", data, at + 2, 4, 1, 100_000)
    (tmp_path / "float.tif").write_bytes(bytes(data))
    fault(tmp_path / "float.tif", "100000 x 100000")

    with warnings.catch_warnings():  # nor does Pillow's own warning, at half of our limit, reach the user
        warnings.simplefilter("error")
        (tmp_path / "large.png").write_bytes(png(10_000, 10_000, b"0"))
        fault(tmp_path / "large.png", "truncated")
    monkeypatch.setattr(images, "PIXEL_LIMIT", 34)
    Image.fromarray(RGB).save(tmp_path / "b.png")
    fault(tmp_path / "b.png", "5 x 7 pixels")


@pytest.mark.parametrize("value, words", [(np.nan, "NaN"), (np.inf, "infinite"), (255.0, "scale them to 0..1")])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_float_tiff_out_of_range(tmp_path: Path, value: float, words: str, shape: tuple):
    values = np.zeros(shape, np.float32)
    values[1, 2] = value
    (tmp_path / "a.tif").write_bytes(float_tiff(values))
    fault(tmp_path / "a.tif", words)


def test_integers_beyond_sixteen_bits(tmp_path: Path):
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "a.tif")
    fault(tmp_path / "a.tif", "70000", "8 or 16 bits")


# --- writing -------------------------------------------------------------------------------------------------------


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


def test_values_are_clamped_and_rounded_to_nearest(tmp_path: Path):
    write_png(tmp_path / "a.png", torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0]).expand(3, 1, 4))
    assert levels(read_image(tmp_path / "a.png").rgb)[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp", "A.PNG"])
def test_other_formats_by_extension(tmp_path: Path, name: str):
    write_image(tmp_path / name, gradient(), metadata={"steps": "4"})
    assert (read_image(tmp_path / name).rgb - gradient()).abs().max() < 0.03
    with Image.open(tmp_path / name) as image:
        assert image.info.get("steps") == "4" or '"steps": "4"' in image.getexif()[0x010E]


def test_jpeg_lays_alpha_on_white_and_webp_keeps_it(tmp_path: Path):
    alpha = torch.zeros(1, 8, 64)
    write_image(tmp_path / "a.jpg", gradient() * 0, alpha)
    assert read_image(tmp_path / "a.jpg").rgb.min() > 0.98
    write_image(tmp_path / "a.webp", gradient() * 0, alpha)
    picture = read_image(tmp_path / "a.webp")
    assert picture.alpha is not None and picture.alpha.max() == 0


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    with monkeypatch.context() as patch:  # permissions do not bind root, so say that they would
        patch.setattr(os, "access", lambda *_: False)
        fault(tmp_path / "b.png", "may not be written", call=write)
    assert target.read_bytes() == before
    check_writable(tmp_path / "deeper" / "still" / "b.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.png"]

    write_png(target, 1 - gradient(), overwrite=True)
    assert torch.allclose(read_image(target).rgb, 1 - gradient(), atol=0.003)


@pytest.mark.parametrize("moment", ["open", "write", "replace"])
@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int, words: str
):
    target = tmp_path / "a.png"
    write_png(target, gradient())
    before = target.read_bytes()
    error = OSError(code, os.strerror(code))

    class Full(io.FileIO):
        def write(self, data):  # some of it fits
            super().write(bytes(data)[:100])
            raise error

    def fail(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr(os, "replace", fail)
        else:
            patch.setattr(Path, "open", fail if moment == "open" else lambda self, mode: Full(self, mode))
        fault(target, words, call=lambda path: write_png(path, 1 - gradient(), overwrite=True))
        fault(tmp_path / "b.png", words, call=lambda path: write_png(path, gradient()))
    assert os.listdir(tmp_path) == ["a.png"] and target.read_bytes() == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", gradient())
    assert os.listdir(tmp_path) == []


def test_pictures_that_cannot_be_written(tmp_path: Path):
    fault(tmp_path / "a.png", "NaN", call=lambda path: write_png(path, gradient() * torch.nan))
    fault(tmp_path / "a.jpg", "write it as .png", call=lambda path: write_image(path, torch.zeros(3, 1, 70_000)))
    with pytest.raises(UserError, match="8 or 16 bits"):
        write_png(tmp_path / "a.png", gradient(), bits=12)
    assert os.listdir(tmp_path) == []
