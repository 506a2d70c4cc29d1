"""The scene reader: a small network that reads objects with colour, shape and material, and depth, from a picture.

A U-Net maps a picture to colour class (background or one of eight), shape, material and normalised disparity for each
pixel, a heat map of object centres (as in CenterNet, Zhou et al. 2019) and, for each object pixel, the way to its
object's centre. `read` groups pixels by centre into objects, and an object's attributes are the classes with the
highest mean log-probability over its pixels. An object counts when at least `LEAST_PIXELS` of 64 x 64 show it: fewer
(hidden behind another one) are neither asked for nor reported. `reader.py` trains it.
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
THRESHOLD = 0.4  # least probability of a centre
OFFSET_UNIT = 16  # offsets are counted in sixteenths of the picture's side


@dataclass(frozen=True)
class Found:
    """One object read: attributes as captions name them, its share of the picture and centre (x, y) in [0, 1]."""

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
    """`objects[b]` from left to right; `instances` (B, S, S): 0 or 1 + the index in `objects[b]`; `disparity` (B, S, S)
    in [0, 1], near is bright."""

    objects: list[list[Found]]
    instances: Tensor
    disparity: Tensor


class _Block(nn.Module):
    """Residual: two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*half, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Reader(nn.Module):
    """(B, 3, S, S) in [0, 1] -> {head: (B, C, S, S)} for HEADS and "centre" (B, 1, S/2, S/2); S a multiple of 16."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)  # pixels of 2x2: nothing runs at full resolution
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
    """Reads pictures (B, 3, S, S) in [0, 1]. `device` is where the reader is; what it sees is grouped on the CPU, in
    steps too small for anything else."""
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
    """What the network's output says: see the module's docstring."""
    heat = maps["centre"].sigmoid()
    batch, _, side, _ = maps["colour"].shape
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > THRESHOLD)
    colour = maps["colour"].argmax(1)
    likely = {
        "colour": maps["colour"][:, 1:].log_softmax(1),  # an object is no background
        "shape": maps["shape"].log_softmax(1),
        "material": maps["material"].log_softmax(1),
    }
    votes = pixels(side, heat.device) + maps["offset"] * (side / OFFSET_UNIT)
    least = LEAST_PIXELS * side**2 / 64**2
    instances = torch.zeros(batch, side, side, dtype=torch.long, device=heat.device)
    objects: list[list[Found]] = []
    for b in range(batch):
        y, x = peaks[b, 0].nonzero().T
        centres = torch.stack((2 * x + 1, 2 * y + 1)).float()  # pixels (2, N); a cell's middle
        objects.append([])
        if not len(y):
            continue
        nearest = (votes[b, :, None] - centres[:, :, None, None]).square().sum(0).argmin(0)
        members = [(colour[b] > 0) & (nearest == n) for n in range(len(y))]
        kept = [m for m in members if m.sum() >= least]
        place = [[float(axis.float().mean() + 0.5) / side for axis in m.nonzero().T] for m in kept]
        for n in sorted(range(len(kept)), key=lambda n: place[n][1]):
            mine = kept[n]
            said = [int(likely[key][b][:, mine].mean(1).argmax()) for key in ("colour", "shape", "material")]
            names = tuple(COLOURS)[said[0]], SHAPES[said[1]], MATERIALS[said[2]]
            objects[b].append(Found(*names, x=place[n][1], y=place[n][0], area=float(mine.float().mean())))
            instances[b][mine] = len(objects[b])
    return Reading(objects, instances, maps["disparity"][:, 0].clamp(0, 1))


def pixels(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Pixel middles (2, S, S): x, y."""
    at = torch.arange(side, device=device) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


def load_reader(path: Path = WEIGHTS) -> Reader:
    """The trained reader that stands beside this file."""
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return reader.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def save_reader(reader: Reader, path: Path = WEIGHTS, how: dict[str, str] | None = None) -> None:
    """Writes the weights in float16, whole or not at all; `how` they were made becomes the file's metadata."""
    partial = path.with_suffix(".partial")
    save_file({name: value.half().contiguous() for name, value in reader.state_dict().items()}, partial, how)
    partial.chmod(0o644)
    partial.replace(path)
