"""Colour correction: a diffusion model drifts in hue and brightness; its input has them right (StableSR, Wang 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, nearest

METHODS = ("wavelet", "adain", "none")


def match_colour(output: Tensor, reference: Tensor, method: str = "wavelet") -> Tensor:
    """`output` (B, 3, H, W) in [0, 1] with the colours of `reference`, which is brought to its size if it has another.

    - "wavelet": the low frequencies of the reference replace the output's; details stay the output's own.
    - "adain": each channel gets the reference's mean and standard deviation: one global change.
    - "none": nothing.

    The result is clamped to [0, 1]. Raises UserError for another method.
    """
    require_method(method)
    if method == "none":
        return output
    result = torch.empty_like(output)
    levels = wavelet_levels(*output.shape[-2:])
    for c in range(output.shape[1]):  # one channel at a time: at 4096 x 4096 px each copy of one is 67 MB
        own, other = output[:, c : c + 1], reference[:, c : c + 1].to(output)
        if other.shape[-2:] != own.shape[-2:]:
            other = F.interpolate(other, size=own.shape[-2:], mode="bicubic", antialias=True).clamp_(0, 1)
        if method == "adain":
            std, target = (x.std((2, 3), keepdim=True, correction=0) for x in (own, other))
            means = own.mean((2, 3), keepdim=True), other.mean((2, 3), keepdim=True)
            matched = (own - means[0]) * (target / std.clamp_min(1e-5)) + means[1]
        else:  # output - low(output) + low(reference), and low() is linear: one blur instead of two
            matched = low_frequencies(other - own, levels).add_(own)
        result[:, c : c + 1] = matched.clamp_(0, 1)
    return result


def require_method(method: str) -> None:
    """Raises UserError for a method of colour correction that there is not."""
    if method not in METHODS:
        raise UserError(f"{method}: unknown colour correction{nearest(method, METHODS)}: use {', '.join(METHODS)}")


def match_bands(
    bands: Iterator[Tensor], reference: Callable[[int, int], Tensor], height: int, method: str = "wavelet"
) -> Iterator[Tensor]:
    """match_colour by "wavelet" or "none" of a picture of `height` rows that comes in bands (1, 3, rows, W) from the
    top; `reference(a, b)` gives rows a to b of its reference, (1, 3, b - a, W). Bands again, of other rows."""
    if method == "none":
        yield from bands
        return
    done = end = 0
    kept = torch.empty(0)  # rows that are not done, and above them what the blur of the first of them sees
    for band in bands:
        kept = torch.cat([kept, band], dim=2) if end else band
        end += band.shape[2]
        levels = wavelet_levels(height, band.shape[-1])
        reach = 2**levels - 1  # rows above and below that the blur sees: 1 + 2 + 4 + ...
        ready, first = end if end == height else end - reach, end - kept.shape[2]
        if ready <= done:
            continue
        other, result = reference(first, end), torch.empty_like(kept[:, :, done - first : ready - first])
        for c in range(result.shape[1]):
            own, low = kept[:, c : c + 1], other[:, c : c + 1].to(kept)
            matched = low_frequencies(low - own, levels).add_(own)
            result[:, c : c + 1] = matched[:, :, done - first : ready - first].clamp_(0, 1)
        yield result
        done = ready
        kept = kept[:, :, max(0, done - reach) - first :].clone()


def wavelet_levels(height: int, width: int) -> int:
    """How many a trous levels the low band lies below.

    The reference is an enlarged small picture: it is soft, and keeping more of it than necessary would blur the output.
    So the band must end well below what the small picture resolves (at x4, periods of 8 output pixels). Level i blurs
    with variance 2 * 4^i / 4 pixels^2; StableSR's five levels have sigma 13 px and pass half at a period of 70 px, nine
    times longer than those 8. Five is the most that is used, however large the picture: colours may drift from one
    region to the next. Small pictures get fewer (64 px: 4, sigma 6.5 px, period 35 px; 32 px: 3), or the band would be
    wider than the picture and correct no more than its mean.
    """
    return max(1, min(5, int(math.log2(max(8, min(height, width)))) - 2))


def low_frequencies(image: Tensor, levels: int) -> Tensor:
    """(B, C, H, W) blurred by the binomial [1 2 1] / 4 along both axes with holes of 1, 2, 4, ... pixels (a trous)."""
    for hole in (2**i for i in range(levels)):
        padded = F.pad(image, (hole, hole, 0, 0), mode="replicate")
        image = padded[..., : -2 * hole].add(padded[..., 2 * hole :]).mul_(0.25).add_(image, alpha=0.5)
        padded = F.pad(image, (0, 0, hole, hole), mode="replicate")
        image = padded[..., : -2 * hole, :].add(padded[..., 2 * hole :, :]).mul_(0.25).add_(image, alpha=0.5)
    return image
