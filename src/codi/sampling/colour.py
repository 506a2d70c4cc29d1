"""Color correction: diffusion models drift in hue and brightness; the input corrects them (StableSR, Wang 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, nearest, one_line
from ..tasks.degradations import resize

METHODS = ("wavelet", "back-projection", "adain", "none")
# Amplitude of residual noise. Some of the sampler's noise stays in its result: 3 % of a latent's deviation, which in a
# flat area is 1.3 levels of 255 at periods of one to three latent cells and looks like worms. Detail of this amplitude
# is kept only where the input has contrast too. 2 is a compromise of a few trials on 15 photographs: 3 levels removed
# twice as much texture, and lowered the ENLite0 distance further for real-world inputs, but not for bicubic ones.
GRAIN = 2 / 255


def match_colour(output: Tensor, reference: Tensor, method: str = "wavelet", scale: int = 4) -> Tensor:
    """Give `output` (B, 3, H, W) in [0, 1] the colors of `reference`, which is resized to it if needed.

    - "wavelet": the low frequencies of the reference replace the output's; details stay.
    - "back-projection": all frequencies that the small image resolves replace the output's; higher ones stay:
      x + up(low - down(x)) (Irani and Peleg, 1991). For small images without noise or blocks, enlarged `scale` times.
    - "adain": each channel gets the reference's mean and standard deviation: one global change.
    - "none": nothing.

    The first two also remove grain where the input is flat (see `without_grain`). The result is clamped to [0, 1].
    Raises UserError for another method.
    """
    require_method(method)
    if method == "none":
        return output
    result = torch.empty_like(output)
    levels = wavelet_levels(*output.shape[-2:])
    reference = reference.to(output)
    if reference.shape[-2:] != output.shape[-2:]:
        reference = resize(reference, (output.shape[-2], output.shape[-1])).clamp_(0, 1)
    contrast = None if method == "adain" else local_contrast(reference, scale)
    for c in range(output.shape[1]):  # one channel at a time: at 4096 x 4096 px each copy of one is 67 MB
        own, other = output[:, c : c + 1], reference[:, c : c + 1]
        if contrast is None:
            std, target = (x.std((2, 3), keepdim=True, correction=0) for x in (own, other))
            means = own.mean((2, 3), keepdim=True), other.mean((2, 3), keepdim=True)
            matched = (own - means[0]) * (target / std.clamp_min(1e-5)) + means[1]
        else:
            projects = method == "back-projection"
            matched = back_projected(own, other, scale) if projects else with_low_frequencies(own, other, levels)
            matched = without_grain(matched, other, contrast, scale)
        result[:, c : c + 1] = matched.clamp_(0, 1)
    return result


def require_method(method: str) -> None:
    """Raise UserError for an unknown method of color correction."""
    if not isinstance(method, str) or method not in METHODS:
        hint = nearest(method, METHODS)
        raise UserError(f"colour {one_line(repr(method))}: unknown correction{hint}: use {', '.join(METHODS)}")


def match_bands(
    bands: Iterator[Tensor],
    reference: Callable[[int, int], Tensor],
    height: int,
    method: str = "wavelet",
    scale: int = 4,
) -> Iterator[Tensor]:
    """Apply match_colour, with any method but "adain", to an image of `height` rows in bands (1, 3, rows, W) from the
    top. `reference(a, b)` returns rows a to b of the reference, (1, 3, b - a, W). Yields bands of other heights."""
    if method == "none":
        yield from bands
        return
    projects = method == "back-projection"
    done = end = 0
    buffer = torch.empty(0)  # rows not yet done, preceded by the rows that the filters read for the first of them
    for band in bands:
        buffer = torch.cat([buffer, band], dim=2) if end else band
        end += band.shape[2]
        levels = wavelet_levels(height, band.shape[-1])
        # Rows above and below that the blur reads, 1 + 2 + 4 + ..., or the two cubic resizes,
        reach = 6 * scale if projects else 2**levels - 1
        # plus those that the variances of input and detail are averaged over.
        reach = max(reach + 2 ** scale_levels(scale) - 1, contrast_reach(scale))
        ready, first = end if end == height else end - reach, end - buffer.shape[2]
        if ready <= done:
            continue
        other, result = reference(first, end).to(buffer), torch.empty_like(buffer[:, :, done - first : ready - first])
        contrast = local_contrast(other, scale)
        for c in range(result.shape[1]):
            own, low = buffer[:, c : c + 1], other[:, c : c + 1]
            matched = back_projected(own, low, scale) if projects else with_low_frequencies(own, low, levels)
            matched = without_grain(matched, low, contrast, scale)
            result[:, c : c + 1] = matched[:, :, done - first : ready - first].clamp_(0, 1)
        yield result
        done = ready
        above = max(0, done - reach)
        buffer = buffer[:, :, above - above % (scale if projects else 1) - first :].clone()


def back_projected(own: Tensor, enlarged: Tensor, scale: int) -> Tensor:
    """Return `own` - up(down(own)) + `enlarged`, (B, C, H, W), whose top left corner is aligned to a small pixel."""
    height, width = (-(-side // scale) for side in own.shape[-2:])
    # A band may cut a small pixel at its bottom: the caller does not use the rows that depend on it.
    whole = F.pad(own, (0, width * scale - own.shape[-1], 0, height * scale - own.shape[-2]), mode="replicate")
    small = resize(whole, (height, width))
    large = F.interpolate(small, size=whole.shape[-2:], mode="bicubic")
    return own + enlarged - large[..., : own.shape[-2], : own.shape[-1]]


def local_contrast(enlarged: Tensor, scale: int) -> Tensor:
    """Return the local variance (B, 1, H, W) of (B, C, H, W) in the channel of most contrast: the variance of the
    difference to a blur over a few pixels of the small image."""
    fine = scale_levels(scale)
    variance = torch.zeros_like(enlarged[:, :1])
    for channel in enlarged.split(1, dim=1):
        contrast = channel - low_frequencies(channel, fine + 1)
        variance = torch.maximum(variance, low_frequencies(contrast.square_(), fine))
    return variance


def without_grain(output: Tensor, enlarged: Tensor, contrast: Tensor, scale: int) -> Tensor:
    """Multiply the detail that `output` adds to `enlarged`, both (B, 1, H, W), by v / (v + GRAIN^2), a Wiener filter.

    v is the input's `contrast`, plus the variance of the detail as far as it clearly exceeds grain.
    """
    detail = output - enlarged
    added = low_frequencies(detail.square(), scale_levels(scale)).sub_(4 * GRAIN**2).clamp_min_(0)
    variance = added.add_(contrast)
    return enlarged + detail.mul_(variance / (variance + GRAIN**2))


def contrast_reach(scale: int) -> int:
    """Return the number of rows above and below a pixel that `local_contrast` reads."""
    fine = scale_levels(scale)
    return (2 ** (fine + 1) - 1) + (2**fine - 1)


def scale_levels(scale: int) -> int:
    """Return the number of a trous levels whose blur keeps only what an input enlarged `scale` times resolves."""
    return max(1, math.ceil(math.log2(scale)) + 1)


def with_low_frequencies(own: Tensor, other: Tensor, levels: int) -> Tensor:
    """Return `own` with the low frequencies of `other`: own - low(own) + low(other); low() is linear."""
    return low_frequencies(other - own, levels).add_(own)


def wavelet_levels(height: int, width: int) -> int:
    """Return the number of a trous levels that separate the low frequencies.

    The reference is an enlarged small image: it is soft, and keeping more of it than necessary would blur the output.
    So the cut-off must lie well below what the small image resolves (at x4, periods of 8 output pixels). Level i blurs
    with variance 2 * 4^i / 4 pixels^2; StableSR's five levels have sigma 13 px and pass half at a period of 70 px, nine
    times longer than those 8. Five is the maximum even for large images, because colors may drift from one region to
    the next. Small images get fewer (64 px: 4, sigma 6.5 px, period 35 px; 32 px: 3), or the blur would be wider than
    the image and correct no more than its mean.
    """
    return max(1, min(5, int(math.log2(max(8, min(height, width)))) - 2))


def low_frequencies(image: Tensor, levels: int) -> Tensor:
    """Blur (B, C, H, W) by the binomial [1 2 1] / 4 along both axes with holes of 1, 2, 4, ... pixels (a trous)."""
    for hole in (2**i for i in range(levels)):
        padded = F.pad(image, (hole, hole, 0, 0), mode="replicate")
        image = padded[..., : -2 * hole].add(padded[..., 2 * hole :]).mul_(0.25).add_(image, alpha=0.5)
        padded = F.pad(image, (0, 0, hole, hole), mode="replicate")
        image = padded[..., : -2 * hole, :].add(padded[..., 2 * hole :, :]).mul_(0.25).add_(image, alpha=0.5)
    return image
