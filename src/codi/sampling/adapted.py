"""Base of the pipeline: loading, activating, moving and saving a backbone and its adapters, without sampling."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import unwritable
from ..models import codec
from ..models.adapter import Adapter
from ..models.backbones import Backbone, Family, family_of, family_of_text, find_model, load_backbone
from ..models.hooks import device_of
from ..models.lora import lora_state
from ..models.student import Student
from ..models.text import PromptEncoder, limit_tokenizers
from ..models.tiny import TINY, mark_saved, open_decoder, saved_decoder
from ..schedule import Schedule
from ..tasks import Task, get_task
from .adapter_store import AdapterStore
from .diffusers_mixin import DiffusersMixin
from .guidance import Guidance, resolve
from .loras import LoraLoaderMixin
from .options import ENTRY, split_options, write_class_name
from .saved import require_sources, save_adapters
from .tiles import Tiles


class AdaptedPipeline(DiffusersMixin, LoraLoaderMixin):
    """Backbone and adapters as one diffusers pipeline; CoDiPipeline adds the sampling."""

    # Parts of all model families; those that a checkpoint lacks are None.
    _optional_components = [
        "unet", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
        "tokenizer_3", "tiny_vae",
    ]  # fmt: skip

    def __init__(
        self,
        vae: Any,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        unet: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        tiny_vae: Any = None,
        transformer: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        is_distilled: bool = False,
    ) -> None:
        super().__init__()
        parts = {
            "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler,
            "text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2, "tiny_vae": tiny_vae,
            "transformer": transformer, "text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3,
        }  # fmt: skip
        limit_tokenizers(parts)
        self._store = AdapterStore(unet if unet is not None else transformer, "")
        # Do not set parts of other families as attributes: diffusers code tests hasattr(pipe, "transformer").
        always = ("vae", "text_encoder", "tokenizer", "scheduler", "tiny_vae")
        self.register_modules(**{name: part for name, part in parts.items() if part is not None or name in always})
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, is_distilled=is_distilled)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                lora_state(part)  # raises UserError for LoRAs that are not supported
                part.requires_grad_(False).eval()
        # Limit the list to this family's parts: the class lists those of all families.
        self._optional_components = [name for name in always if parts[name] is None or name == "tiny_vae"]
        self._store.family = self._family()
        self._set_up_vae(vae)
        self.solver: Any = None
        """A diffusers scheduler that replaces our samplers, for comparisons; it samples without guidance."""
        self.shift: float | None = None
        """Shift of the time grid (see sampler.time_grid); None: the adapter's default."""

    # ---- models and adapters

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        task: str | None = None,
        adapter: str | Path | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        loras: Mapping[str, float] | None = None,
        decoder: str | Path | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint of a supported family or a saved CoDiPipeline, and activate an adapter.

        `model`: "mini", "photo", a diffusers folder, a single .safetensors file or a hub id, which may end in
        "@revision". `adapter`: the name of one in the model's folder `adapters` or of an embedded one, or a folder;
        None loads the one for `task`. `dtype`: float32 by default; `torch_dtype` is its older name. `loras`: files of
        LoRAs to merge into the backbone, with weights. `decoder`: "full", "tiny" (the one in the model's folder), or an
        AutoencoderTiny folder or hub id; None: as the pipeline was saved, else the full one. `options`: revision,
        variant, token, cache_dir, local_files_only and config of the model; parts that replace the model's
        (`vae=...`, `text_encoder=None`); device_map, quantization_config and other loading options of diffusers (see
        options.LOADING). Raises UserError for a missing or broken model, adapter or decoder, or one made for another
        backbone or task.
        """
        if task is not None:
            get_task(task)
        hub, loading = split_options(options)
        types: Any = dtype or torch_dtype or torch.float32
        backbone, folder = load_backbone(model, types, loras, given=loading, **hub), Path(find_model(model))
        tiny_type = types.get("tiny_vae", types.get("default", torch.float32)) if isinstance(types, dict) else types
        tiny = options.get("tiny_vae")
        if tiny is None:
            tiny = open_decoder(decoder or saved_decoder(folder), model, backbone.vae, tiny_type, **hub)
        pipe = cls(**vars(backbone), tiny_vae=tiny)
        if (device_map := loading.get("device_map")) is not None:
            placed = {name: str(device_of(part)) for name, part in pipe.components.items() if hasattr(part, "device")}
            pipe.hf_device_map = placed if device_map == "balanced" else device_map
        pipe._store.model = model
        super(AdaptedPipeline, pipe).register_to_config(_name_or_path=str(folder))  # ours also loads adapters
        if pipe.network is not None:
            pipe._store.load_saved(folder)
        pipe._set(task, adapter)
        return pipe

    def _set(self, task: str | None, adapter: str | Path | None) -> None:
        """Activate this adapter, or one for `task` if none is active."""
        store = self._store
        candidates = [name for name, entry in store.loaded.items() if entry.task.name == task]
        if adapter is not None:
            store.set(store.load(adapter, task=task))
        elif task is not None and task not in [entry.task.name for entry in store.active.values()]:
            store.set(candidates[0] if candidates else store.load(task, task=task))

    def register_to_config(self, **kwargs: Any) -> None:
        """Store settings; when diffusers has just opened a saved pipeline, also load its adapters and decoder.

        `DiffusionPipeline.from_pretrained(folder)` constructs the pipeline from the checkpoint's parts, without
        adapters, and passes the folder only afterwards, to this method.
        """
        super().register_to_config(**kwargs)
        if kwargs.get("_name_or_path") and not self._store.loaded:
            self._load_saved(Path(kwargs["_name_or_path"]))

    def _load_saved(self, folder: Path) -> None:
        """Load the adapters and tiny decoder that `save_pretrained` wrote to `folder`; activate the same adapters."""
        if self.network is not None:
            self._store.load_saved(folder)
        if self.tiny_vae is None and self.vae is not None and saved_decoder(folder) == TINY:
            self.tiny_vae = open_decoder(TINY, folder, self.vae, self.vae.dtype)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Return a pipeline with the parts of `pipeline`, and its adapters if it has any, without copying.

        `kwargs`: replacements of parts, and dtype.
        """
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        config = {name: value for name, value in pipeline.config.items() if name != "_name_or_path"}
        source = SimpleNamespace(config=config, components=pipeline.components,
                                 _optional_components=pipeline._optional_components)  # fmt: skip
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or pipeline.dtype)
        pipe: Any = super().from_pipe(source, **{**parts, **kwargs})  # diffusers does not check the types of arguments
        if isinstance(pipeline, AdaptedPipeline):
            pipe._store = pipeline._store.copy(pipe.network, pipe._family())
            pipe.solver, pipe.shift = pipeline.solver, pipeline.shift
            pipe._store.move_to_backbone()
        return pipe

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the checkpoint, its tiny decoder, every loaded adapter, and the weights of the active ones.

        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it with all of these; a pipeline
        without adapters opens as the stock pipeline, without trust_remote_code. LoRAs are left out, with a warning.
        Raises UserError for pickled weights, and for an adapter whose folder is gone or was changed.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise UserError(f"{save_directory}: safe_serialization=False would pickle the weights, which codi does not "
                            "read: leave it out")  # fmt: skip
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{save_directory}: is a file: name a folder")
        require_sources(self._store.loaded)  # before anything is written
        # diffusers would omit a part that was None in the constructor and was set later.
        self.register_modules(**{name: part for name, part in self.components.items() if part is not None})
        try:
            with self._without_loras():
                super().save_pretrained(folder, **kwargs)
            mark_saved(folder, self.tiny_vae is not None)
            stock = self.kind.pipeline_for(self.parts).__name__
            write_class_name(folder, [ENTRY, "CoDiPipeline"] if self._store.loaded else stock)
            save_adapters(folder, self._store.loaded, self._store.weights, self.kind.component)
        except (OSError, SafetensorError) as error:
            raise unwritable(folder, error) from error

    def load_adapter(self, adapter: str | Path, as_: str | None = None, task: str | None = None) -> str:
        """Load another adapter, embedded (by name) or from a folder, and return its name for `set_adapters`: `as_`, or
        the folder's. It becomes active if no other is. Raises UserError for one that does not fit."""
        name = self._store.load(adapter, as_, task, self._lora_names)
        if not self._store.weights:
            self._store.set(name)
        return name

    @property
    def adapters(self) -> list[str]:
        """Names of all loaded adapters."""
        return list(self._store.loaded)

    @property
    def adapter(self) -> Adapter | None:
        """The (first) active adapter; None without."""
        return next((entry.adapter for entry in self._store.active.values()), None)

    @property
    def task(self) -> Task | None:
        """The task of `adapter`."""
        return next(iter(self.tasks.values()), None)

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks of the active adapters, by adapter name."""
        return {name: entry.task for name, entry in self._store.active.items()}

    @property
    def student(self) -> Student:
        """The backbone with the active adapters."""
        return self._store.student()[0]

    @property
    def network(self) -> Any:
        """The backbone's denoising network."""
        unet = getattr(self, "unet", None)
        return unet if unet is not None else getattr(self, "transformer", None)

    @property
    def kind(self) -> Family:
        """The backbone's family."""
        return family_of(self.network) if self.network is not None else family_of_text(self.parts)

    @property
    def components(self) -> dict[str, Any]:
        """Parts by name, without those of other families."""
        names, _ = self._get_signature_keys(self)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _family(self) -> str:
        complete = None not in (self.network, self.vae, self.scheduler)
        return self.kind.fingerprint(self.network, self.vae, self.scheduler) if complete else ""

    def infos(self, strength: float = 1.0) -> list[dict[str, Any]]:
        """Return the info of each active adapter whose weight times `strength` is not 0."""
        return self._store.infos(strength)

    @property
    def cell(self) -> int:
        """Side in pixels of one token, or of one latent cell where the network has no tokens."""
        return codec.downscale(self.vae) * self.kind.patch(self.network.config)

    def cells_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the latent size (h, w) for images of `size` (height, width), rounded up to whole tokens."""
        f, patch = codec.downscale(self.vae), self.kind.patch(self.network.config)
        return (-(-size[0] // (f * patch)) * patch, -(-size[1] // (f * patch)) * patch)

    def size_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size (height, width) of text-to-image, by default the backbone's training size.

        Raises UserError for sides that are no multiples of `cell`.
        """
        f = self.cell
        default = self.kind.sample_size(self.network, self.vae) * codec.downscale(self.vae)
        for side in (height, width):
            if side is not None and (not isinstance(side, int) or side < f or side % f):
                fix = f"use {max(1, round(side / f)) * f}" if isinstance(side, int) else "use whole numbers"
                raise UserError(f"size {width} x {height}: not multiples of {f} px: {fix}")
        return height or default, width or default

    def tiles(self, image: Tensor, side: int | None = None) -> Tiles | None:
        """Return the tiles to upscale images (B, C, h, w) in, of `side` input pixels (0: none; None: large ones)."""
        scale, f = self.task.scale, codec.downscale(self.vae)  # type: ignore[union-attr]
        return Tiles.choose(side, image, scale, f, max(self.size_of(None, None)), self.cell // f)

    @property
    def text(self) -> PromptEncoder:
        """Encoder of prompts to tensors."""
        return self.kind.prompts(self.parts)

    @property
    def parts(self) -> Backbone:
        """Parts of the checkpoint; those that its family lacks are None."""
        settings: Any = {name: self.config[name] for name in ("force_zeros_for_empty_prompt", "is_distilled")}
        names = {field.name for field in fields(Backbone)} - set(settings)
        return Backbone(**settings | {name: getattr(self, name, None) for name in names})

    @property
    def schedule(self) -> Schedule:
        """The backbone's noise schedule at its training size."""
        side = self.kind.sample_size(self.network, self.vae)
        return self.schedule_for((side, side))

    def schedule_for(self, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        """Return the noise schedule for latents of `cells` (h, w)."""
        return self.kind.schedule(self.scheduler, cells, steps or self.kind.usual_steps(self))

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Self:
        """Move or cast everything, like any diffusers pipeline. `memory_format`: torch.channels_last speeds up
        convolutions."""
        super().to(*args, **kwargs)
        if memory_format is not None:
            self._store.layout = memory_format
            parts: Any = filter(None, (self.vae, self.network, self.tiny_vae))
            for part in parts:
                part.to(memory_format=memory_format)
        self._store.move_to_backbone()
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the networks by torch.compile with these options, e.g. mode="max-autotune".

        Compilation happens at the first use and for each new image size, and takes a minute or more. An adapter and the
        U-Net together become one graph, with mode="reduce-overhead" one CUDA graph.
        """
        self._store.compile(**options)
        for part in filter(None, (self.vae.encoder, self.vae.decoder, getattr(self.tiny_vae, "decoder", None))):
            part.compile(**options)
        return self

    def fuse_lora(self, fused: bool = True) -> Self:
        """Merge the adapters' low-rank updates into copies of the weights they update: faster, at the memory of these
        copies. The backbone's weights do not change. A change of adapter weights or strength merges again."""
        self._store.fused = fused
        return self

    def unfuse_lora(self) -> Self:
        """Undo `fuse_lora` exactly."""
        return self.fuse_lora(False)

    def guidance(self, text: float | None = None, image: float | None = None, strength: float = 1.0) -> Guidance:
        """Return the guidance for the requested scales with the active adapters; None is the adapter's default.

        Raises UserError for a scale that is no number from 0 up, an image scale that no adapter has learned, or a
        strength that a full adapter does not support.
        """
        self._store.require_strength(strength)
        infos = self._store.infos(strength)
        # Accept any image scale at strength 0, so that a strength slider may reach 0.
        return resolve(text, image if infos or not self._store.weights else None, infos)
