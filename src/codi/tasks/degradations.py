"""Degradations that make low-resolution training inputs from clean images.

`second_order` is the degradation of Real-ESRGAN (Wang, Xie, Dong & Shan, ICCVW 2021): blur, resize, noise and JPEG,
twice, with sinc filters for ringing; `bicubic` is the classical one. Images go through OpenCV one by one, because each
has its own kernels, sizes and JPEG quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """One round of blur, resize, noise, JPEG. Probabilities are per sample; values are drawn uniformly from ranges."""

    blur_probability: float
    blur_sigma: Range
    """Standard deviation of blur kernels, pixels."""
    resize_weights: tuple[float, float, float]
    """Odds of enlarging, shrinking, keeping the size."""
    resize_range: Range
    """Resize factor: the lower end for shrinking, the upper for enlarging."""
    gaussian_sigma: Range
    """Standard deviation of Gaussian noise, 8-bit levels."""
    poisson_scale: Range
    """Strength of Poisson noise relative to that for the image's own number of levels."""
    gaussian_probability: float = 0.5
    """Probability of Gaussian noise; otherwise Poisson."""
    grey_probability: float = 0.4
    """Probability of the same noise in all channels."""
    jpeg_quality: Range = (30.0, 95.0)


@dataclass(frozen=True)
class RealWorld:
    """The settings of `second_order`; defaults are the paper's (Real-ESRGAN x4plus, which trains on 256 px crops).

    `full_side` and `least_shrink` are ours. Kernels of 7 to 21 px and sigmas up to 3 px are meant for 256 px; on 64 px
    a 21 px kernel would cover a third of the image, so that much of what it averages is mirrored border. Sizes and
    sigmas are therefore multiplied by min(side) / full_side, but by no less than `least_shrink`: at a quarter (sigma at
    most 0.75, before a x4 reduction) the blur would be invisible in the result. A kernel never exceeds half of the side
    it is applied to.
    """

    first: Stage = Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
    second: Stage = Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))
    sinc_probability: float = 0.1
    """Probability of a sinc filter in place of a blur kernel, in each stage."""
    final_sinc_probability: float = 0.8
    kernel_size: tuple[int, int] = (7, 21)
    """Smallest and largest kernel, pixels, odd."""
    kernel_weights: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Odds of Gaussian, generalised Gaussian and plateau kernels, each isotropic, then anisotropic."""
    generalised_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    full_side: int = 256
    least_shrink: float = 0.5


def bicubic(image: Tensor, scale: int) -> Tensor:
    """Reduce (B, 3, H, W) in [0, 1] to (B, 3, H / scale, W / scale) by antialiased bicubic, clamped."""
    return resize(image, (image.shape[-2] // scale, image.shape[-1] // scale)).clamp(0, 1)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) to `size` (h, w) by antialiased bicubic interpolation."""
    if size[1] == 1 < size[0]:  # torch (at least up to 2.13) repeats one row here; transposed, it is correct
        return resize(image.mT, (1, size[0])).mT
    if torch.onnx.is_in_onnx_export():  # ONNX lacks the operator, which is linear and separable: use matrix products
        rows, columns = (_resizing_matrix(*lengths).to(image) for lengths in zip(image.shape[-2:], size, strict=True))
        return rows @ image @ columns.T
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)


def _resizing_matrix(length: int, target: int) -> Tensor:
    """Return `resize` along one axis as a matrix (target, length), a constant in an exported graph."""
    identity = torch.eye(int(length))[None, None]
    resized = F.interpolate(identity, size=(int(target), int(length)), mode="bicubic", antialias=True)
    return torch.from_numpy(resized[0, 0].numpy().copy())


def second_order(
    image: Tensor,
    scale: int,
    generator: torch.Generator,
    settings: RealWorld = RealWorld(),  # noqa: B008 (frozen)
) -> Tensor:
    """Degrade (B, 3, H, W) in [0, 1] to (B, 3, H // scale, W // scale) in [0, 1], rounded to 8 bits, same device.

    The generator gives each sample its own seed: the same state gives the same bytes, and a sample does not depend on
    the others of its batch.
    """
    seeds = torch.randint(2**62, (image.shape[0],), generator=generator).tolist()
    pictures = image.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    low = [
        _degrade(rgb[..., ::-1], scale, np.random.default_rng(seed), settings)
        for rgb, seed in zip(pictures, seeds, strict=True)
    ]
    return torch.from_numpy(np.stack(low)[..., ::-1].copy()).permute(0, 3, 1, 2).contiguous().to(image.device)


def _degrade(image: np.ndarray, scale: int, rng: np.random.Generator, settings: RealWorld) -> np.ndarray:
    """Degrade one image, float32 (H, W, 3) in [0, 1], BGR."""
    height, width = image.shape[:2]
    target = (height // scale, width // scale)
    shrink = min(1.0, max(min(height, width) / settings.full_side, settings.least_shrink))
    first, second = settings.first, settings.second

    if rng.random() < first.blur_probability:
        image = _blur(image, first, shrink, rng, settings)
    image = _resize(image, _random_size((height, width), first, rng), rng)
    image = _noise(image, first, rng)
    image = _jpeg(image, first, rng)

    if rng.random() < second.blur_probability:
        image = _blur(image, second, shrink, rng, settings)
    image = _resize(image, _random_size(target, second, rng), rng)
    image = _noise(image, second, rng)
    # Programs sharpen before or after they compress: both orders occur.
    if rng.random() < 0.5:
        image = _final_sinc(_resize(image, target, rng), shrink, rng, settings)
        image = _jpeg(image, second, rng)
    else:
        image = _jpeg(image, second, rng)
        image = _final_sinc(_resize(image, target, rng), shrink, rng, settings)
    return np.round(image.clip(0, 1) * 255).astype(np.float32) / 255


def _random_size(size: tuple[int, int], stage: Stage, rng: np.random.Generator) -> tuple[int, int]:
    low, high = stage.resize_range
    kind = rng.choice(3, p=_odds(stage.resize_weights))
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[kind]
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _resize(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    filters = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
    return cv2.resize(image, size[::-1], interpolation=filters[rng.integers(3)])


def _noise(image: np.ndarray, stage: Stage, rng: np.random.Generator) -> np.ndarray:
    image = image.clip(0, 1)
    gaussian, grey = rng.random() < stage.gaussian_probability, rng.random() < stage.grey_probability
    if gaussian:
        shape = (*image.shape[:2], 1 if grey else 3)
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(*stage.gaussian_sigma) / 255)
    else:
        clean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None] if grey else image
        # Photon counts: as many as the picture has levels, rounded up to a power of two.
        levels = np.count_nonzero(np.bincount(np.round(clean * 255).astype(np.uint8).ravel(), minlength=256))
        photons = 2 ** math.ceil(math.log2(levels))
        noise = (rng.poisson(clean * photons) / photons - clean) * rng.uniform(*stage.poisson_scale)
    return (image + noise).clip(0, 1).astype(np.float32)


def _jpeg(image: np.ndarray, stage: Stage, rng: np.random.Generator) -> np.ndarray:
    quality = int(rng.uniform(*stage.jpeg_quality))
    _, data = cv2.imencode(
        ".jpg", np.round(image.clip(0, 1) * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None  # what OpenCV just encoded
    return decoded.astype(np.float32) / 255


# --- kernels -------------------------------------------------------------------------------------------------------


def _blur(image: np.ndarray, stage: Stage, shrink: float, rng: np.random.Generator, settings: RealWorld) -> np.ndarray:
    size, drawn = _kernel_size(image, shrink, rng, settings)
    if rng.random() < settings.sinc_probability:
        # Cut-offs below pi/3 ring over many pixels: only large kernels get them.
        cutoff = rng.uniform(math.pi / 3 if drawn < 13 else math.pi / 5, math.pi)
        return _filter(image, sinc_kernel(size, cutoff))
    shape, anisotropic = divmod(int(rng.choice(6, p=_odds(settings.kernel_weights))), 2)
    sigma_x = sigma_y = rng.uniform(*stage.blur_sigma) * shrink
    angle = 0.0
    if anisotropic:
        sigma_y, angle = rng.uniform(*stage.blur_sigma) * shrink, rng.uniform(-math.pi, math.pi)
    beta = 1.0
    if shape:
        low, high = settings.generalised_beta if shape == 1 else settings.plateau_beta
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)  # equally often below and above 1
    return _filter(image, blur_kernel(size, sigma_x, sigma_y, angle, beta, plateau=shape == 2))


def _final_sinc(image: np.ndarray, shrink: float, rng: np.random.Generator, settings: RealWorld) -> np.ndarray:
    if rng.random() >= settings.final_sinc_probability:
        return image
    size, _ = _kernel_size(image, shrink, rng, settings)
    return _filter(image, sinc_kernel(size, rng.uniform(math.pi / 3, math.pi)))


def _kernel_size(image: np.ndarray, shrink: float, rng: np.random.Generator, settings: RealWorld) -> tuple[int, int]:
    """Return the odd kernel size to use for this image, and the odd size drawn from the paper's range."""
    low, high = settings.kernel_size
    drawn = 2 * int(rng.integers(low // 2, high // 2 + 1)) + 1
    half = min(int(drawn * shrink), min(image.shape[:2]) // 2) // 2
    return 2 * max(1, half) + 1, drawn


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def blur_kernel(
    size: int, sigma_x: float, sigma_y: float, angle: float = 0.0, beta: float = 1.0, plateau: bool = False
) -> np.ndarray:
    """Return a blur kernel, (size, size) float32 of sum 1.

    With `d = x^T S^-1 x`, S of standard deviations sigma_x, sigma_y (pixels) rotated by `angle`: generalised Gaussian
    `exp(-d^beta / 2)` (beta = 1: Gaussian), or plateau `1 / (1 + d^beta)`.
    """
    x, y = _grid(size)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = ((u / sigma_x) ** 2 + (v / sigma_y) ** 2) ** beta
    kernel = 1 / (1 + distance) if plateau else np.exp(-0.5 * distance)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """Return a circular low pass `cutoff J1(cutoff r) / (2 pi r)`, (size, size) float32 of sum 1; cutoff in
    radians/pixel."""
    x, y = _grid(size)
    r = np.hypot(x, y)
    r[size // 2, size // 2] = 1
    kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit at r = 0
    return (kernel / kernel.sum()).astype(np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _odds(weights: tuple[float, ...]) -> np.ndarray:
    return np.asarray(weights) / sum(weights)
