"""A small network that reads scenes: which pixels belong to an object of which colour. Trained on exact renders.

It judges generated pictures, so it sees blur, noise and JPEG-like softness in training, and its own accuracy on
held-out renders is reported beside every figure that it gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codi.data.raycast import render
from codi.data.scenes import COLOURS, sample_scene

CLASSES = ("background", *COLOURS)
LEAST_AREA = 0.0075  # share of the picture; the smallest object of a scene covers about 0.019


class Reader(nn.Module):
    """(B, 3, H, W) in [0, 1] -> logits (B, 9, H, W): background or one of the eight colours, per pixel."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for dilation in (1, 2, 4, 8, 1):
            layers += [
                nn.GroupNorm(4, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            ]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(width, len(CLASSES), 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image * 2 - 1)


def labelled(split: str, indices: range, size: int, count: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Renders (B, 3, S, S), their pixel classes (B, S, S), and each scene's first object's colour."""
    scenes = [sample_scene(0, split, i, count) for i in indices]
    out = render(scenes, size)
    names = list(COLOURS)
    table = torch.zeros(len(scenes), 5, dtype=torch.long)
    for b, scene in enumerate(scenes):
        for k, solid in enumerate(scene.solids):
            table[b, k + 1] = 1 + names.index(solid.colour)
    classes = table.gather(1, out.mask.long().flatten(1)).view_as(out.mask)
    return out.image.float() / 255, classes, [s.solids[0].colour for s in scenes]


def train_reader(size: int = 64, scenes: int = 4_000, epochs: int = 3, batch: int = 16) -> Reader:
    """A reader trained from scratch; about two minutes on one core at the defaults."""
    torch.manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    steps = epochs * scenes // batch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    images, classes, _ = labelled("train", range(scenes), size)
    for _ in range(steps):
        pick = torch.randint(scenes, (batch,))
        x = images[pick]
        if torch.rand(()) < 0.5:  # as soft as a codec's or a sampler's output
            factor = float(torch.empty(()).uniform_(0.4, 1.0))
            x = F.interpolate(F.interpolate(x, scale_factor=factor, mode="area"), x.shape[-2:], mode="bilinear")
        x = (x + torch.randn_like(x) * torch.rand(batch, 1, 1, 1) * 0.05).clamp(0, 1)
        loss = F.cross_entropy(reader(x), classes[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return reader.eval()


@torch.no_grad()
def dominant_colour(reader: Reader, images: Tensor) -> list[str | None]:
    """For each picture the colour that covers most object pixels; None where no object is large enough to be there."""
    answers: list[str | None] = []
    for part in images.split(32):
        classes = reader(part).argmax(1)
        for picture in classes:
            areas = torch.bincount(picture.flatten(), minlength=len(CLASSES))[1:].float() / picture.numel()
            answers.append(CLASSES[1 + int(areas.argmax())] if areas.max() >= LEAST_AREA else None)
    return answers
