"""Text features of the prompts that a training needs besides those of its data, stored in a cache (see cache)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.batches import Batch, collate
from ..data.samples import Sample
from ..data.sources import Source
from ..errors import UserError
from ..models.text import Bundle, PromptEncoder, join
from .distill_recipe import DistillRecipe, recipe_task

PROMPTS = "prompts.safetensors"  # the empty prompt and those of the held-out images, which previews need


class PromptCache:
    """Precomputed bundles of a few prompts, called as `PromptEncoder.encode`: replaces the text encoders."""

    def __init__(self, known: dict[str, Bundle]) -> None:
        self._known = known

    @classmethod
    def of(cls, text: PromptEncoder, prompts: Sequence[str]) -> PromptCache:
        """Compute the bundles of these prompts."""
        return cls({prompt: text.encode([prompt], warn=False) for prompt in dict.fromkeys(prompts)})

    @classmethod
    def load(cls, file: Path) -> PromptCache:
        """Read a file that `save` wrote."""
        with safe_open(file, "pt") as opened:
            prompts = json.loads(opened.metadata()["prompts"])
            bundle = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 # no mapping
        rows = enumerate(prompts)
        return cls({prompt: {name: value[i : i + 1] for name, value in bundle.items()} for i, prompt in rows})

    def save(self, file: Path) -> None:
        """Write all bundles to a safetensors file, the prompts in its metadata."""
        bundle = {name: value.cpu().contiguous() for name, value in join(list(self._known.values())).items()}
        save_file(bundle, file, {"prompts": json.dumps(list(self._known))})

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._known

    def __call__(self, prompts: Sequence[str]) -> Bundle:
        return join([self._known[prompt] for prompt in prompts])


def held_out_batch(recipe: DistillRecipe, source: Source) -> Batch:
    """Return the held-out samples for previews, at most 64. Raises UserError if none can be read."""
    results = source.read(range(min(64, len(source))), recipe.size)
    samples = [s for s in results if isinstance(s, Sample)]
    if not samples:
        raise UserError(f"{recipe.held_out}: no picture could be read: check the data set")
    return collate(samples)


def cached_prompts(recipe: DistillRecipe, held_out: Source) -> PromptCache | None:
    """Return the bundles of the empty prompt and the held-out ones if the cache holds them all, so that the text
    encoders need not be loaded; None otherwise."""
    folder = Path(recipe.cache or "")
    if not recipe.cache or not (folder / PROMPTS).is_file():
        return None
    try:
        known, index = PromptCache.load(folder / PROMPTS), json.loads((folder / "index.json").read_text())
    except (OSError, SafetensorError, KeyError, ValueError):  # they are computed instead
        return None
    if (index.get("model"), index.get("loras")) != (recipe.model, dict(recipe.loras)):
        return None  # the text encoders may differ: once loaded, their weights are compared
    needed = ["", *recipe_task(recipe).prompts(held_out_batch(recipe, held_out))]
    return known if all(prompt in known for prompt in needed) else None
