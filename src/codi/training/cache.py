"""Latents and text features of a data set, computed once, kept in shards and read by every training that shares them.

A cache is a folder of `shard-00000.safetensors` and so on, each of a run of samples in the source's order:

    latent (n, V, 2C, h, w)   mean and log-variance of the true picture's latent, unscaled, for each of V crops
    text   (u, L, D)          features of the shard's different prompts; with XL also `pooled` (u, P)
    row    (n,)               which of them is the sample's; -1 for a sample that could not be read
    mark   (n,)               a hash of its name and prompt, so that a changed data set is noticed

and an `index.json` that says what they were made of. A shard is written under a temporary name and renamed: one with
its name is whole, whenever the making was cut off.
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
LATENT, TEXT = "latent", "text"  # columns of a batch's extras; other tensors of a prompt go by their own names
_INDICES = ("row", "mark")
SHARD = 512  # samples; of Stable Diffusion 1.5 at 512 px about 90 MB
_MADE_OF = ("data", "samples", "size", "truth", "prompts", "vae", "text")  # what a training must share with its cache


def _index(recipe: DistillRecipe, task: Task, backbone: Backbone, source: Source) -> dict[str, Any]:
    encoders = [digest(encoder) for encoder in backbone.text.encoders]
    found = {**_index_of_data(recipe, task, source), "vae": digest(backbone.vae)}
    return {**found, "text": encoders} if encoders else found  # they were left out: their features are in the cache


def _index_of_data(recipe: DistillRecipe, task: Task, source: Source) -> dict[str, Any]:
    return {
        "data": Path(recipe.data).name,  # a folder may move, `mark` tells whether it is the same
        "samples": len(source),
        "size": recipe.size,
        "zoom": list(recipe.zoom),
        "truth": type(task).truth.__qualname__,  # tasks that want the same picture share a cache
        "prompts": task.prompt_column if task.prompted else "",
        "model": recipe.model,
        "loras": dict(recipe.loras),
    }


def _require_same(folder: Path, index: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """The folder's index, None where there is none. Raises UserError where it differs from `index` in one of `keys`."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        differs = next((key for key in keys if found[key] != index[key]), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}): rebuild the cache") from error
    if differs:
        raise UserError(
            f"{folder}: a cache of {differs} {found[differs]!r}, not {index[differs]!r}: make one for this recipe by "
            "`codi data cache` in another folder"
        )
    return found


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _fault(shard: Path) -> str:
    """Why it cannot be used, "" for a whole one."""
    try:
        with safe_open(shard, "pt"):
            return ""
    except FileNotFoundError:
        return "missing"
    except (OSError, SafetensorError) as error:
        return f"truncated or damaged ({one_line(error)})"


def _mark(name: str, prompt: str) -> int:
    told = f"{name.rpartition('/')[2]}\0{prompt}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little", signed=True)


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
    """Writes the cache of `recipe`'s data, or what is missing of it; returns its index with `unread`, the number of
    samples that could not be read now.

    `variants` crops of each picture; `exact`: float32 instead of float16. `progress` is told (samples done, all).
    Raises UserError for a folder that holds another cache or that another process is filling, features beyond float16,
    and too much corrupt data.
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
    """The tensors of one shard, and the samples that could not be read."""
    cells = recipe.size // codec.downscale(backbone.vae)
    channels = 2 * codec.channels(backbone.vae)
    latent = torch.zeros(len(indices), variants, channels, cells, cells)
    found: dict[int, Sample] = {}
    corrupt: dict[int, CorruptSample] = {}
    step = recipe.batch_size
    for variant in range(variants):
        for at in range(0, len(indices), step):
            part = indices[at : at + step]
            results = source.read(part, recipe.size, [_crop(recipe.seed, i, variant) for i in part])
            samples = [r for r in results if isinstance(r, Sample)]
            corrupt |= {r.index: r for r in results if isinstance(r, CorruptSample)}
            if samples:
                truth = task.truth(collate(samples)).to(backbone.vae.device)
                rows = [s.index - indices.start for s in samples]
                latent[rows, variant] = codec.moments(backbone.vae, truth).float().cpu()
            found |= {s.index: s for s in samples}
    prompts = {i: _prompt(task, found[i]) for i in indices if i in found}
    unique = list(dict.fromkeys(prompts.values())) or [""]
    bundle = join([backbone.text.encode(unique[at : at + step], warn=False) for at in range(0, len(unique), step)])
    number = {prompt: row for row, prompt in enumerate(unique)}
    tensors = {
        LATENT: latent,
        "row": torch.tensor([number[prompts[i]] if i in prompts else -1 for i in indices]),
        "mark": torch.tensor([_mark(found[i].name, prompts[i]) if i in prompts else 0 for i in indices]),
    }
    text = {TEXT if name == FEATURES else name: value.float().cpu() for name, value in bundle.items()}
    return tensors | text, list(corrupt.values())


def open_cache(recipe: DistillRecipe, backbone: Backbone, source: Source) -> CachedSource:
    """`source` with what `recipe.cache` holds of it. Raises UserError where that is no whole cache of this recipe."""
    folder, task = Path(recipe.cache or ""), recipe_task(recipe)
    return CachedSource(source, folder, task, _require(folder, _index(recipe, task, backbone, source)))


def require_cache(recipe: DistillRecipe, source: Source) -> None:
    """What open_cache raises, as far as it can be told without the backbone's weights."""
    folder, task = Path(recipe.cache or ""), recipe_task(recipe)
    CachedSource(source, folder, task, _require(folder, _index_of_data(recipe, task, source)))


def _require(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    found = _require_same(folder, index, [key for key in _MADE_OF if key in index])
    if found is None:
        raise UserError(f"{folder}: no cache there: make it by `codi data cache` with this recipe")
    return found


class CachedSource:
    """A source whose samples have, beside their own columns, `latent` (2C, h, w), `text` (L, D) and further tensors of
    the prompt, such as XL's `pooled` (P,). Its crops are the cached ones."""

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
        """As `Source.read`; each of `crops` chooses one of the cached crops, None takes the first. Raises UserError for
        a sample that is not the one that was cached."""
        chosen = [0] * len(indices) if crops is None else [int(rng.integers(self.variants)) for rng in crops]
        keys = list(zip(indices, chosen, strict=True))
        found = self.source.read(indices, size, [_crop(self.seed, i, variant) for i, variant in keys])
        return [
            self._with_columns(sample, variant) if isinstance(sample, Sample) else sample
            for sample, variant in zip(found, chosen, strict=True)
        ]

    def _with_columns(self, sample: Sample, variant: int) -> Sample | CorruptSample:
        row = self._rows[sample.index]
        if row < 0:
            return CorruptSample(sample.index, sample.name, f"was unreadable when {self.folder} was made")
        if self._marks[sample.index] != _mark(sample.name, _prompt(self.task, sample)):
            raise UserError(f"{sample.name}: has another name or prompt than in {self.folder}: rebuild the cache")
        number, at = divmod(sample.index, self.shard_size)
        try:
            with safe_open(_shard(self.folder, number), "pt") as file:
                names = [name for name in file.keys() if name not in (LATENT, *_INDICES)]  # noqa: SIM118 # no mapping
                columns = {LATENT: file.get_slice(LATENT)[at, variant]}
                columns |= {name: file.get_slice(name)[row] for name in names}
        except (OSError, SafetensorError) as error:
            raise _unusable(_shard(self.folder, number), one_line(error)) from error
        return replace(sample, extras=sample.extras | columns)


def _unusable(shard: Path, fault: str) -> UserError:
    return UserError(f"{shard}: {fault}: the `codi data cache` command that made it makes what is missing")


def stored(batch: Batch, dropped: Tensor, blank: Bundle) -> tuple[Tensor, Bundle]:
    """Of a batch of a CachedSource the moments (B, 2C, h, w), as `codec.draw` takes them, and the prompts' bundle,
    float32; `blank`, that of one empty prompt, where `dropped` (B,)."""
    bundle = {
        name: torch.where(
            dropped.view(-1, *[1] * (empty.ndim - 1)),
            empty,
            batch.extras[TEXT if name == FEATURES else name].to(empty),
        )
        for name, empty in blank.items()
    }
    return batch.extras[LATENT].float(), bundle
