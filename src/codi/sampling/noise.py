"""Where a call's noise comes from: seeds, or as in diffusers generators or the latents themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import UserError, one_line
from .checks import exact_index
from .sampler import initial_noise

Generators = torch.Generator | list[torch.Generator]
LEAST, MOST = -(2**63), 2**64 - 1  # what torch takes as a seed


@dataclass(frozen=True)
class Noise:
    """Of `count` pictures: `seeds`, one each, or a `generator`; `latents` stand for what is drawn first."""

    count: int
    seeds: list[int]
    generator: Generators | None = None
    latents: Tensor | None = None

    def draw(self, shape: tuple[int, ...], fields: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return N(0, I) of (count, fields C, h, w) for `shape` (C, h, w). By a seed it is float32 from the CPU, by a
        generator what diffusers draws."""
        size = (self.count, *shape)
        if self.latents is not None and fields == 1:
            return self._given(shape)
        if self.generator is None:
            noise = initial_noise(shape, self.seeds, fields)
        else:
            drawn = [randn_tensor(size, generator=self.generator, device=device, dtype=dtype) for _ in range(fields)]
            noise = torch.cat(drawn, dim=1)
        if self.latents is not None:
            noise[:, : shape[0]] = self._given(shape).to(noise)
        return noise

    def _given(self, shape: tuple[int, ...]) -> Tensor:
        assert self.latents is not None
        if tuple(self.latents.shape[1:]) != shape or len(self.latents) not in (1, self.count):
            raise UserError(f"latents of shape {tuple(self.latents.shape)}: these pictures start from "
                            f"{(self.count, *shape)}: pass that shape, or leave latents out")  # fmt: skip
        return self.latents.expand(self.count, *shape)

    def further(self, shape: tuple[int, ...]) -> Generators:
        """Return what schedulers draw the noise of each step from: never again what `draw` has drawn."""
        if self.generator is not None:
            return self.generator
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        for generator in generators:
            torch.randn(shape, generator=generator)
        return generators

    def row(self, index: int) -> Noise:
        """Return the noise of one of the pictures."""
        one = self.generator[index % len(self.generator)] if isinstance(self.generator, list) else self.generator
        return replace(self, count=1, seeds=self.seeds[index : index + 1], generator=one)

    def key(self) -> int:
        """Return a number from 0 up that stands for the noise of the one picture."""
        if self.generator is None:
            return self.seeds[0] % 2**64  # as torch takes negative ones
        one = self.generator[0] if isinstance(self.generator, list) else self.generator
        return int(torch.randint(2**62, (1,), generator=one, device=one.device))


def seeds_of(seed: Any) -> list[int]:
    """Return one seed or several as a list. Raises UserError for what is no whole number that torch takes."""
    several: Any = [seed] if isinstance(seed, Integral) else seed
    try:
        seeds = [exact_index(one) for one in several]
    except TypeError as error:
        message = f"seed {one_line(repr(seed))}: not a whole number: give one, or one for each picture"
        raise UserError(message) from error
    if not seeds:
        raise UserError("seed: an empty list: give a whole number, or one for each picture")
    if wrong := [one for one in seeds if not LEAST <= one <= MOST]:
        raise UserError(f"seed {wrong[0]}: not of 64 bits: use -2**63 to 2**64 - 1")
    return seeds


def counted(seed: Any, count: int) -> list[int]:
    """Return `count` seeds: a single number counts up, from 2**64 - 1 to 0; one in a list serves all."""
    seeds = seeds_of(seed)
    if isinstance(seed, Integral):
        up = [seeds[0] + i for i in range(count)]
        return [one if one <= MOST else one - 2**64 for one in up]
    return seeds * (count // len(seeds))


def require_generators(generator: Any, seed: Any) -> Generators | None:
    """Return a call's generator or list of them as it is. Raises UserError for another thing, and beside a seed."""
    if generator is None:
        return None
    several: Sequence[Any] = generator if isinstance(generator, (list, tuple)) else [generator]
    if not several or not all(isinstance(one, torch.Generator) for one in several):
        raise UserError(f"generator: {type(generator).__name__} is none: pass a torch.Generator, or one each picture")
    if not (isinstance(seed, Integral) and seed == 0):
        raise UserError("generator and seed: both say where the noise comes from: give one")
    return list(several) if isinstance(generator, tuple) else generator
