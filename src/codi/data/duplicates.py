"""Pictures that occur twice: a perceptual hash, and groups of pictures whose hashes nearly agree."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

BITS = 64
REACH = 400  # hashes to compare one with, where very many have a band in common: bounds the work
DISTANCE = 3  # bits by which the hashes of one picture differ after another JPEG quality or a small change of size


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits of what a picture looks like: its 8 x 8 lowest cosine waves at 32 x 32 grey pixels, each above their
    median or not. Compressing or scaling it changes few of them."""
    grey = picture.convert("L").resize((32, 32), Image.Resampling.BOX, reducing_gap=2)
    waves = cv2.dct(np.asarray(grey, np.float32))[:8, :8]
    middle = np.partition(waves, (31, 32), axis=None)[31:33].mean()  # the median; np.median takes longer than the rest
    return int.from_bytes(np.packbits(waves > middle).tobytes(), "big")


def near_groups(hashes: Sequence[int], distance: int = DISTANCE) -> list[list[int]]:
    """Numbers of pictures that are linked by hashes which differ in at most `distance` bits; groups of two and more."""
    values, which = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    # Cut into one band more than bits may differ, two near hashes agree in at least one whole band: only hashes with a
    # band in common are compared, of very many with one in common each with the REACH that follow it in order.
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.searchsorted(band[order], band[order], side="right")
        at = np.arange(len(order))
        for step in range(1, REACH + 1):
            at = at[at + step < ends[at]]
            if not len(at):
                break
            one, other = order[at], order[at + step]
            near = np.bitwise_count(values[one] ^ values[other]) <= distance
            for i, j in zip(one[near].tolist(), other[near].tolist(), strict=True):
                if parent[i] != parent[j]:
                    parent[root(j)] = root(i)
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(which.ravel().tolist()):
        groups.setdefault(root(value), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
