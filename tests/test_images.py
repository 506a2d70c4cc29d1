"""Reading users' images: every kind of file becomes upright RGB, every fault is one clear line."""

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
from codi.data.images import image_suffixes, list_images, read_image
from codi.data.samples import Sample
from codi.data.sources import open_source
from pixels import DEEP, RGB, fault, levels


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 2, clear: int | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    clear_grey = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    data = clear_grey + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def float_tiff(array: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".tiff", array)
    assert ok
    return data.tobytes()


# --- which files are images -------------------------------------------------------------------------------------------


def test_a_folder_lists_the_images_that_can_be_read(tmp_path: Path):
    """Commands and training accept the same files: every suffix of a format that Pillow writes and decodes."""
    written = [
        suffix
        for suffix in image_suffixes()
        if (name := Image.registered_extensions()[suffix]) in Image.SAVE and name not in ("MSP", "XBM", "SPIDER")
    ]
    for number, suffix in enumerate(written):
        kind = "BLP" if suffix == ".blp" else Image.registered_extensions()[suffix]
        image = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
        (image.convert("P") if suffix == ".blp" else image).save(tmp_path / f"{number:02}{suffix}", kind)
    for name in ("a.txt", "b.h5", "c.mpg", "d.eps", ".hidden.png"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "folder.png").mkdir()
    for folder in (".ipynb_checkpoints", "folder.png"):
        Image.fromarray(RGB).save(tmp_path / folder / "copy.PNG")
    listed = list_images(tmp_path)
    assert [path.suffix for path in listed] == written and {".avif", ".jfif", ".jp2", ".ppm", ".gif"} < set(written)
    assert all(abs(levels(read_image(path).rgb).mean() - 200) < 3 for path in listed)
    assert list_images(tmp_path, below=True) == [*listed, tmp_path / "folder.png" / "copy.PNG"]
    source = open_source(tmp_path)
    assert len(source) == len(listed) + 1
    assert all(isinstance(sample, Sample) for sample in source.read(range(len(source)), 16))


# --- how files are decoded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tif", "a.ppm"])
def test_color_is_read_exactly(tmp_path: Path, name: str):
    Image.fromarray(RGB).save(tmp_path / name, lossless=True)  # a WebP option; the others ignore it
    picture = read_image(tmp_path / name)
    assert picture.rgb.dtype == torch.float32 and picture.rgb.shape == (3, 7, 5)
    assert np.array_equal(levels(picture.rgb), RGB)
    assert picture.alpha is None and not picture.grey and picture.bits == 8 and picture.path == str(tmp_path / name)


def test_grey_and_bilevel_images_become_rgb(tmp_path: Path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(RGB[..., 0] > 128).save(tmp_path / "two.png")
    picture = read_image(tmp_path / "grey.png")
    assert picture.grey and np.array_equal(levels(picture.rgb), RGB[..., :1].repeat(3, axis=2))
    picture = read_image(tmp_path / "two.png")
    assert picture.grey and np.array_equal(levels(picture.rgb)[..., 0], np.where(RGB[..., 0] > 128, 255, 0))


def test_alpha_of_rgba_la_and_palette_images_is_read(tmp_path: Path):
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


def test_cmyk_and_lab_become_rgb(tmp_path: Path):
    patches = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8), 16, 1)
    Image.fromarray(patches.repeat(16, 0)).convert("CMYK").save(tmp_path / "c.jpg", quality=100, subsampling=0)
    assert np.abs(levels(read_image(tmp_path / "c.jpg").rgb)[8, 8::16] - patches[0, 8::16]).max() < 12
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    patches = np.array([[[200, 80, 60], [60, 180, 90], [70, 90, 160]]], np.uint8)
    lab = ImageCms.applyTransform(Image.fromarray(patches), to_lab)
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    picture = read_image(tmp_path / "lab.tif")
    assert (
        np.abs(levels(picture.rgb) - patches).max() < 5 and picture.alpha is None
    )  # "A" is a channel of LAB, not alpha


@pytest.mark.parametrize(
    ("bits", "row", "clear"),
    [(1, b"\x50", 1), (2, b"\x1b", 1), (4, b"\x01\x23", 1), (8, bytes(range(4)), 1), (16, bytes(range(8)), 0x203)],
)
def test_the_transparent_level_of_a_grey_png_is_read(tmp_path: Path, bits: int, row: bytes, clear: int):
    (tmp_path / "a.png").write_bytes(png(4, 1, b"\0" + row, bits, 0, clear))
    picture = read_image(tmp_path / "a.png")
    assert picture.grey and picture.bits == (16 if bits == 16 else 8) and picture.alpha is not None
    assert picture.alpha.flatten().tolist() == [1, 0, 1, 0 if bits == 1 else 1]
    (tmp_path / "a.png").write_bytes(png(4, 1, b"\0" + row, bits, 0))
    assert torch.equal(read_image(tmp_path / "a.png").rgb, picture.rgb)


def test_the_channels_of_a_deep_tiff_are_interpreted(tmp_path: Path):
    path, grey, colours = tmp_path / "a.tif", DEEP[..., :1], DEEP[..., :3]
    path.write_bytes(_tiff16(grey, photometric=0))  # 0 is white
    assert np.array_equal(levels(read_image(path).rgb, 65535)[..., :1], 65535 - grey.astype(int))
    path.write_bytes(_tiff16(DEEP, extra=0))  # a fourth channel of unknown meaning
    picture = read_image(path)
    assert picture.alpha is None and np.array_equal(levels(picture.rgb, 65535), colours)
    alpha = np.full((7, 5, 1), 32768, np.uint16)
    path.write_bytes(_tiff16(np.dstack([colours // 2, alpha]), extra=1))  # premultiplied
    picture = read_image(path)
    assert picture.alpha is not None and np.abs(levels(picture.rgb, 65535) - colours.astype(int)).max() <= 2
    for photometric in (1, 6, 8, 9, 10):  # grey of three channels, YCbCr, three kinds of LAB
        path.write_bytes(_tiff16(colours, photometric=photometric))
        fault(path, "unusual kind of TIFF")


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_keep_every_level(tmp_path: Path, extension: str, channels: int):
    path = tmp_path / f"deep.{extension}"
    stored = {1: DEEP[..., 0], 3: DEEP[..., 2::-1], 4: DEEP[..., [2, 1, 0, 3]]}[channels]  # OpenCV's channel order
    cv2.imwrite(str(path), stored)
    picture = read_image(path)
    assert picture.bits == 16 and picture.grey == (channels == 1)
    assert np.array_equal(levels(picture.rgb, 65535), DEEP[..., :1].repeat(3, 2) if channels == 1 else DEEP[..., :3])
    if channels == 4:
        assert picture.alpha is not None and np.array_equal(levels(picture.alpha, 65535), DEEP[..., 3:])


def test_sixteen_bit_grey_with_alpha_and_pgm_are_read(tmp_path: Path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP[..., :2])
    (tmp_path / "la.png").write_bytes(png(5, 7, rows, bits=16, colour=4))
    picture = read_image(tmp_path / "la.png")
    assert picture.grey and picture.bits == 16 and np.array_equal(levels(picture.rgb, 65535)[..., 1], DEEP[..., 0])
    assert picture.alpha is not None and np.array_equal(levels(picture.alpha, 65535)[..., 0], DEEP[..., 1])
    cv2.imwrite(str(tmp_path / "a.pgm"), DEEP[..., 0])
    picture = read_image(tmp_path / "a.pgm")
    assert picture.bits == 16 and np.array_equal(levels(picture.rgb, 65535)[..., 0], DEEP[..., 0])


def test_float_tiffs_within_0_and_1_are_read(tmp_path: Path):
    for name, values in (("grey.tif", DEEP[..., 0]), ("rgb.tif", DEEP[..., :3]), ("double.tif", DEEP[..., 0])):
        values = (values / 65535).astype(np.float64 if name == "double.tif" else np.float32)
        (tmp_path / name).write_bytes(float_tiff(values if values.ndim == 2 else values[..., ::-1]))
        picture = read_image(tmp_path / name)
        expected = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
        assert picture.bits == 16 and np.allclose(picture.rgb.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.png", "a.webp", "a.tif", "a.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
        with pytest.warns(UserWarning, match="several frames or pages: only the first is read"):
            red, green, _ = read_image(tmp_path / name).rgb.mean((1, 2))
        assert red > 0.7 and green < 0.1
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])  # a phone's photo with its preview
    frames[0].save(tmp_path / "single.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.mpo").rgb.shape == read_image(tmp_path / "single.gif").rgb.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["a.png", "deep.png", "a.tif", "deep.tif"])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, kind: str):
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


def _tiff16(pixels: np.ndarray, orientation: int = 1, photometric: int = 2, extra: int | None = None) -> bytes:
    """A minimal little-endian TIFF of one strip."""
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8 if channels > 1 else 16), (259, 3, 1, 1),
            (262, 3, 1, photometric), (273, 4, 1, 16), (274, 3, 1, orientation), (277, 3, 1, channels),
            (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    tags += [] if extra is None else [(338, 3, 1, extra)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 16 + len(data))
        + struct.pack("<HHHH", 16, 16, 16, 16)
        + data
        + (struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    )


def test_broken_exif_is_ignored(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*rubbish")
    assert np.array_equal(levels(read_image(tmp_path / "a.png").rgb), RGB)


# --- faults of files -----------------------------------------------------------------------------------------------


def test_paths_that_are_not_images_are_refused(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "photo.png")
    fault(tmp_path / "phto.png", "no such file", "did you mean 'photo.png'")
    fault(tmp_path / "nowhere" / "a.png", "no such file")
    fault(tmp_path, "is a folder")
    (tmp_path / "empty.png").touch()
    fault(tmp_path / "empty.png", "0 bytes")
    (tmp_path / "text.png").write_text("hello")
    fault(tmp_path / "text.png", "not an image")


def test_truncated_files_are_refused(tmp_path: Path):
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

    with warnings.catch_warnings():  # nor does the user see Pillow's own warning, which comes at half of our limit
        warnings.simplefilter("error")
        (tmp_path / "large.png").write_bytes(png(10_000, 10_000, b"0"))
        fault(tmp_path / "large.png", "truncated")
    monkeypatch.setattr(images, "PIXEL_LIMIT", 34)
    Image.fromarray(RGB).save(tmp_path / "b.png")
    fault(tmp_path / "b.png", "5 x 7 pixels")


@pytest.mark.parametrize("bits, compression", [(8, "raw"), (8, "tiff_deflate"), (16, "raw")])
def test_a_tiff_with_too_many_strips_is_refused(tmp_path: Path, bits: int, compression: str):
    tall = np.zeros((70_000, 1), np.uint16 if bits == 16 else np.uint8)
    path = tmp_path / "a.tif"
    Image.fromarray(tall).save(path, compression=compression, tiffinfo={278: 1})  # one row per strip
    fault(path, "70,000 strips", "above the limit of 65,536")
    Image.fromarray(tall[:1000]).save(path, compression=compression, tiffinfo={278: 1})
    assert read_image(path).rgb.shape == (3, 1000, 1)


@pytest.mark.parametrize("value, message", [(np.nan, "NaN"), (np.inf, "infinite"), (255.0, "scale them to 0..1")])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_float_tiffs_out_of_range_are_refused(tmp_path: Path, value: float, message: str, shape: tuple):
    values = np.zeros(shape, np.float32)
    values[1, 2] = value
    (tmp_path / "a.tif").write_bytes(float_tiff(values))
    fault(tmp_path / "a.tif", message)


def test_integers_beyond_sixteen_bits_are_refused(tmp_path: Path):
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "a.tif")
    fault(tmp_path / "a.tif", "70000", "8 or 16 bits")
