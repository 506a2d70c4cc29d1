"""Latents and text features of a data set, computed once and stored in shards that several trainings can read.

A cache is a folder of `shard-00000.safetensors` and so on, each of a run of samples in the source's order:

    latent (n, V, 2C, h, w)   mean and log-variance of the true picture's latent, unscaled, for each of V crops
    text   (u, L, D)          features of the shard's distinct prompts; with XL also `pooled` (u, P)
    row    (n,)               the row in `text` of the sample's prompt; -1 for a sample that could not be read
    mark   (n,)               a hash of the sample's name and prompt, so that a changed data set is noticed

and an `index.json` that records the data, model and settings. A shard is written under a temporary name and renamed, so
one with its final name is complete, even if the process is killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.batches import Batch, collate, judge
from ..data.samples import CorruptSample, Sample, order
from ..data.sources import SceneSource, Source, open_source
from ..errors import UserError, one_line
from ..files import locked, remove_leftovers, write_file, write_text
from ..models import codec
from ..models.backbones import Backbone, digest, load_backbone
from ..models.text import FEATURES, Bundle, join
from ..tasks import Task
from .distill_recipe import DistillRecipe, recipe_task
from .prompt_cache import PROMPTS, PromptCache, held_out_batch
from .trainer import make_accelerator

INDEX = "index.json"
LATENT, TEXT = "latent", "text"  # keys in a batch's extras; other tensors of a prompt have their own names
_INDICES = ("row", "mark")
SHARD = 512  # samples: about 90 MB for Stable Diffusion 1.5 at 512 px
_REQUIRED_KEYS = ("data", "samples", "size", "truth", "prompts", "vae", "text")  # same in a training and its cache


def _index(recipe: DistillRecipe, task: Task, backbone: Backbone, source: Source) -> dict[str, Any]:
    encoders = [digest(encoder) for encoder in backbone.text.encoders]
    index = {**_index_of_data(recipe, task, source), "vae": digest(backbone.vae)}
    return {**index, "text": encoders} if encoders else index  # not loaded where the cache has the features


def _index_of_data(recipe: DistillRecipe, task: Task, source: Source) -> dict[str, Any]:
    return {
        "data": Path(recipe.data).name,  # a folder may move: `mark` shows whether its samples are the same
        "samples": len(source),
        "size": recipe.size,
        "zoom": list(recipe.zoom),
        "truth": type(task).truth.__qualname__,  # tasks with the same target image share a cache
        "prompts": task.prompt_column if task.prompted else "",
        "model": recipe.model,
        "loras": dict(recipe.loras),
    }


def _require_same(folder: Path, index: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the folder's index, or None if it has none. Raises UserError if one of `keys` differs from `index`."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text())
        differs = next((key for key in keys if stored[key] != index[key]), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}): rebuild the cache") from error
    if differs:
        raise UserError(
            f"{folder}: a cache of {differs} {stored[differs]!r}, not {index[differs]!r}: make one for this recipe by "
            "`codi data cache` in another folder"
        )
    return stored


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _fault(shard: Path) -> str:
    """Return why the shard cannot be used, or "" if it can."""
    try:
        with safe_open(shard, "pt"):
            return ""
    except FileNotFoundError:
        return "missing"
    except (OSError, SafetensorError) as error:
        return f"truncated or damaged ({one_line(error)})"


def _mark(name: str, prompt: str) -> int:
    identity = f"{name.rpartition('/')[2]}\0{prompt}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little", signed=True)


def _prompt(task: Task, sample: Sample) -> str:
    return getattr(sample, task.prompt_column) if task.prompted else ""


def _crop(seed: int, index: int, variant: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, variant])


@torch.no_grad()
def make_cache(
    recipe: DistillRecipe,
    folder: Path,
    variants: int = 1,
    exact: bool = False,
    shard_size: int = SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the cache of `recipe`'s data, or its missing shards; return its index with `unread`, the number of samples
    that could not be read this time.

    `variants`: crops of each image. `exact`: store float32 instead of float16. `progress` is called with (samples done,
    all samples). Raises UserError for a folder that holds a different cache or that another process is filling, for
    features beyond the range of float16, and for too much corrupt data.
    """
    recipe.validate()
    task, accelerator = recipe_task(recipe), make_accelerator(recipe)
    source = open_source(recipe.data, task.columns, zoom=recipe.zoom)
    if isinstance(source, SceneSource):
        source.device = str(accelerator.device)
    backbone = load_backbone(recipe.model, **recipe.parts).freeze()
    dtype = "float32" if exact else "float16"
    index = _index(recipe, task, backbone, source)
    index |= {"seed": recipe.seed, "variants": variants, "dtype": dtype, "shard": shard_size}
    for part in (backbone.vae, *backbone.text.encoders):
        part.to(accelerator.device)
    corrupt: list[CorruptSample] = []
    read, count = 0, len(source)
    with locked(folder, "another process is filling this cache: wait for it, or name another -o"):
        remove_leftovers(folder, r"[a-z]+(-\d+)?\.[a-z]+")
        if _require_same(folder, index, [key for key in index if key != "model"]) is None:
            write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
        for number, start in enumerate(range(0, count, shard_size)):
            indices = range(start, min(start + shard_size, count))
            if _fault(_shard(folder, number)):
                with accelerator.autocast():
                    tensors, unread = _encode(recipe, task, backbone, source, indices, variants)
                corrupt, read = corrupt + unread, read + len(indices)
                judge(corrupt, read, count, recipe.max_corrupt)
                stored = {
                    key: t if t.dtype.itemsize == 8 else t.to(getattr(torch, dtype)) for key, t in tensors.items()
                }
                if not all(bool(t.isfinite().all()) for t in stored.values()):
                    raise UserError(f"{recipe.model}: its features are beyond {dtype}: add --exact to keep float32")
                write_file(_shard(folder, number), lambda path: save_file(stored, path))  # noqa: B023 - called at once
            if progress:
                progress(indices.stop, count)
        prompts = ["", *task.prompts(held_out_batch(recipe, open_source(recipe.held_out, task.columns)))]
        write_file(folder / PROMPTS, PromptCache.of(backbone.text, prompts).save)
    return {**index, "unread": len(corrupt)}


def _encode(
    recipe: DistillRecipe, task: Task, backbone: Backbone, source: Source, indices: range, variants: int
) -> tuple[dict[str, Tensor], list[CorruptSample]]:
    """Return the tensors of a shard, and the samples that could not be read."""
    cells = recipe.size // codec.downscale(backbone.vae)
    channels = 2 * codec.channels(backbone.vae)
    latent = torch.zeros(len(indices), variants, channels, cells, cells)
    readable: dict[int, Sample] = {}
    corrupt: dict[int, CorruptSample] = {}
    step = recipe.batch_size
    for variant in range(variants):
        for at in range(0, len(indices), step):
            batch = indices[at : at + step]
            results = source.read(batch, recipe.size, [_crop(recipe.seed, i, variant) for i in batch])
            samples = [r for r in results if isinstance(r, Sample)]
            corrupt |= {r.index: r for r in results if isinstance(r, CorruptSample)}
            if samples:
                truth = task.truth(collate(samples)).to(backbone.vae.device)
                rows = [s.index - indices.start for s in samples]
                latent[rows, variant] = codec.moments(backbone.vae, truth).float().cpu()
            readable |= {s.index: s for s in samples}
    prompts = {i: _prompt(task, readable[i]) for i in indices if i in readable}
    unique = list(dict.fromkeys(prompts.values())) or [""]
    bundle = join([backbone.text.encode(unique[at : at + step], warn=False) for at in range(0, len(unique), step)])
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    tensors = {
        LATENT: latent,
        "row": torch.tensor([row_of[prompts[i]] if i in prompts else -1 for i in indices]),
        "mark": torch.tensor([_mark(readable[i].name, prompts[i]) if i in prompts else 0 for i in indices]),
    }
    text = {TEXT if name == FEATURES else name: value.float().cpu() for name, value in bundle.items()}
    return tensors | text, list(corrupt.values())


def open_cache(recipe: DistillRecipe, backbone: Backbone, source: Source) -> CachedSource:
    """Return `source` with its cached latents and features. Raises UserError if `recipe.cache` is not a complete cache
    for this recipe."""
    folder, task = Path(recipe.cache or ""), recipe_task(recipe)
    return CachedSource(source, folder, task, _require(folder, _index(recipe, task, backbone, source)))


def require_cache(recipe: DistillRecipe, source: Source) -> None:
    """Raise the errors of open_cache that can be found without the backbone's weights."""
    folder, task = Path(recipe.cache or ""), recipe_task(recipe)
    CachedSource(source, folder, task, _require(folder, _index_of_data(recipe, task, source)))


def _require(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    stored = _require_same(folder, index, [key for key in _REQUIRED_KEYS if key in index])
    if stored is None:
        raise UserError(f"{folder}: no cache there: make it by `codi data cache` with this recipe")
    return stored


class CachedSource:
    """A source whose samples also have `latent` (2C, h, w), `text` (L, D) and other tensors of the prompt, such as XL's
    `pooled` (P,). Its crops are the cached ones."""

    def __init__(self, source: Source, folder: Path, task: Task, index: dict[str, Any]) -> None:
        self.source, self.folder, self.task = source, folder, task
        self.seed, self.variants, self.shard_size = index["seed"], index["variants"], index["shard"]
        rows, marks = [], []
        for number in range(-(-index["samples"] // self.shard_size)):
            if fault := _fault(_shard(folder, number)):
                raise _unusable(_shard(folder, number), fault)
            with safe_open(_shard(folder, number), "pt") as file:
                rows.append(file.get_tensor("row"))
                marks.append(file.get_tensor("mark"))
        self._rows, self._marks = torch.cat(rows).tolist(), torch.cat(marks).tolist()

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        return f"{self.source.describe()}, cached in {self.folder}"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return order(self.source, seed, epoch)

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """Read as `Source.read` does. Each generator in `crops` picks one of the cached crops, None the first. Raises
        UserError for a sample whose name or prompt differs from the cached one."""
        variants = [0] * len(indices) if crops is None else [int(rng.integers(self.variants)) for rng in crops]
        keys = list(zip(indices, variants, strict=True))
        results = self.source.read(indices, size, [_crop(self.seed, i, variant) for i, variant in keys])
        return [
            self._add_features(sample, variant) if isinstance(sample, Sample) else sample
            for sample, variant in zip(results, variants, strict=True)
        ]

    def _add_features(self, sample: Sample, variant: int) -> Sample | CorruptSample:
        row = self._rows[sample.index]
        if row < 0:
            return CorruptSample(sample.index, sample.name, f"was unreadable when {self.folder} was made")
        if self._marks[sample.index] != _mark(sample.name, _prompt(self.task, sample)):
            raise UserError(f"{sample.name}: has another name or prompt than in {self.folder}: rebuild the cache")
        number, at = divmod(sample.index, self.shard_size)
        try:
            with safe_open(_shard(self.folder, number), "pt") as file:
                names = [name for name in file.keys() if name not in (LATENT, *_INDICES)]  # noqa: SIM118 # no mapping
                tensors = {LATENT: file.get_slice(LATENT)[at, variant]}
                tensors |= {name: file.get_slice(name)[row] for name in names}
        except (OSError, SafetensorError) as error:
            raise _unusable(_shard(self.folder, number), one_line(error)) from error
        return replace(sample, extras=sample.extras | tensors)


def _unusable(shard: Path, fault: str) -> UserError:
    return UserError(f"{shard}: {fault}: repeat the `codi data cache` command: it writes missing shards")


def cached_inputs(batch: Batch, dropped: Tensor, blank: Bundle) -> tuple[Tensor, Bundle]:
    """Return the moments (B, 2C, h, w), as `codec.draw` takes them, and the bundle of the prompts of a batch of a
    CachedSource, in float32. Where `dropped` (B,) is set, the bundle is `blank`, that of the empty prompt."""
    bundle = {
        name: torch.where(
            dropped.view(-1, *[1] * (empty.ndim - 1)),
            empty,
            batch.extras[TEXT if name == FEATURES else name].to(empty),
        )
        for name, empty in blank.items()
    }
    return batch.extras[LATENT].float(), bundle
