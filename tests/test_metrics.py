"""Image metrics against closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codi.evaluation import Features, enlite0_distance, frechet_distance, psnr, ssim

SIZE = 32


def pictures(count: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """Return random smooth images with a sharp edge each, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, 3, 6, 6, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    smooth[..., size // 3 :] = 1 - smooth[..., size // 3 :]
    return smooth


def blur(images: torch.Tensor, amount: int) -> torch.Tensor:
    for _ in range(amount):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images


@pytest.fixture(scope="module")
def features() -> Features:
    return Features(size=96)  # a fifth of the work of 224 px, with the same code


def test_psnr_has_its_closed_form():
    truth = torch.full((3, 3, 8, 8), 0.5)
    output = truth + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert torch.allclose(psnr(output, truth), torch.tensor([20.0, 40.0, 100.0]), atol=1e-3)


def test_ssim_is_one_for_identical_pictures_and_falls_with_blur():
    truth = pictures(2)
    same, slight, strong = (ssim(blur(truth, n), truth) for n in (0, 1, 4))
    assert torch.allclose(same, torch.ones(2), atol=1e-6)
    assert (slight < same).all() and (strong < slight).all()


def test_enlite0_distance_grows_with_blur_from_zero(features):
    truth = pictures(2)
    same, slight, strong = (enlite0_distance(blur(truth, n), truth, features) for n in (0, 1, 4))
    assert same.shape == (2,) and torch.equal(same, torch.zeros(2))
    assert (slight > 0.01).all() and (strong > 1.2 * slight).all() and (strong < 4).all()
    assert torch.allclose(strong, enlite0_distance(truth, blur(truth, 4), features), rtol=1e-4)


def test_features_come_from_the_real_network_and_recognize_a_cat():
    """Classes 281, 282 and 285 of ImageNet are cats: wrong weights or scaling would not find one."""
    from skimage import data

    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    network = Features()
    maps = network(photo[..., 75:375])
    assert maps.pooled.shape == (1, 1280)
    assert [tuple(m.shape[1:]) for m in maps.blocks] == [
        (16, 112, 112),
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
        (320, 7, 7),
    ]
    probabilities = network.network._fc(maps.pooled).softmax(1)[0]
    assert probabilities[[281, 282, 285]].sum() > 0.7


def test_pooled_features_do_not_depend_on_the_batch(features):
    images = pictures(3)
    together = features(images).pooled
    alone = torch.cat([features(image[None]).pooled for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("size", [0, 100])
def test_a_feature_size_that_does_not_fit_the_network_is_refused(size):
    with pytest.raises(ValueError, match="multiple of 32"):
        Features(size=size)


def exact_gaussian(count: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """Return `count` vectors whose sample mean and unbiased sample covariance are exactly `mean` and `root' root`."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(raw - raw.mean(0)).Q * (count - 1) ** 0.5
    return basis @ root + mean


def test_frechet_distance_of_commuting_gaussians_is_exact():
    a_std, b_std = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.1]).double()
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    a = exact_gaussian(40, torch.zeros(3).double(), a_std.diag(), 0)
    b = exact_gaussian(70, shift, b_std.diag(), 1)
    expected = shift.square().sum() + (a_std - b_std).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_agrees_with_the_matrix_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=generator).double()
    b = (torch.randn(50, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 0.3).double()
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(
        cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b))
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_accepts_fewer_samples_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 1280, generator=generator)
    b = torch.randn(7, 1280, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 1280, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    # More copies of the same vectors hardly change the fitted Gaussian, only the count: both branches agree.
    many = a.repeat(400, 1)
    assert frechet_distance(many, many.flip(0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("other", [torch.zeros(1, 4), torch.zeros(3, 5), torch.zeros(4)])
def test_frechet_distance_refuses_unusable_features(other):
    with pytest.raises(ValueError, match="at least 2 feature vectors"):
        frechet_distance(torch.zeros(3, 4), other)


def test_pictures_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="of the same shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16))
