"""Opening and saving as diffusers does: the options of `from_pretrained`, and what a saved folder calls its class."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..files import write_text
from ..models.backbones import Backbone, Hub

LOADING = (
    "device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "offload_state_dict", "quantization_config",
    "force_download", "proxies", "disable_mmap",
)  # fmt: skip
PARTS = tuple(field.name for field in fields(Backbone))
# What the stock pipelines of these checkpoints have beside the parts: users leave them out by name, and so do we.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker", "trust_remote_code")
ENTRY = "pipeline"  # the file, with .py, that lets diffusers open a saved folder with its adapters
ENTRY_TEXT = '''"""Opens this folder with its adapters, by from_pretrained(folder, trust_remote_code=True)."""

from codi import CoDiPipeline

__all__ = ["CoDiPipeline"]
'''


def sorted_options(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return from_pretrained's further options in two parts: which files (see Hub), and what diffusers is passed.

    Raises UserError for one that there is not, and for weights that would have to be unpickled.
    """
    known = (*Hub.__annotations__, *LOADING, *PARTS, *UNUSED, "tiny_vae", "use_safetensors")
    for option in options:
        if option not in known:
            hint = nearest(option, known) or f": use {', '.join((*Hub.__annotations__, *LOADING))}, or a part's name"
            raise UserError(f"{option}: no such option{hint}")
    if options.get("use_safetensors") is False:
        raise UserError("use_safetensors False: pickled weights may run code: convert them to safetensors first")
    hub = {name: value for name, value in options.items() if name in Hub.__annotations__}
    return hub, {name: value for name, value in options.items() if name in (*LOADING, *PARTS)}


def name_class(folder: Path, name: str | list[str]) -> None:
    """Write into a saved pipeline's index which class opens it; a list begins with the file that defines it."""
    index = folder / "model_index.json"
    parts = {**json.loads(index.read_text()), "_class_name": name}
    write_text(index, json.dumps(parts, indent=2) + "\n")
    if isinstance(name, list):
        (folder / f"{ENTRY}.py").write_text(ENTRY_TEXT)
    else:
        (folder / f"{ENTRY}.py").unlink(missing_ok=True)
