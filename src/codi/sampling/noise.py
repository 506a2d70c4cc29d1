"""Noise of a call: from seeds or, as in diffusers, from generators or given latents."""

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
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # range of seeds in torch


@dataclass(frozen=True)
class Noise:
    """Source of the noise of `count` images: one seed each, or a `generator`; `latents` replace the initial noise."""

    count: int
    seeds: list[int]
    generator: Generators | None = None
    latents: Tensor | None = None

    def draw(self, shape: tuple[int, ...], fields: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return N(0, I) of (count, fields C, h, w) for `shape` (C, h, w).

        Seeds give float32 drawn on the CPU, a generator the same noise as diffusers'.
        """
        size = (self.count, *shape)
        if self.latents is not None and fields == 1:
            return self._initial_latents(shape)
        if self.generator is None:
            noise = initial_noise(shape, self.seeds, fields)
        else:
            drawn = [randn_tensor(size, generator=self.generator, device=device, dtype=dtype) for _ in range(fields)]
            noise = torch.cat(drawn, dim=1)
        if self.latents is not None:
            noise[:, : shape[0]] = self._initial_latents(shape).to(noise)
        return noise

    def _initial_latents(self, shape: tuple[int, ...]) -> Tensor:
        assert self.latents is not None
        if tuple(self.latents.shape[1:]) != shape or len(self.latents) not in (1, self.count):
            raise UserError(f"latents of shape {tuple(self.latents.shape)}: the expected shape is "
                            f"{(self.count, *shape)}: pass that, or leave latents out")  # fmt: skip
        return self.latents.expand(self.count, *shape)

    def step_generators(self, shape: tuple[int, ...]) -> Generators:
        """Return generators for the noise of each step, advanced past the initial noise of `draw`."""
        if self.generator is not None:
            return self.generator
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        for generator in generators:
            torch.randn(shape, generator=generator)
        return generators

    def row(self, index: int) -> Noise:
        """Return the noise source of one of the images."""
        one = self.generator[index % len(self.generator)] if isinstance(self.generator, list) else self.generator
        return replace(self, count=1, seeds=self.seeds[index : index + 1], generator=one)

    def key(self) -> int:
        """Return a number from 0 up that identifies the noise of the only image."""
        if self.generator is None:
            return self.seeds[0] % 2**64  # torch maps negative seeds like this
        one = self.generator[0] if isinstance(self.generator, list) else self.generator
        return int(torch.randint(2**62, (1,), generator=one, device=one.device))


def seeds_of(seed: Any) -> list[int]:
    """Return one seed or several as a list. Raises UserError for a seed that is no integer or that torch rejects."""
    several: Any = [seed] if isinstance(seed, Integral) else seed
    try:
        seeds = [exact_index(one) for one in several]
    except TypeError as error:
        message = f"seed {one_line(repr(seed))}: not a whole number: give one, or one for each picture"
        raise UserError(message) from error
    if not seeds:
        raise UserError("seed: an empty list: give a whole number, or one for each picture")
    if wrong := [one for one in seeds if not MIN_SEED <= one <= MAX_SEED]:
        raise UserError(f"seed {wrong[0]}: not of 64 bits: use -2**63 to 2**64 - 1")
    return seeds


def seeds_for(seed: Any, count: int) -> list[int]:
    """Return `count` seeds: a single number counts up, wrapping from 2**64 - 1 to 0; a list of one repeats."""
    seeds = seeds_of(seed)
    if isinstance(seed, Integral):
        consecutive = [seeds[0] + i for i in range(count)]
        return [value if value <= MAX_SEED else value - 2**64 for value in consecutive]
    return seeds * (count // len(seeds))


def require_generators(generator: Any, seed: Any) -> Generators | None:
    """Return the generator, or the list of generators. Raises UserError for other types, and if a seed is given too."""
    if generator is None:
        return None
    several: Sequence[Any] = generator if isinstance(generator, (list, tuple)) else [generator]
    if not several or not all(isinstance(one, torch.Generator) for one in several):
        raise UserError(
            f"generator: {type(generator).__name__} is no torch.Generator: pass one, or one for each picture"
        )
    if not (isinstance(seed, Integral) and seed == 0):
        raise UserError("generator and seed: both set the noise: pass one of them")
    return list(several) if isinstance(generator, tuple) else generator
