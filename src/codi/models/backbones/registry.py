"""The supported families of backbones, and how the family of a model is recognized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from .base import Family, stock
from .flux import Flux
from .flux2 import Flux2
from .qwen_image import QwenImage
from .sana import Sana
from .sd3 import StableDiffusion3
from .stable_diffusion import StableDiffusion
from .zimage import ZImage

FAMILIES: tuple[Family, ...] = (StableDiffusion(), Flux(), StableDiffusion3(), Sana(), ZImage(), Flux2(), QwenImage())
_CODI_PIPELINE = "CoDiPipeline"  # the class name in the index of pipelines saved by codi


def family_of(network: Any) -> Family:
    """Return the family of a network, given the network or its configuration. Raises UserError for an unsupported
    class."""
    name = network.get("_class_name") if isinstance(network, Mapping) else type(network).__name__
    known = {kind.network: kind for kind in FAMILIES}
    if name is None:  # configurations in old adapters have no class
        return FAMILIES[0]
    if name not in known:
        raise UserError(f"{name}: not a network that codi knows: use one of {', '.join(known)}")
    return known[name]


def family_of_text(parts: Any) -> Family:
    """Return the family of a pipeline without a network, by the classes of its text encoders."""
    encoders = {name: getattr(parts, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    present = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    for kind in FAMILIES:
        for pipeline in kind.pipelines:
            types = stock(pipeline)._get_signature_types()
            same = bool(present) and set(present) == {name for name in types if name.startswith("text_encoder")}
            if same and all(isinstance(encoder, types[name]) for name, encoder in present.items()):
                return kind
    raise UserError("pipeline: has no network: pass unet=... or transformer=...")


def family_of_index(index: Mapping[str, Any], source: str) -> Family:
    """Return the family of a model, given its model_index.json. Raises UserError for a model that is not supported, and
    for variants whose input is more than noise and a prompt."""
    name: Any = index.get("_class_name")
    pipeline = str(name[-1] if isinstance(name, list) and name else name)  # a list: [file that defines it, class]
    for kind in FAMILIES:
        part = index.get(kind.component)
        if part and part[-1] == kind.network:
            kind.require_pipeline(pipeline, source)
            return kind
    names = ", ".join(kind.name for kind in FAMILIES)
    network = next((index[c][-1] for c in ("transformer", "unet") if index.get(c) and index[c][-1]), "no network")
    what = "a video model" if "Video" in pipeline or "3D" in str(network) else f"a {pipeline} ({network})"
    raise UserError(f"{source}: {what} is not supported: use a text-to-image model of {names}")
