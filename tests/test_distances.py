"""Distances d_x between clean signals, in latents, pixels and features."""

import pytest
import torch
from torch import Tensor, nn

from codi.objectives.batch import LatentBatch, mean_square
from codi.objectives.codi import codi
from codi.objectives.distances import features, latent, perceptual, pixel
from codi.schedule import DiscreteSchedule
from tiny import randn, seeded, tiny_scheduler

LEVELS = DiscreteSchedule.from_config(tiny_scheduler().config)


def decode(x: Tensor) -> Tensor:
    return torch.einsum("bchw,kc->bkhw", x, randn(3, 4, seed=20)).repeat_interleave(2, -1).repeat_interleave(2, -2)


def encode(image: Tensor) -> Tensor:
    return nn.functional.conv2d(image, randn(6, 3, 2, 2, seed=21), stride=2).tanh()


def metric(a: Tensor, b: Tensor) -> Tensor:
    return (encode(a) - encode(b)).abs().mean((1, 2, 3))


DISTANCES = {
    "latent": latent,
    "pixel": pixel(decode),
    "features": features(decode, encode),
    "perceptual": perceptual(decode, metric),
}


@pytest.mark.parametrize("d_x", DISTANCES.values(), ids=DISTANCES)
def test_distances_are_0_at_the_target_and_have_a_gradient_elsewhere(d_x):
    x = randn(2, 4, 3, 3)
    batch = LatentBatch(x, None, decode(x))
    assert d_x(x.clone(), batch) == 0
    x_hat = (x + 0.1 * randn(2, 4, 3, 3, seed=1)).requires_grad_()
    distance = d_x(x_hat, batch)
    assert distance.shape == () and distance > 0
    distance.backward()
    assert x_hat.grad is not None and x_hat.grad.isfinite().all() and (x_hat.grad != 0).all()
    nearer = d_x((x + 0.01 * randn(2, 4, 3, 3, seed=1)), batch)
    assert nearer < distance


@pytest.mark.parametrize("d_x", DISTANCES.values(), ids=DISTANCES)
def test_codi_loss_weights_the_distance(d_x):
    x, weight = randn(2, 4, 3, 3), torch.tensor(0.2, requires_grad=True)
    batch, t = LatentBatch(x, None, decode(x)), torch.tensor([300])
    z: list[Tensor] = []

    def student(z_t: Tensor, *_) -> Tensor:
        z.append(z_t)
        return weight * z_t

    loss = codi(student, student, batch, LEVELS, seeded(), d_x=d_x, t=t, signal_weight=2.0)["signal"]
    x_t, _ = LEVELS.signal_noise(0.2 * z[0], z[0], t)
    torch.testing.assert_close(loss, 2 * d_x(x_t, batch))
    loss.backward()
    assert weight.grad is not None and weight.grad != 0


def test_mean_square_of_float16_is_computed_in_float32():
    a, b = torch.full((10,), 300.0).half(), torch.zeros(10).half()
    assert mean_square(a, b) == 90_000  # beyond float16
    assert mean_square(a.double(), b.double()).dtype == torch.float64
