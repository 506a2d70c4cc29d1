"""Pixel data, color profiles and error checks for image tests."""

import struct

import numpy as np
import pytest
import torch

from codi.data.images import read_image
from codi.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)  # odd sides, and not square
DEEP = np.random.default_rng(1).integers(0, 65536, (7, 5, 4), dtype=np.uint16)


def levels(tensor: torch.Tensor, top: int = 255) -> np.ndarray:
    return (tensor * top).round().permute(1, 2, 0).numpy().astype(int)


def gradient(height: int = 8, width: int = 64) -> torch.Tensor:
    return torch.linspace(0, 1, width).expand(3, height, width).clone()


def fault(path, *fragments: str, call=read_image) -> None:
    with pytest.raises(UserError) as caught:
        call(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and message.count(": ") >= 2, message
    for fragment in fragments:
        assert fragment in message, message


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc(gamma: float, primaries=None) -> bytes:
    """Return a minimal ICC v2 profile: RGB with these D50 XYZ columns, or gray if None."""
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
SWAPPED = icc(2.2, (SRGB_COLUMNS[1], SRGB_COLUMNS[0], SRGB_COLUMNS[2]))  # red and green swapped
