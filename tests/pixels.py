"""Pixels, and faults of files: what the tests of pictures share."""

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


def fault(path, *words: str, call=read_image) -> None:
    with pytest.raises(UserError) as caught:
        call(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and message.count(": ") >= 2, message
    for word in words:
        assert word in message, message
