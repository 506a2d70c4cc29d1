"""The scene reader: a small network that detects objects with color, shape and material, and depth, in an image.

A U-Net maps an image to color class (background or one of eight), shape, material and normalized disparity for each
pixel, a heat map of object centers (as in CenterNet, Zhou et al. 2019) and, for each object pixel, the offset to its
object's center. `read` groups pixels by center into objects, and an object's attributes are the classes with the
highest mean log-probability over its pixels. An object counts if it has at least `LEAST_PIXELS` visible pixels of
64 x 64: smaller ones (hidden behind another) are neither expected nor reported. `reader.py` trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codi.data.scenes import COLOURS, MATERIALS, SHAPES

WEIGHTS = Path(__file__).with_name("reader.safetensors")
HEADS = {"colour": 1 + len(COLOURS), "shape": len(SHAPES), "material": len(MATERIALS), "offset": 2, "disparity": 1}
LEAST_PIXELS = 12  # of 64 x 64
THRESHOLD = 0.4  # minimum probability of a center
OFFSET_UNIT = 16  # offsets are in sixteenths of the image's side


@dataclass(frozen=True)
class DetectedObject:
    """One detected object: attributes as captions name them, share of the image's area and center (x, y) in [0, 1]."""

    colour: str
    shape: str
    material: str
    x: float
    y: float
    area: float

    @property
    def attributes(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.material


@dataclass
class Reading:
    """Detections in a batch: `objects[b]` from left to right; `instances` (B, S, S), 0 or 1 + the index in
    `objects[b]`; `disparity` (B, S, S) in [0, 1], near is bright."""

    objects: list[list[DetectedObject]]
    instances: Tensor
    disparity: Tensor


class _Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*half, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Reader(nn.Module):
    """The network: (B, 3, S, S) in [0, 1] to {head: (B, C, S, S)} for HEADS and "centre" (B, 1, S/2, S/2); S is a
    multiple of 16."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)  # 2x2 pixels unshuffled: nothing runs at full resolution
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.first = _Block(widths[0])
        for a, b in zip(widths, widths[1:], strict=False):
            self.down.append(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), _Block(b)))
            self.up.append(nn.ModuleList([nn.Conv2d(b, a, 1), _Block(a)]))
        self.norm = nn.GroupNorm(8, widths[0])
        self.heads = nn.Conv2d(widths[0], 4 * sum(HEADS.values()) + 1, 1)
        nn.init.zeros_(self.heads.weight)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.first(self.stem(F.pixel_unshuffle(image * 2 - 1, 2)))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for (narrow, block), skip in zip(reversed(list(self.up)), reversed(skips), strict=True):  # type: ignore[misc]
            x = block(skip + F.interpolate(narrow(x), scale_factor=2, mode="bilinear"))
        out = self.heads(F.silu(self.norm(x)))
        maps = F.pixel_shuffle(out[:, 1:], 2).split(list(HEADS.values()), 1)
        return {"centre": out[:, :1], **dict(zip(HEADS, maps, strict=True))}


@torch.no_grad()
def read(reader: Reader, images: Tensor, batch: int = 50, device: str = "cpu") -> Reading:
    """Read images (B, 3, S, S) in [0, 1]. `device` is the reader's; grouping runs on the CPU, as its steps are too
    small for a GPU."""
    parts = []
    for part in images.split(batch):
        maps = reader(part.to(device, memory_format=torch.channels_last))
        parts.append(decode({name: values.cpu() for name, values in maps.items()}))
    return Reading(
        [objects for part in parts for objects in part.objects],
        torch.cat([part.instances for part in parts]),
        torch.cat([part.disparity for part in parts]),
    )


def decode(maps: dict[str, Tensor]) -> Reading:
    """Return the objects and disparity of the network's output, as the module's docstring explains."""
    heat = maps["centre"].sigmoid()
    batch, _, side, _ = maps["colour"].shape
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > THRESHOLD)
    color_class = maps["colour"].argmax(1)
    log_probabilities = {
        "colour": maps["colour"][:, 1:].log_softmax(1),  # an object is never background
        "shape": maps["shape"].log_softmax(1),
        "material": maps["material"].log_softmax(1),
    }
    votes = pixels(side, heat.device) + maps["offset"] * (side / OFFSET_UNIT)
    min_pixels = LEAST_PIXELS * side**2 / 64**2
    instances = torch.zeros(batch, side, side, dtype=torch.long, device=heat.device)
    objects: list[list[DetectedObject]] = []
    for b in range(batch):
        y, x = peaks[b, 0].nonzero().T
        centers = torch.stack((2 * x + 1, 2 * y + 1)).float()  # pixels (2, N); the center of a cell
        objects.append([])
        if not len(y):
            continue
        nearest = (votes[b, :, None] - centers[:, :, None, None]).square().sum(0).argmin(0)
        members = [(color_class[b] > 0) & (nearest == n) for n in range(len(y))]
        masks = [m for m in members if m.sum() >= min_pixels]
        centroids = [[float(axis.float().mean() + 0.5) / side for axis in m.nonzero().T] for m in masks]
        for n in sorted(range(len(masks)), key=lambda n: centroids[n][1]):
            mask = masks[n]
            classes = [
                int(log_probabilities[key][b][:, mask].mean(1).argmax()) for key in ("colour", "shape", "material")
            ]
            names = tuple(COLOURS)[classes[0]], SHAPES[classes[1]], MATERIALS[classes[2]]
            objects[b].append(
                DetectedObject(*names, x=centroids[n][1], y=centroids[n][0], area=float(mask.float().mean()))
            )
            instances[b][mask] = len(objects[b])
    return Reading(objects, instances, maps["disparity"][:, 0].clamp(0, 1))


def pixels(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Return pixel centers (x, y) as (2, S, S)."""
    at = torch.arange(side, device=device) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


def load_reader(path: Path = WEIGHTS) -> Reader:
    """Return the trained reader, by default the one next to this file."""
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return reader.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def save_reader(reader: Reader, path: Path = WEIGHTS, how: dict[str, str] | None = None) -> None:
    """Write the weights in float16, atomically; `how` they were trained becomes the file's metadata."""
    partial = path.with_suffix(".partial")
    save_file({name: value.half().contiguous() for name, value in reader.state_dict().items()}, partial, how)
    partial.chmod(0o644)
    partial.replace(path)
