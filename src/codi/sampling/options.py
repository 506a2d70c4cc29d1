"""Options of `from_pretrained`, and the class name in the index of a saved pipeline."""

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
# Arguments of the stock pipelines that we accept and ignore: users pass them to leave parts out.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker", "trust_remote_code")
ENTRY = "pipeline"  # the file, with .py, that lets diffusers open a saved folder with its adapters
ENTRY_TEXT = '''"""Opens this folder with its adapters, by from_pretrained(folder, trust_remote_code=True)."""

from codi import CoDiPipeline

__all__ = ["CoDiPipeline"]
'''


def split_options(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split the options of from_pretrained into those that select files (see Hub) and those passed to diffusers.

    Raises UserError for an unknown option, and for pickled weights.
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


def write_class_name(folder: Path, name: str | list[str]) -> None:
    """Write the class that opens a saved pipeline into its index; a list starts with the file that defines it."""
    index = folder / "model_index.json"
    parts = {**json.loads(index.read_text()), "_class_name": name}
    write_text(index, json.dumps(parts, indent=2) + "\n")
    if isinstance(name, list):
        (folder / f"{ENTRY}.py").write_text(ENTRY_TEXT)
    else:
        (folder / f"{ENTRY}.py").unlink(missing_ok=True)
