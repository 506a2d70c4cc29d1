"""The upscaling task and its degradations: seeded, sized, and different for every sample."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special

from codi.errors import UserError
from codi.tasks import get_task
from codi.tasks.degradations import (
    RealWorld,
    Stage,
    _resizing_matrix,
    bicubic,
    blur_kernel,
    resize,
    second_order,
    sinc_kernel,
)
from codi.tasks.upscale import Upscale


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 4, height: int = 64, width: int = 64) -> torch.Tensor:
    """Return smooth colours with some texture."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 6, width), indexing="ij")
    phase = torch.rand(count, 3, 1, 1, generator=generator(7)) * 6
    return (0.5 + 0.3 * (x + phase).sin() * (y - phase).cos() + 0.1 * (9 * x).sin()).clamp(0, 1)


def batch(image: torch.Tensor) -> Any:
    return SimpleNamespace(image=image, text=[""] * len(image), extras={}, index=list(range(len(image))))


def obedience(task: Upscale, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    (figures,) = task.obedience(output, given, batch(output)).values()
    return figures


@pytest.mark.parametrize("sides", [(148, 37), (37, 148), (37, 1), (1, 37), (2, 37), (37, 2), (1, 1), (5, 1), (4, 2)])
@pytest.mark.parametrize("across", [(1, 1), (4, 1), (1, 4), (8, 2), (2, 8), (2, 1), (1, 2)])
def test_resizing_is_separable_for_any_memory_format(sides: tuple[int, int], across: tuple[int, int]):
    """Resizing is linear and separable, also for images one pixel wide, where torch repeats a row."""

    def matrix(old: int, new: int) -> torch.Tensor:
        return resize(torch.eye(old, dtype=torch.float64)[None, None].repeat(1, 1, 1, 2), (new, 2 * old))[0, 0, :, :old]

    picture = torch.rand(1, 3, sides[0], across[0], generator=generator(), dtype=torch.float64)
    rows, columns = matrix(sides[0], sides[1]), matrix(across[0], across[1])
    for image, expected in ((picture, rows @ picture @ columns.T), (picture.mT, columns @ picture.mT @ rows.T)):
        for copy in (image.contiguous(), image.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(resize(copy, (expected.shape[-2], expected.shape[-1])), expected)


@pytest.mark.parametrize("old", [(12, 20), (9, 7), (1, 16), (16, 1), (1, 1), (2, 5)])
@pytest.mark.parametrize("new", [(48, 80), (3, 5), (5, 30), (12, 20), (1, 16), (16, 1), (1, 1)])
def test_exported_resizing_matrices_resize_as_torch_does(monkeypatch, old: tuple[int, int], new: tuple[int, int]):
    """ONNX has no antialiased bicubic resizing.

    The reference is torch's along one axis after the other, as a row: to one column it repeats a row.
    """

    def along_rows(image: torch.Tensor, length: int) -> torch.Tensor:
        size = (image.shape[-2], length)
        if image.shape[-1] == 1:  # all columns are copies of the one
            return image.expand(-1, -1, *size)
        rows = [F.interpolate(image[:, :, i : i + 1], (1, length), mode="bicubic", antialias=True)
                for i in range(image.shape[-2])]  # fmt: skip
        return torch.cat(rows, dim=2)

    image = torch.rand(2, 3, *old, generator=generator())
    expected = along_rows(along_rows(image, new[1]).mT, new[0]).mT
    if 1 not in new:
        torch.testing.assert_close(
            F.interpolate(image, new, mode="bicubic", antialias=True), expected, rtol=0, atol=1e-6
        )
    rows, columns = (_resizing_matrix(*lengths) for lengths in zip(old, new, strict=True))
    torch.testing.assert_close(rows @ image @ columns.T, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(resize(image, new), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch.testing.assert_close(resize(image, new), expected, rtol=0, atol=1e-6)


CLEAN = Stage(0.0, (1.0, 1.0), (0, 0, 1), (1, 1), (0.0, 0.0), (0.0, 0.0), jpeg_quality=(100, 100))


# --- degradations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, scale", [(64, 64, 4), (96, 32, 4), (36, 60, 2), (8, 8, 4), (24, 24, 3)])
def test_degraded_images_have_the_exact_size_range_and_eight_bit_levels(height: int, width: int, scale: int):
    low = second_order(pictures(6, height, width), scale, generator())
    assert low.shape == (6, 3, height // scale, width // scale) and low.dtype == torch.float32
    assert low.min() >= 0 and low.max() <= 1
    assert torch.allclose(low * 255, (low * 255).round(), atol=1e-4)


def test_degradations_depend_only_on_the_generator():
    image = pictures()
    assert torch.equal(second_order(image, 4, generator(3)), second_order(image, 4, generator(3)))
    assert not torch.equal(second_order(image, 4, generator(3)), second_order(image, 4, generator(4)))
    shared = generator(3)
    assert not torch.equal(second_order(image, 4, shared), second_order(image, 4, shared))  # the generator has moved on
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(second_order(image, 4, generator(3)), second_order(image, 4, generator(3)))


def test_samples_differ_and_do_not_depend_on_their_neighbors():
    image = pictures(1).expand(5, -1, -1, -1)
    low = second_order(image, 4, generator())
    assert all(not torch.equal(low[i], low[j]) for i in range(5) for j in range(i))
    assert torch.equal(second_order(image[:2], 4, generator()), low[:2])
    changed = torch.cat([1 - image[:4], image[4:]])
    assert torch.equal(second_order(changed, 4, generator())[4], low[4])


def test_the_input_is_not_changed():
    image = pictures()
    before = image.clone()
    second_order(image, 4, generator())
    assert torch.equal(image, before)


def test_degraded_images_are_worse_than_bicubic_but_recognizable():
    image = pictures(32)
    clean = bicubic(image, 4)
    low = second_order(image, 4, generator())
    error = (low - clean).square().mean((1, 2, 3))
    assert error.min() > 1e-5 and error.median() > 2e-4
    assert ((low.mean((2, 3)) - clean.mean((2, 3))).abs() < 0.15).all()  # colours keep their place: red stays red
    assert error.mean() < clean.var()


def test_without_degradations_only_the_resize_remains():
    settings = RealWorld(first=CLEAN, second=CLEAN, final_sinc_probability=0)
    smooth = torch.nn.functional.interpolate(pictures(8, 6, 6), 64, mode="bicubic").clamp(0, 1)
    error = second_order(smooth, 4, generator(), settings) - bicubic(smooth, 4)
    assert error.abs().mean() < 0.025  # JPEG halves the chroma, and its resizes do not antialias


@pytest.mark.parametrize("gaussian, grey", [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_noise_has_the_configured_kind_and_strength(gaussian: float, grey: float):
    noisy = dataclasses.replace(
        CLEAN, gaussian_sigma=(20, 20), poisson_scale=(1, 1), gaussian_probability=gaussian, grey_probability=grey
    )
    settings = RealWorld(first=CLEAN, second=noisy, final_sinc_probability=0)
    flat = torch.full((2, 3, 256, 256), 0.5)
    flat[:, :, :, ::2] = 0.25  # 2 levels: 2 photons, hence strong Poisson noise
    noise = second_order(flat, 1, generator(), settings) - flat
    colour = (noise - noise.mean(1, keepdim=True)).std()
    assert colour < 0.005 if grey else colour > 0.015  # JPEG halves the chroma, so most of the colour goes
    if grey and gaussian:
        assert noise.std() == pytest.approx(20 / 255, rel=0.03)
    if not gaussian:
        dark, light = noise[..., ::2].std(), noise[..., 1::2].std()
        assert light > 1.1 * dark > 0.15  # the more light, the more noise


def test_blur_kernels_have_their_closed_form():
    gaussian = blur_kernel(21, 2.0, 2.0)
    axis = np.arange(21) - 10
    assert gaussian.sum() == pytest.approx(1, abs=1e-6) and np.allclose(gaussian, gaussian.T)
    assert (gaussian.sum(0) * axis**2).sum() == pytest.approx(4.0, rel=0.01)  # the variance
    wide = blur_kernel(21, 3.0, 1.0)
    assert (wide.sum(0) * axis**2).sum() == pytest.approx(9.0, rel=0.02)  # sigma_x is along x
    assert np.allclose(blur_kernel(21, 3.0, 1.0, np.pi / 2), wide.T, atol=1e-6)
    assert blur_kernel(21, 2.0, 2.0, beta=4.0)[10, 11] == pytest.approx(
        blur_kernel(21, 2.0, 2.0, beta=4.0)[10, 10], rel=0.01
    )
    plateau = blur_kernel(21, 2.0, 2.0, beta=2.0, plateau=True)
    assert plateau[10, 12] == pytest.approx(plateau[10, 10] / 2, rel=1e-5)


def test_sinc_kernel_is_the_circular_low_pass():
    kernel = sinc_kernel(21, np.pi / 2)
    assert kernel.sum() == pytest.approx(1, abs=1e-6) and kernel.min() < 0  # it has negative lobes
    r = np.array([1.0, 3.0, 7.0])
    expected = special.j1(np.pi / 2 * r) / r / (np.pi / 4)  # relative to its centre
    assert np.allclose(kernel[10, [11, 13, 17]] / kernel[10, 10], expected, atol=1e-6)
    spectrum = np.abs(np.fft.fft2(kernel, (64, 64)))
    assert spectrum[0, 4] > 0.85 and spectrum[0, 30] < 0.15  # passes below the cut-off (bin 16), stops above


def test_small_images_get_small_kernels():
    """At 64 px, the strongest blur of one bright pixel must not spread over half of the image."""
    widest = RealWorld(
        first=dataclasses.replace(CLEAN, blur_probability=1.0, blur_sigma=(3.0, 3.0)),
        second=CLEAN,
        final_sinc_probability=0,
        sinc_probability=0,
        kernel_weights=(1, 0, 0, 0, 0, 0),
        kernel_size=(21, 21),
    )

    def spread(side: int) -> float:
        dot = torch.zeros(1, 3, side, side)
        dot[:, :, side // 2, side // 2] = 1
        low = second_order(dot, 1, generator(), widest)[0].mean(0)
        return float(low.max())

    assert spread(64) > 2.5 * spread(256)  # half the sigma: four times the peak, less the loss at the kernel's edge


# --- the task ------------------------------------------------------------------------------------------------------


def test_a_task_is_rebuilt_from_its_config():
    task = get_task("upscale", scale=2, degradation="bicubic")
    assert task == Upscale(2, "bicubic") and task.name == "upscale" and task.condition_channels == 3
    assert get_task(task.name, **json.loads(json.dumps(task.config()))) == task
    assert get_task("upscale") == Upscale(4, "real")
    assert "PSNR" in task.obedience_unit


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("upscle", {}, "did you mean 'upscale'"),
        ("upscale", {"scal": 4}, "did you mean 'scale'"),
        ("upscale", {"scale": 0}, "scale=0"),
        ("upscale", {"scale": 2.5}, "whole number"),
        ("upscale", {"degradation": "bicubik"}, "did you mean 'bicubic'"),
    ],
)
def test_unknown_tasks_and_options_are_refused(name: str, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        get_task(name, **options)


@pytest.mark.parametrize("degradation", ["real", "bicubic"])
def test_input_and_condition_have_the_documented_shapes(degradation: str):
    task = Upscale(4, degradation)
    given = task.given(batch(pictures(2, 64, 32)), generator())
    condition = task.condition(given)
    assert given.shape == (2, 3, 16, 8) and condition.shape == (2, 3, 64, 32)
    for image in (given, condition):
        assert image.min() >= 0 and image.max() <= 1
    assert torch.equal(given, task.given(batch(pictures(2, 64, 32)), generator()))


def test_condition_clamps_the_overshoot_of_bicubic():
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    assert Upscale().condition(step).aminmax() == (0, 1)


@pytest.mark.parametrize("height, width", [(62, 64), (64, 63)])
def test_sides_must_be_multiples_of_the_scale(height: int, width: int):
    with pytest.raises(UserError, match=f"{width} x {height} px.*scale 4"):
        Upscale().given(batch(pictures(1, height, width)), generator())


def test_obedience_is_the_psnr_of_the_downscaled_output():
    task = Upscale(4, "bicubic")
    image = pictures()
    given = task.given(batch(image), generator())
    assert torch.equal(obedience(task, image, given), torch.full((4,), 60.0))  # capped
    shifted = obedience(task, image * 0.5 + 0.25, given * 0.5 + 0.15)  # 0.1 off everywhere: 20 dB
    assert torch.allclose(shifted, torch.full((4,), 20.0), atol=1e-3)
    flat = obedience(task, torch.full_like(image, 0.5), given)
    enlarged = obedience(task, task.condition(given), given)
    assert (flat < enlarged).all() and (enlarged < 60).all()


def test_obedience_accepts_sizes_that_are_not_multiples_of_the_scale():
    given = pictures(1, 9, 7)
    assert obedience(Upscale(), pictures(1, 37, 29), given).shape == (1,)


@pytest.mark.parametrize("degradation", ["real", "bicubic"])
@pytest.mark.parametrize("scale, side", [(8, 64), (8, 128), (16, 16)])
def test_every_scale_works(degradation: str, scale: int, side: int):
    task = Upscale(scale, degradation)
    image = pictures(3, side, side)
    given = task.given(batch(image), generator())
    assert given.shape == (3, 3, side // scale, side // scale) and torch.equal(task.bring(given), given)
    assert task.condition(given).shape == task.truth(batch(image)).shape == image.shape
    assert (obedience(task, image, given) > obedience(task, 1 - image, given)).float().mean() > 0.6


def test_upscale_accepts_grey_images_and_refuses_masks():
    grey = pictures(2, 8, 8)[:, :1]
    assert torch.equal(Upscale().bring(grey), grey.repeat(1, 3, 1, 1))
    with pytest.raises(UserError, match="mask: task upscale takes none"):
        Upscale().bring(grey, grey)
    with pytest.raises(UserError, match=r"image of shape \(2, 4, 8, 8\)"):
        Upscale().bring(torch.zeros(2, 4, 8, 8))
