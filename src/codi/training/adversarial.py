"""A patch discriminator (PatchGAN, Isola et al. 2017) that tells patches of images from reconstructed ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def new_discriminator(width: int = 48) -> nn.Sequential:
    """Return an untrained discriminator: (B, 3, H, W) in [-1, 1] -> logits (B, 1, H/8, W/8), high for real."""

    def down(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]

    first = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(
        *first, *down(width, 2 * width), *down(2 * width, 2 * width), nn.Conv2d(2 * width, 1, 3, padding=1)
    )


def adversarial_losses(discriminator: nn.Module, rebuilt: Tensor, real: Tensor, weight: float) -> dict[str, Tensor]:
    """Return the discriminator's hinge loss and, times `weight`, the adversarial loss of `rebuilt` (B, 3, H, W).

    One backward pass serves both: the first loss takes detached reconstructions, the second detached weights of the
    discriminator. With weight 0 only the discriminator learns.
    """
    hinge = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(rebuilt.detach())).mean()
    losses = {"discriminator": hinge / 2}
    if weight:
        frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
        losses["adversarial"] = -weight * functional_call(discriminator, frozen, (rebuilt,)).mean()
    return losses
