"""diffusers' own classes, imported by name when first used, because importing all of them takes seconds."""

from __future__ import annotations

import logging
from typing import Any

import diffusers


def stock(name: str) -> Any:
    """Return a class of diffusers by its name, without transformers' warnings about packages that are not installed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return getattr(diffusers, name)
    finally:
        logger.setLevel(level)


def opener(name: str) -> Any:
    """Return a pipeline class of diffusers that also opens folders whose index names a class defined in the folder, as
    pipelines saved by codi do. Only the components are loaded; the code in that file is not run."""
    kind = stock(name)

    class Opener(kind):
        @classmethod
        def _dict_from_json_file(cls, *args: Any) -> dict[str, Any]:
            index = super()._dict_from_json_file(*args)
            return {**index, "_class_name": name} if isinstance(index.get("_class_name"), list) else index

    Opener.__name__ = name
    return Opener
