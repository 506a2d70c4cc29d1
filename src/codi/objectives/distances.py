"""The paper's four distances d_x between the predicted and the clean signal.

`latent` is a distance(x_hat, batch) -> scalar; the other functions return one. The latent form is the paper's default:
the others need the codec's decoder in the backward pass and the paper found them blurrier (pixel, features) or
over-saturated (perceptual).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .batch import LatentBatch, mean_square

SignalDistance = Callable[[Tensor, LatentBatch], Tensor]
DISTANCES = ("latent", "pixel", "features", "perceptual")


def latent(x_hat: Tensor, batch: LatentBatch) -> Tensor:
    """Return the squared L2 distance in latent space."""
    return mean_square(x_hat, batch.x)


def pixel(decode: Callable[[Tensor], Tensor]) -> SignalDistance:
    """Return the distance: squared L2 between the decoded prediction and the picture, in [0, 1]."""

    def distance(x_hat: Tensor, batch: LatentBatch) -> Tensor:
        assert batch.image is not None
        return mean_square(decode(x_hat), batch.image)

    return distance


def features(decode: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor]) -> SignalDistance:
    """Return the distance: squared L2 between encoder features of the decoded prediction and of the picture."""

    def distance(x_hat: Tensor, batch: LatentBatch) -> Tensor:
        assert batch.image is not None
        return mean_square(encode(decode(x_hat)), encode(batch.image).detach())

    return distance


def perceptual(decode: Callable[[Tensor], Tensor], metric: Callable[[Tensor, Tensor], Tensor]) -> SignalDistance:
    """Return the distance: a perceptual metric, (B, 3, H, W) x 2 -> (B,), LPIPS in the paper, between the decoded
    prediction and the picture."""

    def distance(x_hat: Tensor, batch: LatentBatch) -> Tensor:
        assert batch.image is not None
        return metric(decode(x_hat), batch.image).mean()

    return distance
