"""Loading a pretrained diffusion model of any family: a folder, a single file or a hub id."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ...errors import UserError, nearest, one_line
from ...files import write_folder
from .. import codec
from .base import Backbone, Family, named_parts, stock
from .registry import FAMILIES, family_of_index

CONVERT = (
    "if you trust it, convert it with diffusers: "
    "DiffusionPipeline.from_pretrained(MODEL, use_safetensors=False).save_pretrained(NEW)"
)
EMBEDDED = Path(__file__).resolve().parents[2] / "weights"  # what ships inside the package
# Of whole numbers in configurations, by a word of their key. The largest known networks have some hundred layers.
MOST = {"layers": 1_000, "blocks": 1_000, "timesteps": 100_000, "": 100_000_000}


class Hub(TypedDict, total=False):
    """Which files of a model are meant, and how they are fetched: options that diffusers gets as they are. `config`: of
    a single file, a folder or hub id in diffusers' layout whose configs and tokenizers belong to it; without one
    diffusers fetches them."""

    revision: str | None
    variant: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    config: str | Path | None


def digest(network: torch.nn.Module) -> str:
    """Which weights: 12 hex digits of SHA-256 over names and float16 values, so that a copy stored in halves is the
    same. `family` says what an adapter fits; this, what it was trained on."""
    return digest_weights(network.state_dict())


def digest_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """As digest, of a network's state. Low-rank updates that it carries are left out."""
    hasher = hashlib.sha256()
    named = {name.replace(".base_layer.", "."): value for name, value in weights.items() if "lora_" not in name}
    for name, value in sorted(named.items()):
        hasher.update(name.encode())
        hasher.update(value.to("cpu", torch.float16).numpy().tobytes())
    return hasher.hexdigest()[:12]


def find_model(name: str | Path) -> str:
    """'mini' -> the embedded checkpoint's folder; anything else is a path or a hub id, returned as it is."""
    embedded = EMBEDDED / str(name)
    return str(embedded) if (embedded / "model_index.json").is_file() else str(name)


def load_backbone(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    loras: Mapping[str, float] | None = None,
    text: bool = True,
    given: Mapping[str, Any] | None = None,
    **hub: Unpack[Hub],
) -> Backbone:
    """Load 'mini', a diffusers folder of a supported family, a single .safetensors file, or a hub id, which may name a
    revision: "id@revision".

    `loras`: files, folders or hub ids of low-rank updates in any format that diffusers reads, and how much of each is
    made part of the weights. `text`: with the text encoders; without, prompts cannot be read. Of a folder that has its
    weights as the variant "fp16" alone, these are taken. `given`: parts in place of the model's, and further options of
    diffusers' `from_pretrained`, such as device_map. Only safetensors are read. Raises UserError where there is no
    such model, it is of another kind or its weights are broken, and for an option that is none of `Hub`.
    """
    for option in hub:
        if option not in Hub.__annotations__:
            known = tuple(Hub.__annotations__)
            raise UserError(f"{option}: no such option{nearest(option, known)}: use {', '.join(known)}")
    source, given = find_model(name), dict(given or {})
    try:
        pipe, kind = _open(source, dtype, dict(hub), text, given)
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds; the user needs one line
        fix = "check the path or id"
        if Path(source).is_file() and not hub.get("config"):
            fix = "its configs are fetched from the hub: connect, or pass config (--config), a folder or id of its kind"
        raise UserError(f"{name}: the model could not be loaded ({one_line(error)}): {fix}") from error
    try:
        _fuse_loras(pipe, loras or {}, str(name))
    except UserError:
        if text:
            raise
        # They may have updates of the text encoders, which then have to be there.
        whole = load_backbone(name, dtype, loras, **hub)
        return replace(whole, **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")))
    backbone = _take_parts(pipe, kind, given, str(name))
    if text and not any(part.startswith("text_encoder") and value is None for part, value in given.items()):
        kind.require_text(backbone, str(name))
    for field in fields(backbone):
        part = getattr(backbone, field.name)
        if isinstance(part, torch.nn.Module):
            require_finite(part, f"{name}/{field.name}")
    return backbone


def _fuse_loras(pipe: Any, loras: Mapping[str, float], name: str) -> None:
    """Make low-rank updates a part of the weights. Raises UserError for one that is none for this model."""
    if not isinstance(loras, Mapping):
        raise UserError(f"loras {one_line(repr(loras))}: not a dict: give {{file: weight}}, such as {{FILE: 1.0}}")
    for lora, weight in loras.items():
        try:
            pipe.load_lora_weights(str(lora), use_safetensors=True)
            if not pipe.get_list_adapters():  # diffusers takes a file of other keys for none at all
                raise ValueError("none of its weights are for this model")
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()
        except Exception as error:
            raise UserError(
                f"{lora}: not a LoRA for {name} ({one_line(error)}): check the file and the model"
            ) from error


def _take_parts(pipe: Any, kind: Family, given: Mapping[str, Any], name: str) -> Backbone:
    """Return the parts of diffusers' pipeline, with those that are given in their place. Raises UserError for parts
    that are of another kind or that do not fit together."""
    kind.require_scheduler(pipe.scheduler, name)
    values = named_parts(pipe)
    parts = {field.name: values.get(field.name, field.default) for field in fields(Backbone)}
    try:
        backbone = Backbone(**{**kind.prepare_parts(parts), **{k: v for k, v in given.items() if k in parts}})
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name}: a value of its configurations will not do ({one_line(error)}): fetch it again"
        ) from error
    kind.require_usable(backbone, name)
    return backbone


def load_vae(model: str | Path) -> Any:
    """The VAE of a model in float32; of a folder or a hub id nothing else is read, so that any family's will do.
    Raises UserError as load_backbone does."""
    source = find_model(model)
    if not (Path(source) / "vae").is_dir() and (Path(source).exists() or source.count("/") != 1):
        return load_backbone(model).vae
    try:
        source, options = resolved(source, "vae")
        require_safetensors(Path(source) / "vae")
        require_buildable(Path(source) / "vae")
        kind: Any = codec.vae_class(source, **{k: v for k, v in options.items() if k == "revision"})
        vae = kind.from_pretrained(source, subfolder="vae", use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{model}: its VAE could not be loaded ({one_line(error)}): check the path or id") from error
    require_finite(vae, f"{model}/vae")
    return vae.float()


def _open(
    source: str, dtype: torch.dtype, hub: dict[str, Any], text: bool, given: dict[str, Any]
) -> tuple[Any, Family]:
    """Return diffusers' own pipeline of the model, and its family."""
    path = Path(source)
    if path.is_file():
        return _open_file(path, dtype, {**hub, **given})
    options = {key: value for key, value in hub.items() if key != "config"}
    local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if local and not (path / "model_index.json").is_file():
        raise UserError(
            f"{source}: no model there (a diffusers folder has a model_index.json): "
            "give 'mini', such a folder, a .safetensors file or a hub id"
        )
    source, at = revision_of(source)
    fetching = {**{key: value for key, value in options.items() if key != "variant"}, **at}
    index: Any = DiffusionPipeline.load_config(source, **fetching)
    kind = family_of_index(index, source)
    _, found = resolved(source, kind.component)
    options = {**found, **options, **at}  # "@" says more than an option
    if "variant" in found:
        options["variant"] = options.get("variant") or found["variant"]
    # Those that are left out, or that the folder lacks, are named: diffusers refuses a folder that lacks one.
    encoders = {name: part for name, part in index.items() if name.startswith("text_encoder")}
    options |= {name: None for name, part in encoders.items() if not text or part[0] is None}
    options |= dict.fromkeys(_unused(kind, index))
    for name in {field.name for field in fields(Backbone)} & set(index) - set(options) - set(given):
        require_safetensors(path / name)
        require_buildable(path / name)
    return kind.open_folder(source, index, dtype, {**options, **given}), kind


def _unused(kind: Family, index: Mapping[str, Any]) -> list[str]:
    """Name the parts of a model_index.json that the stock pipeline would load and nothing here reads, as a safety
    checker: they may be absent."""
    taken = {name for pipeline in kind.pipelines for name in inspect.signature(stock(pipeline).__init__).parameters}
    read = {field.name for field in fields(Backbone)}
    return [name for name, part in index.items() if isinstance(part, list) and name in taken - read]


def require_buildable(folder: Path) -> None:
    """Raise UserError for the folder of a part whose configuration is no object, or has a number above what MOST says
    for its key: diffusers would search the former for keys, or build the latter, without an end. Also for NaN, and a
    factor of latents that is no number, which show only in the picture."""
    for file in (folder / "config.json", folder / "scheduler_config.json"):
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):  # diffusers says what is wrong
            continue
        if not isinstance(config, dict):
            raise UserError(f"{file}: holds {one_line(repr(config))} and no object: fetch the model again")
        config.pop("info", None)  # of an adapter: what it is, not how it is built
        for key, number in _numbers(config):
            most = next((most for word, most in MOST.items() if word in key))
            if isinstance(number, int) and number > most:
                raise UserError(f"{file}: {key} is above {most:,}: fetch the model again")
            if math.isnan(number):
                raise UserError(f"{file}: {key} is NaN: fetch the model again")
        for key in ("scaling_factor", "shift_factor"):
            if not isinstance(config.get(key), (int, float, type(None))):
                raise UserError(f"{file}: {key} {one_line(repr(config[key]))} is no number: fetch the model again")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers of a configuration, in lists and objects too, each with the key that it stands under."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, (int, float)):
            yield key, value


def require_safetensors(folder: Path) -> None:
    """Raise UserError for a folder on this machine that has weights in other formats alone."""
    names = [file.name for file in folder.glob("*")] if folder.is_dir() else []
    others = sorted(name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if others and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder}: has its weights in {others[0]}, which may run code when it is read, and not as "
                        f"safetensors: {CONVERT}")  # fmt: skip


def _open_file(path: Path, dtype: torch.dtype, hub: dict[str, Any]) -> tuple[Any, Family]:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: not a .safetensors file, and others may run code: if you trust it, convert it with "
                        "diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(NEW)")  # fmt: skip
    # Only its configs are fetched: they have neither the model's revision nor its variants.
    fetching = {key: value for key, value in hub.items() if key not in ("revision", "variant")}
    if fetching.get("config"):
        fetching["config"] = str(fetching["config"])
        for folder in sorted(Path(fetching["config"]).glob("*/")):
            require_buildable(folder)
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    kind = next((kind for kind in FAMILIES if kind.holds(keys)), FAMILIES[0])
    return kind.open_file(path, keys, dtype, fetching), kind


def revision_of(source: str) -> tuple[str, dict[str, Any]]:
    """Part "id@revision" of a hub id; a folder has none."""
    name, at, revision = source.rpartition("@")
    return (source, {}) if Path(source).is_dir() or not at else (name, {"revision": revision})


def resolved(source: str, part: str) -> tuple[str, dict[str, Any]]:
    """A folder or hub id as diffusers takes it, and with which options: the variant "fp16" where a folder has no other
    weights of `part`, the revision of "id@revision"."""
    folder = Path(source)
    if folder.is_dir():
        weights = [file.name for file in (folder / part).glob("*.safetensors")]
        return source, {"variant": "fp16"} if weights and all(".fp16" in name for name in weights) else {}
    return revision_of(source)


def require_finite(module: torch.nn.Module, name: str) -> None:
    """Raises UserError if a weight of `module` is missing, NaN or infinite."""
    for key, value in module.state_dict().items():
        if value.is_meta:
            raise UserError(f"{name}: weight {key!r} is missing: fetch or train the file again")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: weight {key!r} is NaN or infinite: fetch or train the file again")


def with_network(model: str | Path, network: Path, out: Path) -> Path:
    """Write to `out` the checkpoint `model` with the network in the folder `network` (of a full adapter), in
    diffusers' layout. Returns `out`; what is there already stays."""
    if not (out / "model_index.json").is_file():
        b = load_backbone(model)
        require_buildable(network)
        kind: Any = type(b.network)
        setattr(b, b.kind.component, kind.from_pretrained(network, dtype=b.network.dtype))
        write_folder(out, b.pipeline().save_pretrained)
    return out
