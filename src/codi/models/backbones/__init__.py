"""Pretrained diffusion models behind one protocol: `base.Family`, one file a family, listed in `registry`."""

from .base import Backbone, Family, Fuse
from .loading import (
    EMBEDDED,
    Hub,
    digest,
    digest_weights,
    find_model,
    load_backbone,
    load_vae,
    require_buildable,
    require_finite,
    require_safetensors,
    resolve_source,
    revision_of,
    with_network,
)
from .registry import FAMILIES, family_of, family_of_index, family_of_text

__all__ = [
    "EMBEDDED", "FAMILIES", "Backbone", "Family", "Fuse", "Hub", "digest", "digest_weights", "family_of",
    "family_of_index", "family_of_text", "find_model", "load_backbone", "load_vae", "require_buildable",
    "require_finite", "require_safetensors", "resolve_source", "revision_of", "with_network",
]  # fmt: skip
