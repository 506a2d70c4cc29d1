"""Tiling without seams for any size, and color correction that keeps detail."""

import math

import pytest
import torch
import torch.nn.functional as F

from codi.errors import UserError
from codi.sampling.colour import back_projected, low_frequencies, match_bands, match_colour, wavelet_levels
from codi.sampling.tiles import Tiles, noise_rows
from codi.sampling.tiling import covered_size, cut, feather, join, mirror_pad, starts, upscaled_bands


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def enlarge(low: torch.Tensor, scale: int = 4) -> torch.Tensor:
    return low.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def upscale_tiled(run, low: torch.Tensor, scale: int = 4, *options: int, **keywords) -> torch.Tensor:
    return join(upscaled_bands(run, low, scale, *options, **keywords), low.shape[-2] * scale)


# --- tiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width", [(64, 64), (65, 63), (1, 1), (1, 200), (5, 17), (31, 97), (16, 16), (33, 16), (129, 70)]
)
@pytest.mark.parametrize("tile, overlap, align", [(16, 4, 1), (16, 9, 2), (24, 8, 4), (16, 0, 1)])
def test_an_exact_upscaler_gives_the_untiled_result(height: int, width: int, tile: int, overlap: int, align: int):
    low = noise(1, 3, height, width)
    positions = []

    def run(tiles, corners):
        assert tiles.shape == (len(corners), 3, tile, tile) and 1 <= len(corners) <= 3
        assert all(y % align == 0 and x % align == 0 for y, x in corners)
        positions.extend(corners)
        return enlarge(tiles)

    out = upscale_tiled(run, low, scale=4, tile=tile, overlap=overlap, batch=3, align=align)
    assert out.shape == (1, 3, 4 * height, 4 * width) and out.dtype == torch.float32
    assert torch.allclose(out, enlarge(low), rtol=0, atol=1e-6)
    assert len(positions) == len(set(positions))


@pytest.mark.parametrize(
    "side, tile, overlap, align", [(64, 16, 4, 1), (101, 16, 15, 1), (96, 32, 8, 8), (16, 16, 4, 2)]
)
def test_weights_are_a_smooth_partition_of_unity(side: int, tile: int, overlap: int, align: int):
    scale = 4
    first = starts(covered_size(side, side, tile, align)[0], tile, overlap, align)
    weights = feather(first, tile, scale)
    total = torch.zeros((first[-1] + tile) * scale)
    for start, weight in zip(first, weights, strict=True):
        total[start * scale : (start + tile) * scale] += weight
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6) and (weights > 0).all()
    if len(first) > 1:
        assert weights[0, 0] == 1 and weights[-1, -1] == 1  # no fading at the image's border
        assert min(tile - (b - a) for a, b in zip(first, first[1:], strict=False)) >= overlap
        ramp = math.pi / 2 / (overlap * scale)
        assert weights.diff(dim=1).abs().max() <= 1.5 * ramp  # 1.5: three tiles may overlap


def test_tiles_that_disagree_leave_no_seam():
    scale, tile, overlap = 4, 16, 8
    constants = noise(1000)

    def run(tiles, corners):
        value = constants[[y * 31 + x for y, x in corners]]
        return value[:, None, None, None].expand(-1, 3, tile * scale, tile * scale)

    out = upscale_tiled(run, noise(1, 3, 40, 27), scale, tile, overlap)
    ramp = math.pi / 2 / (overlap * scale)
    assert out.max() - out.min() > 0.3
    assert out.diff(dim=-1).abs().max() <= ramp and out.diff(dim=-2).abs().max() <= ramp
    assert constants.min() - 1e-6 <= out.min() and out.max() <= constants.max() + 1e-6


def test_tiles_share_one_noise_field():
    """Overlapping tiles start from the same noise, so blending their results equals one pass."""
    height, width, tile, align, scale, latent = 37, 52, 16, 2, 4, 8
    size = covered_size(height, width, tile, align)
    field = noise(1, 2, size[0] * scale // latent, size[1] * scale // latent)

    def run(tiles, corners):
        own = cut(field, corners, tile, scale / latent)
        assert own.shape == (len(corners), 2, tile * scale // latent, tile * scale // latent)
        return enlarge(own, latent)

    out = upscale_tiled(run, noise(1, 3, height, width), scale, tile, 4, align=align)
    assert torch.allclose(out, enlarge(field, latent)[..., : height * scale, : width * scale], atol=1e-6)
    with pytest.raises(UserError, match="multiples of 2"):
        cut(field, [(1, 0)], tile, scale / latent)


def test_borders_are_mirrored():
    row = torch.arange(3.0).view(1, 1, 1, 3)
    assert mirror_pad(row, (1, 8)).flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert mirror_pad(row[..., :1], (2, 3)).eq(0).all()
    assert mirror_pad(row, (1, 3)) is row


@pytest.mark.parametrize("height, width", [(3, 200), (200, 3), (1, 97), (97, 1), (2, 98), (98, 2), (17, 200)])
def test_tiles_of_a_thin_image_are_thin(height: int, width: int):
    """Little more than the image is computed, and the result equals the untiled one."""
    low, tiles = noise(1, 3, height, width), Tiles(64, 4, 8)
    computed = 0

    def upscale_part(noise: torch.Tensor, part: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        nonlocal computed
        computed += part[:, 0].numel()
        assert noise.shape[-2:] == (part.shape[-2] // 2, part.shape[-1] // 2) and len(prompts) == len(part)
        return enlarge(part)

    out = join(tiles.bands(upscale_part, low, "", 0, 4, 2), 4 * height)
    assert torch.allclose(out, enlarge(low), atol=1e-6)
    assert computed <= 1.6 * (height + 1) * (width + 1)
    assert tiles.shape(low) == (min(64, -(-height // 2) * 2), min(64, -(-width // 2) * 2))


def test_progress_counts_tiles_and_scale_may_be_one():
    progress = []
    low = noise(1, 1, 20, 20)
    out = upscale_tiled(
        lambda t, _: t, low, 1, 16, 4, batch=3, progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(2, 4), (4, 4)] and torch.allclose(out, low, atol=1e-6)


def test_tiles_may_be_computed_in_half_precision():
    low = noise(1, 3, 20, 20)
    out = upscale_tiled(lambda t, _: enlarge(t).bfloat16(), low, 4, 16, 4)
    assert out.dtype == torch.float32 and torch.allclose(out, enlarge(low), atol=0.01)


@pytest.mark.parametrize(
    "options", [{"tile": 0}, {"batch": 0}, {"overlap": 16}, {"overlap": -1}, {"overlap": 14, "align": 4}, {"align": 0}]
)
def test_inconsistent_tile_settings_are_refused(options: dict):
    with pytest.raises(UserError, match=": "):
        upscale_tiled(lambda t, _: enlarge(t), noise(1, 3, 20, 20), **{"tile": 16, "overlap": 4, **options})


def test_a_result_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="scale 4"):
        upscale_tiled(lambda t, _: t, noise(1, 3, 20, 20), 4, 16, 4)


# --- color ---------------------------------------------------------------------------------------------------------


def scene(side: int = 64) -> torch.Tensor:
    """Return smooth colors, well within [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
    return torch.stack([0.5 + 0.2 * x.sin(), 0.5 + 0.2 * y.cos(), 0.5 + 0.1 * (x + y).sin()])[None]


def texture(side: int = 64) -> torch.Tensor:
    """Return a checkerboard of one-pixel squares: the highest frequency there is."""
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    return (board * 0.1 - 0.05).expand(1, 3, side, side)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
@pytest.mark.parametrize("side", [16, 64, 129])
def test_a_color_cast_is_removed(method: str, side: int):
    cast = torch.tensor([0.1, -0.08, 0.05]).view(1, 3, 1, 1)
    assert torch.allclose(match_colour(scene(side) + cast, scene(side), method), scene(side), atol=1e-5)


def test_wavelet_keeps_the_outputs_detail_and_not_the_references():
    inner = (..., slice(8, -8), slice(8, -8))  # the pattern has a step where it is mirrored at the border
    out = match_colour(scene() + 0.1 + texture(), scene())
    assert torch.allclose(out, scene() + texture(), atol=0.02)
    assert torch.allclose(out[inner], (scene() + texture())[inner], atol=2e-3)
    assert torch.allclose(match_colour(scene() + 0.1, scene() + texture())[inner], scene()[inner], atol=2e-3)


def test_wavelet_corrects_a_local_color_cast_and_adain_does_not():
    cast = torch.zeros(1, 3, 128, 128)
    cast[..., 64:] = 0.1
    inner = (..., slice(None), slice(110, 128))
    assert (match_colour(scene(128) + cast, scene(128)) - scene(128))[inner].abs().max() < 0.01
    assert (match_colour(scene(128) + cast, scene(128), "adain") - scene(128))[inner].abs().max() > 0.03


def test_matching_colors_are_unchanged():
    detail = scene() + texture()
    for method in ("wavelet", "adain", "none"):
        assert torch.allclose(match_colour(detail, detail, method), detail, atol=1e-6)
    once = match_colour(noise(1, 3, 64, 64) * 0.2 + 0.6, scene())
    twice = match_colour(once, scene())
    assert (twice - once).abs().mean() < 0.1 * (once - (noise(1, 3, 64, 64) * 0.2 + 0.6)).abs().mean()


def test_the_blur_of_an_enlarged_input_does_not_blur_the_output():
    sharp = (scene(128) + 0.2 * (noise(1, 3, 32, 32).repeat_interleave(4, -1).repeat_interleave(4, -2) - 0.5)).clamp(
        0, 1
    )
    small = torch.nn.functional.interpolate(sharp, scale_factor=0.25, mode="bicubic", antialias=True)
    out = match_colour(sharp + 0.05, small)  # match_colour enlarges it to size
    gradient = out.diff(dim=-1).abs().mean() / sharp.diff(dim=-1).abs().mean()
    assert gradient == pytest.approx(1, abs=0.03)
    assert (out - sharp).abs().mean() < 0.01


def test_the_low_band_is_below_the_resolution_of_the_small_image():
    assert [wavelet_levels(s, 2 * s) for s in (4, 16, 32, 64, 128, 512, 4096)] == [1, 2, 3, 4, 5, 5, 5]
    wave = torch.sin(torch.arange(256) * 2 * math.pi / 8).expand(1, 1, 256, 256)  # the shortest period at x4
    assert low_frequencies(wave, wavelet_levels(256, 256))[..., 64:192].abs().max() < 1e-3
    flat = torch.full((1, 1, 5, 7), 0.3)
    assert torch.allclose(low_frequencies(flat, 5), flat)


def test_flat_images_stay_within_range():
    flat = torch.full((1, 3, 16, 16), 0.2)
    for method in ("wavelet", "adain"):
        assert torch.allclose(match_colour(flat, flat + 0.3, method), flat + 0.3, atol=1e-5)
        assert match_colour(noise(1, 3, 16, 16), flat * 0, method).aminmax().min >= 0
    assert match_colour(flat, flat + 0.3, "none") is flat


def test_back_projection_makes_the_result_agree_with_its_input():
    """Detail beyond the small image's resolution is kept, and a result that agrees already is unchanged."""
    small = low_frequencies(noise(1, 3, 20, 24), 1)
    enlarged = F.interpolate(small, scale_factor=4, mode="bicubic")
    detailed = enlarged + 0.1 + texture(96)[..., :80, :]

    def distance(picture):
        return (F.interpolate(picture, scale_factor=0.25, mode="bicubic", antialias=True) - small).abs().mean()

    out = match_colour(detailed, enlarged, "back-projection")
    assert distance(out) < 0.2 * distance(detailed) and distance(out) < 0.5 * distance(match_colour(detailed, enlarged))
    inner = (..., slice(8, -8), slice(8, -8))
    high = out - F.interpolate(F.interpolate(out, scale_factor=0.25, mode="bicubic", antialias=True), scale_factor=4)
    assert high[inner].std() > 0.8 * texture(96).std()
    flat = torch.full((1, 3, 16, 16), 0.4)
    assert torch.allclose(match_colour(flat, flat, "back-projection"), flat, atol=1e-6)
    assert torch.allclose(match_colour(flat - 0.2, flat, "back-projection"), flat, atol=1e-6)


@pytest.mark.parametrize("method", ["wavelet", "back-projection", "none"])
@pytest.mark.parametrize("rows", [[200], [1] * 200, [7, 93, 40, 60], [90, 100, 10]])
def test_bands_are_corrected_like_the_whole_image(method: str, rows: list[int]):
    picture, reference = noise(1, 3, 200, 150), noise(1, 3, 200, 150, seed=1)
    bands = match_bands(iter(picture.split(rows, dim=2)), lambda a, b: reference[:, :, a:b], 200, method)
    torch.testing.assert_close(join(bands, 200), match_colour(picture, reference, method), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(37, 1), (1, 37), (37, 2), (2, 37), (1, 1)])
@pytest.mark.parametrize("method", ["wavelet", "back-projection", "adain"])
def test_colors_of_thin_images_are_kept(method: str, shape: tuple[int, int]):
    low = torch.stack([torch.linspace(0.3, 0.7, max(shape)), torch.linspace(0.6, 0.4, max(shape))])[[0, 1, 0]]
    low = low[None, :, :, None] if shape[1] <= 2 else low[None, :, None, :]
    low = low.expand(1, 3, *shape) if max(shape) > 1 else low
    enlarged = F.interpolate(low, scale_factor=4, mode="bicubic")
    for reference in (enlarged, low):
        out = match_colour(enlarged + 0.1, reference, method)
        assert (F.avg_pool2d(out, 4) - low).abs().max() < 0.03


@pytest.mark.parametrize("method", ["wavelet", "back-projection"])
def test_grain_is_removed_where_the_input_is_flat_and_texture_stays(method: str):
    enlarged, half = scene(128) * 0.05 + 0.5, (..., slice(16, -16), slice(80, 120))
    enlarged[..., :64] += 0.4 * F.interpolate(
        noise(1, 3, 32, 16) - 0.5, scale_factor=4, mode="bicubic"
    )  # a textured half
    grain = (
        F.interpolate(noise(1, 3, 32, 32) - 0.5, scale_factor=4, mode="bicubic") * 4 / 255
    )  # 1 level, in blocks of a latent cell
    out = match_colour(enlarged + grain, enlarged, method)
    added = out - enlarged
    plain = {"wavelet": lambda x: x - low_frequencies(x, wavelet_levels(128, 128)), "back-projection": unresolved}
    before = plain[method](grain)
    assert added[half].square().mean() < 0.02 * before[half].square().mean()
    busy = (..., slice(16, -16), slice(8, 48))
    assert added[busy].square().mean() > 0.97 * before[busy].square().mean()
    strong = (
        match_colour(enlarged + texture(128), enlarged, method) - enlarged
    )  # stronger than any grain, so it is intended
    assert strong[half].square().mean() > 0.94 * texture(128)[half].square().mean()


def unresolved(image: torch.Tensor) -> torch.Tensor:
    """Return the part of (B, C, H, W) that an image of a quarter of the size cannot represent."""
    return back_projected(image, torch.zeros_like(image), 4)


def test_rows_of_a_noise_field_can_be_drawn_separately():
    whole = noise_rows((4, 50), 7, 0, 200, fields=2)
    assert whole.shape == (1, 8, 200, 50) and abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    for first, count in ((0, 1), (15, 2), (16, 16), (33, 100)):
        assert torch.equal(noise_rows((4, 50), 7, first, count, fields=2), whole[:, :, first : first + count])
    assert not torch.equal(noise_rows((4, 50), 8, 0, 16), noise_rows((4, 50), 7, 0, 16))


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="did you mean 'wavelet'"):
        match_colour(scene(), scene(), "wavlet")
