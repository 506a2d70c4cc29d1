"""Large pictures by real weights: no border of a tile, nor of a band, can be told from what lies within."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codi.models import codec
from codi.sampling.pipeline import CoDiPipeline
from codi.sampling.tiling import starts
from tiny import rand

SIDE, TILE, SCALE = 96, 64, 4


@pytest.fixture(scope="module")
def mini() -> CoDiPipeline:
    pipe = CoDiPipeline.from_pretrained("mini", task="upscale")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def texture(side: int) -> Tensor:
    """(1, 3, side, side): the same at any place, but for chance."""
    smooth = torch.nn.functional.avg_pool2d(rand(1, 3, side + 2, side + 2) - 0.5, 3, stride=1)
    return (0.5 + 1.2 * smooth).clamp(0, 1)


def steepness(picture: Tensor, dim: int) -> Tensor:
    """Mean difference of neighbours across each border between pixels along `dim`."""
    return picture.diff(dim=dim).abs().transpose(dim, -1).flatten(0, -2).mean(0)


def test_tiles_and_bands_leave_no_seams(mini):
    """Where tiles begin or end, and where one band of rows follows another, neighbours differ as they do elsewhere,
    compared with the same pixels of the picture made in one piece, which has no borders."""
    low = texture(SIDE)
    asked = {"image": low, "steps": 1, "seed": 3, "colour": "none"}
    whole = mini(**asked, tile=0, output_type="pt").images
    bands = list(mini(**asked, tile=TILE, output_type="bands").images[0])
    tiled = torch.cat(bands, dim=2)
    assert tiled.shape == whole.shape and len(bands) > 1
    overlap = mini.tiles(low, TILE).overlap
    first = starts(SIDE, TILE, overlap)
    tile_borders = [SCALE * p for s in first for p in (s, s + TILE) if 0 < p < SIDE]
    band_borders = torch.tensor([band.shape[2] for band in bands]).cumsum(0)[:-1].tolist()
    for dim, borders in ((-1, tile_borders), (-2, tile_borders), (-2, band_borders)):
        made, control = steepness(tiled, dim), steepness(whole, dim)
        inner = torch.ones(len(made), dtype=torch.bool)
        inner[[b - 1 for b in borders]] = False
        share = made / control
        at, within = share[~inner], share[inner]
        assert (at - within.mean()).abs().max() < 4 * within.std(), (dim, borders)


def test_a_vae_may_work_in_tiles(mini):
    """As anywhere in diffusers: nothing larger than its own size goes through it, and the picture is the same to the
    eye, tones included."""
    picture = torch.nn.functional.interpolate(rand(1, 3, 9, 9), (160, 160), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        plain = codec.decode(mini.vae, codec.encode(mini.vae, picture))
        seen: list[int] = []
        watch = mini.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(max(given[0].shape[-2:])))
        mini.vae.enable_tiling()
        try:
            tiled = codec.decode(mini.vae, codec.encode(mini.vae, picture))
        finally:
            mini.vae.disable_tiling()
            watch.remove()
    assert len(seen) > 1 and max(seen) * codec.downscale(mini.vae) == mini.vae.config["sample_size"]
    assert tiled.shape == plain.shape and (tiled - plain).square().mean().sqrt() < 0.02
