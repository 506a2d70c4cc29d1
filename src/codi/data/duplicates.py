"""Detection of near-duplicate images: a perceptual hash, and groups of images with similar hashes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

BITS = 64
REACH = 400  # most hashes to compare one with, if very many share a band: bounds the work
DISTANCE = 3  # largest Hamming distance of duplicates with another JPEG quality or slightly another size


def perceptual_hash(picture: Image.Image) -> int:
    """Return a hash of 64 bits: for each of the 8 x 8 lowest DCT coefficients of the image, in grey at 32 x 32 pixels,
    whether it exceeds their median. Compressing or scaling the image changes few bits."""
    grey = picture.convert("L").resize((32, 32), Image.Resampling.BOX, reducing_gap=2)
    coefficients = cv2.dct(np.asarray(grey, np.float32))[:8, :8]
    median = np.partition(coefficients, (31, 32), axis=None)[31:33].mean()  # np.median is much slower
    return int.from_bytes(np.packbits(coefficients > median).tobytes(), "big")


def near_groups(hashes: Sequence[int], distance: int = DISTANCE) -> list[list[int]]:
    """Return groups of indices whose hashes are connected by steps of at most `distance` bits, of two or more each."""
    values, inverse = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    # Of `distance` + 1 bands of bits, two near hashes agree in at least one. So only hashes with a common band are
    # compared; if very many share one, each is compared with the REACH hashes that follow it in order.
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.searchsorted(band[order], band[order], side="right")
        first = np.arange(len(order))
        for step in range(1, REACH + 1):
            first = first[first + step < ends[first]]
            if not len(first):
                break
            one, other = order[first], order[first + step]
            near = np.bitwise_count(values[one] ^ values[other]) <= distance
            for i, j in zip(one[near].tolist(), other[near].tolist(), strict=True):
                if parent[i] != parent[j]:
                    parent[root(j)] = root(i)
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(inverse.ravel().tolist()):
        groups.setdefault(root(value), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
