"""Large images with real weights: borders of tiles and bands are not visible."""

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
    """Return a stationary random texture (1, 3, side, side)."""
    smooth = torch.nn.functional.avg_pool2d(rand(1, 3, side + 2, side + 2) - 0.5, 3, stride=1)
    return (0.5 + 1.2 * smooth).clamp(0, 1)


def steepness(picture: Tensor, dim: int) -> Tensor:
    """Return the mean difference of neighbors across each border between pixels along `dim`."""
    return picture.diff(dim=dim).abs().transpose(dim, -1).flatten(0, -2).mean(0)


def test_tiles_and_bands_leave_no_seams(mini):
    """Neighbors across tile and band borders differ no more, relative to the untiled image, than elsewhere."""
    low = texture(SIDE)
    arguments = {"image": low, "steps": 1, "seed": 3, "colour": "none"}
    whole = mini(**arguments, tile=0, output_type="pt").images
    bands = list(mini(**arguments, tile=TILE, output_type="bands").images[0])
    tiled = torch.cat(bands, dim=2)
    assert tiled.shape == whole.shape and len(bands) > 1
    overlap = mini.tiles(low, TILE).overlap
    first = starts(SIDE, TILE, overlap)
    tile_borders = [SCALE * p for s in first for p in (s, s + TILE) if 0 < p < SIDE]
    band_borders = torch.tensor([band.shape[2] for band in bands]).cumsum(0)[:-1].tolist()
    for dim, borders in ((-1, tile_borders), (-2, tile_borders), (-2, band_borders)):
        differences, whole_differences = steepness(tiled, dim), steepness(whole, dim)
        inner = torch.ones(len(differences), dtype=torch.bool)
        inner[[b - 1 for b in borders]] = False
        share = differences / whole_differences
        at_borders, within = share[~inner], share[inner]
        assert (at_borders - within.mean()).abs().max() < 4 * within.std(), (dim, borders)


def test_vae_tiling_does_not_change_the_image(mini):
    """No tile exceeds the VAE's own size, and the image looks the same, tones included."""
    picture = torch.nn.functional.interpolate(rand(1, 3, 9, 9), (160, 160), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        plain = codec.decode(mini.vae, codec.encode(mini.vae, picture))
        sizes: list[int] = []
        hook = mini.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(max(inputs[0].shape[-2:])))
        mini.vae.enable_tiling()
        try:
            tiled = codec.decode(mini.vae, codec.encode(mini.vae, picture))
        finally:
            mini.vae.disable_tiling()
            hook.remove()
    assert len(sizes) > 1 and max(sizes) * codec.downscale(mini.vae) == mini.vae.config["sample_size"]
    assert tiled.shape == plain.shape and (tiled - plain).square().mean().sqrt() < 0.02
