"""Load pretrained diffusion models of any family from a folder, a single file or a hub id."""

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
EMBEDDED = Path(__file__).resolve().parents[2] / "weights"  # the models shipped inside the package
# Upper limits of integers in configurations, by a word in their key. The largest known networks have some hundred
# layers.
MOST = {"layers": 1_000, "blocks": 1_000, "timesteps": 100_000, "": 100_000_000}


class Hub(TypedDict, total=False):
    """Options that select a model's files and how they are fetched, passed on to diffusers unchanged. `config`, for a
    single file: the folder or hub id in diffusers' layout that has its configs and tokenizers; without it diffusers
    fetches them."""

    revision: str | None
    variant: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    config: str | Path | None


def digest(network: torch.nn.Module) -> str:
    """Return 12 hex digits that identify a network's weights: SHA-256 over names and float16 values, so that a copy
    stored in float16 has the same digest. An adapter fits every backbone of its `family`; the digest identifies the
    one it was trained on."""
    return digest_weights(network.state_dict())


def digest_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the `digest` of a network's state dict, without the low-rank updates in it."""
    hasher = hashlib.sha256()
    own = {name.replace(".base_layer.", "."): value for name, value in weights.items() if "lora_" not in name}
    for name, value in sorted(own.items()):
        hasher.update(name.encode())
        hasher.update(value.to("cpu", torch.float16).numpy().tobytes())
    return hasher.hexdigest()[:12]


def find_model(name: str | Path) -> str:
    """Return the folder of an embedded model such as 'mini'; return a path or hub id unchanged."""
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

    `loras`: {file, folder or hub id: weight} of low-rank updates, in any format that diffusers reads, to fuse into the
    weights. `text`: load the text encoders, which prompts need. `given`: components that replace the model's own, and
    further options of diffusers' `from_pretrained`, such as device_map. A folder that has only the variant "fp16" is
    loaded from that. Only safetensors are read. Raises UserError if the model does not exist, is not supported or has
    broken weights, and for an option that is not in `Hub`.
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
        # The LoRA may also change the text encoders, so load them, fuse, and drop them afterwards.
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
    """Fuse LoRAs into the weights of a pipeline. Raises UserError for one that does not fit this model."""
    if not isinstance(loras, Mapping):
        raise UserError(f"loras {one_line(repr(loras))}: not a dict: give {{file: weight}}, such as {{FILE: 1.0}}")
    for lora, weight in loras.items():
        try:
            pipe.load_lora_weights(str(lora), use_safetensors=True)
            if not pipe.get_list_adapters():  # diffusers silently ignores a file whose keys do not match
                raise ValueError("none of its weights are for this model")
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()
        except Exception as error:
            raise UserError(
                f"{lora}: not a LoRA for {name} ({one_line(error)}): check the file and the model"
            ) from error


def _take_parts(pipe: Any, kind: Family, overrides: Mapping[str, Any], name: str) -> Backbone:
    """Return the Backbone of a diffusers pipeline, with components replaced by `overrides`. Raises UserError for
    components that are not supported or do not fit together."""
    kind.require_scheduler(pipe.scheduler, name)
    values = named_parts(pipe)
    parts = {field.name: values.get(field.name, field.default) for field in fields(Backbone)}
    try:
        backbone = Backbone(**{**kind.prepare_parts(parts), **{k: v for k, v in overrides.items() if k in parts}})
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name}: its configuration has an invalid value ({one_line(error)}): fetch the model again"
        ) from error
    kind.require_usable(backbone, name)
    return backbone


def load_vae(model: str | Path) -> Any:
    """Return a model's VAE in float32. Of a folder or hub id only the VAE is read, so the network may be of any family.
    Raises UserError as load_backbone does."""
    source = find_model(model)
    if not (Path(source) / "vae").is_dir() and (Path(source).exists() or source.count("/") != 1):
        return load_backbone(model).vae
    try:
        source, options = resolve_source(source, "vae")
        require_safetensors(Path(source) / "vae")
        require_buildable(Path(source) / "vae")
        vae_class: Any = codec.vae_class(source, **{k: v for k, v in options.items() if k == "revision"})
        vae = vae_class.from_pretrained(source, subfolder="vae", use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{model}: its VAE could not be loaded ({one_line(error)}): check the path or id") from error
    require_finite(vae, f"{model}/vae")
    return vae.float()


def _open(
    source: str, dtype: torch.dtype, hub: dict[str, Any], text: bool, overrides: dict[str, Any]
) -> tuple[Any, Family]:
    """Return diffusers' own pipeline of the model, and its family."""
    path = Path(source)
    if path.is_file():
        return _open_file(path, dtype, {**hub, **overrides})
    options = {key: value for key, value in hub.items() if key != "config"}
    local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if local and not (path / "model_index.json").is_file():
        raise UserError(
            f"{source}: no model there (a diffusers folder has a model_index.json): "
            "give 'mini', such a folder, a .safetensors file or a hub id"
        )
    source, revision = revision_of(source)
    fetching = {**{key: value for key, value in options.items() if key != "variant"}, **revision}
    index: Any = DiffusionPipeline.load_config(source, **fetching)
    kind = family_of_index(index, source)
    _, defaults = resolve_source(source, kind.component)
    options = {**defaults, **options, **revision}  # "id@revision" takes precedence over the option `revision`
    if "variant" in defaults:
        options["variant"] = options.get("variant") or defaults["variant"]
    # Pass None for text encoders that are not wanted or not in the folder: diffusers refuses a folder that lacks one.
    encoders = {name: part for name, part in index.items() if name.startswith("text_encoder")}
    options |= {name: None for name, part in encoders.items() if not text or part[0] is None}
    options |= dict.fromkeys(_unread_parts(kind, index))
    for name in {field.name for field in fields(Backbone)} & set(index) - set(options) - set(overrides):
        require_safetensors(path / name)
        require_buildable(path / name)
    return kind.open_folder(source, index, dtype, {**options, **overrides}), kind


def _unread_parts(kind: Family, index: Mapping[str, Any]) -> list[str]:
    """Return the components in a model_index.json that the stock pipeline would load but codi does not use, such as a
    safety checker; they may be absent."""
    accepted = {name for pipeline in kind.pipelines for name in inspect.signature(stock(pipeline).__init__).parameters}
    used = {field.name for field in fields(Backbone)}
    return [name for name, part in index.items() if isinstance(part, list) and name in accepted - used]


def require_buildable(folder: Path) -> None:
    """Raise UserError for a component whose configuration is not a JSON object or has a number above its limit in
    MOST, with which diffusers would hang. Also for NaN, and for a scaling or shift factor of latents that is not a
    number, which would show only as bad pictures."""
    for file in (folder / "config.json", folder / "scheduler_config.json"):
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):  # diffusers reports what is wrong
            continue
        if not isinstance(config, dict):
            raise UserError(f"{file}: holds {one_line(repr(config))}, not a JSON object: fetch the model again")
        config.pop("info", None)  # metadata of an adapter, not used to build it
        for key, number in _numbers(config):
            limit = next((limit for word, limit in MOST.items() if word in key))
            if isinstance(number, int) and number > limit:
                raise UserError(f"{file}: {key} is above {limit:,}: fetch the model again")
            if math.isnan(number):
                raise UserError(f"{file}: {key} is NaN: fetch the model again")
        for key in ("scaling_factor", "shift_factor"):
            if not isinstance(config.get(key), (int, float, type(None))):
                raise UserError(f"{file}: {key} {one_line(repr(config[key]))} is not a number: fetch the model again")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield (key, number) for all numbers of a configuration, also in nested lists and objects."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif isinstance(value, (int, float)):
            yield key, value


def require_safetensors(folder: Path) -> None:
    """Raise UserError for a local folder whose weights are all in other formats."""
    names = [file.name for file in folder.glob("*")] if folder.is_dir() else []
    others = sorted(name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if others and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder}: has weights in {others[0]}, which may run code when it is read, and not as "
                        f"safetensors: {CONVERT}")  # fmt: skip


def _open_file(path: Path, dtype: torch.dtype, hub: dict[str, Any]) -> tuple[Any, Family]:
    """Return diffusers' own pipeline of a single file, and its family."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: not a .safetensors file, and others may run code: if you trust it, convert it with "
                        "diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(NEW)")  # fmt: skip
    # Only configs are fetched, and the model's revision and variant do not apply to them.
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
    """Split "id@revision" into the hub id and {"revision": ...}; return a folder or plain id with no options."""
    name, separator, revision = source.rpartition("@")
    return (source, {}) if Path(source).is_dir() or not separator else (name, {"revision": revision})


def resolve_source(source: str, part: str) -> tuple[str, dict[str, Any]]:
    """Return a folder or hub id as diffusers takes it, and the options to load it with: the variant "fp16" if a folder
    has no other weights of `part`, the revision of "id@revision"."""
    folder = Path(source)
    if folder.is_dir():
        weights = [file.name for file in (folder / part).glob("*.safetensors")]
        return source, {"variant": "fp16"} if weights and all(".fp16" in name for name in weights) else {}
    return revision_of(source)


def require_finite(module: torch.nn.Module, name: str) -> None:
    """Raise UserError if a weight of `module` is missing, NaN or infinite."""
    for key, value in module.state_dict().items():
        if value.is_meta:
            raise UserError(f"{name}: weight {key!r} is missing: fetch or train the file again")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: weight {key!r} is NaN or infinite: fetch or train the file again")


def with_network(model: str | Path, network: Path, out: Path) -> Path:
    """Write the checkpoint `model`, with its network replaced by that in the folder `network` (of a full adapter), to
    `out` in diffusers' layout, unless `out` has a checkpoint already. Return `out`."""
    if not (out / "model_index.json").is_file():
        backbone = load_backbone(model)
        require_buildable(network)
        network_class: Any = type(backbone.network)
        setattr(backbone, backbone.kind.component, network_class.from_pretrained(network, dtype=backbone.network.dtype))
        write_folder(out, backbone.pipeline().save_pretrained)
    return out
