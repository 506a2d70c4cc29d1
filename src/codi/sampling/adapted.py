"""A backbone and its adapters as one diffusers pipeline: loaded, set, moved and saved; `pipeline` samples with it."""

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
from .options import ENTRY, name_class, sorted_options
from .saved import require_sources, save_adapters
from .tiles import Tiles


class AdaptedPipeline(DiffusersMixin, LoraLoaderMixin):
    """What CoDiPipeline is made of, without the sampling."""

    # Families have different parts; those that a checkpoint lacks are None.
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
        # Parts of other families are no attributes: users of diffusers look for `pipe.transformer` by hasattr.
        always = ("vae", "text_encoder", "tokenizer", "scheduler", "tiny_vae")
        self.register_modules(**{name: part for name, part in parts.items() if part is not None or name in always})
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, is_distilled=is_distilled)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                lora_state(part)  # which may be refused
                part.requires_grad_(False).eval()
        # Of those here: what the class lists is for opening any family.
        self._optional_components = [name for name in always if parts[name] is None or name == "tiny_vae"]
        self._store.family = self._family()
        self._set_up_vae(vae)
        self.solver: Any = None
        """A diffusers scheduler to sample with instead of DDIM or jumps, for comparisons: without guidance."""
        self.shift: float | None = None
        """Of the time grid (see sampler.time_grid); None: the adapter's own."""

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
        """Load a checkpoint of a supported family or a saved CoDiPipeline, and set an adapter.

        `model`: "mini", "photo", a diffusers folder, a single .safetensors file or a hub id, which may end in
        "@revision". `adapter`: the name of one in the model's folder `adapters` or of an embedded one, or a folder;
        None takes that of `task`. `dtype`: float32 by default; `torch_dtype` is its older name. `loras`: low-rank
        updates made part of the backbone, with weights. `decoder`: "full", "tiny", the one in the model's folder, or an
        AutoencoderTiny folder or hub id; None: as the pipeline was saved, else the full one. `options`: revision,
        variant, token, cache_dir, local_files_only and config of the model; parts in its place (`vae=...`,
        `text_encoder=None`); device_map, quantization_config and what else diffusers loads by (see options.LOADING).
        Raises UserError for a missing or broken model, adapter or decoder, or one made for another backbone or task.
        """
        if task is not None:
            get_task(task)
        hub, given = sorted_options(options)
        chosen: Any = dtype or torch_dtype or torch.float32
        backbone, folder = load_backbone(model, chosen, loras, given=given, **hub), Path(find_model(model))
        of_tiny = chosen.get("tiny_vae", chosen.get("default", torch.float32)) if isinstance(chosen, dict) else chosen
        tiny = options.get("tiny_vae")
        if tiny is None:
            tiny = open_decoder(decoder or saved_decoder(folder), model, backbone.vae, of_tiny, **hub)
        pipe = cls(**vars(backbone), tiny_vae=tiny)
        if (device_map := given.get("device_map")) is not None:
            placed = {name: str(device_of(part)) for name, part in pipe.components.items() if hasattr(part, "device")}
            pipe.hf_device_map = placed if device_map == "balanced" else device_map
        pipe._store.model = model
        super(AdaptedPipeline, pipe).register_to_config(_name_or_path=str(folder))  # ours would also choose the decoder
        if pipe.network is not None:
            pipe._store.load_saved(folder)
        pipe._set(task, adapter)
        return pipe

    def _set(self, task: str | None, adapter: str | Path | None) -> None:
        """Set this adapter, or one of `task` if none is set."""
        store = self._store
        of_task = [name for name, entry in store.loaded.items() if entry.task.name == task]
        if adapter is not None:
            store.set(store.load(adapter, task=task))
        elif task is not None and task not in [entry.task.name for entry in store.active.values()]:
            store.set(of_task[0] if of_task else store.load(task, task=task))

    def register_to_config(self, **kwargs: Any) -> None:
        """Note settings; where diffusers has just opened a saved pipeline, also load what was saved beside its parts.

        `DiffusionPipeline.from_pretrained(folder)` makes a pipeline of the checkpoint's parts, which adapters are not,
        and says only afterwards, by this method, where they came from: there is no other place to load adapters in.
        """
        super().register_to_config(**kwargs)
        if kwargs.get("_name_or_path") and not self._store.loaded:
            self._load_saved(Path(kwargs["_name_or_path"]))

    def _load_saved(self, folder: Path) -> None:
        """Load the adapters and the tiny decoder that `save_pretrained` left in `folder`, and set those that were."""
        if self.network is not None:
            self._store.load_saved(folder)
        if self.tiny_vae is None and self.vae is not None and saved_decoder(folder) == TINY:
            self.tiny_vae = open_decoder(TINY, folder, self.vae, self.vae.dtype)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make a pipeline of another's parts, with its adapters if it has any; nothing is copied. `kwargs`: parts in
        place of its own, and dtype."""
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        config = {name: value for name, value in pipeline.config.items() if name != "_name_or_path"}
        source = SimpleNamespace(config=config, components=pipeline.components,
                                 _optional_components=pipeline._optional_components)  # fmt: skip
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or pipeline.dtype)
        pipe: Any = super().from_pipe(source, **{**parts, **kwargs})  # passed as parts, whose types are not looked up
        if isinstance(pipeline, AdaptedPipeline):
            pipe._store = pipeline._store.copy(pipe.network, pipe._family())
            pipe.solver, pipe.shift = pipeline.solver, pipeline.shift
            pipe._store.follow()
        return pipe

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the checkpoint, its tiny decoder, every adapter loaded, and which ones are set with what weights.

        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it with all of these, and without any
        adapter, as the stock pipeline, needs no such trust. LoRAs are left out, with a warning. Raises UserError for
        pickled weights, which nothing reads, and for an adapter whose folder is gone or was changed.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise UserError(f"{save_directory}: safe_serialization=False would pickle the weights, which codi does not "
                            "read: leave it out")  # fmt: skip
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{save_directory}: is a file: name a folder")
        require_sources(self._store.loaded)  # before anything is written
        # diffusers leaves out a part that was None when the pipeline was made and has been set since.
        self.register_modules(**{name: part for name, part in self.components.items() if part is not None})
        try:
            with self._without_loras():
                super().save_pretrained(folder, **kwargs)
            mark_saved(folder, self.tiny_vae is not None)
            stock = self.kind.pipeline_for(self.parts).__name__
            name_class(folder, [ENTRY, "CoDiPipeline"] if self._store.loaded else stock)
            save_adapters(folder, self._store.loaded, self._store.weights, self.kind.component)
        except (OSError, SafetensorError) as error:
            raise unwritable(folder, error) from error

    def load_adapter(self, adapter: str | Path, as_: str | None = None, task: str | None = None) -> str:
        """Load one more adapter, an embedded one's name or a folder, and returns the name that `set_adapters` knows it
        by: `as_`, or the folder's. It is set at once if no other is. Raises UserError for one that does not fit."""
        name = self._store.load(adapter, as_, task, self._lora_names)
        if not self._store.weights:
            self._store.set(name)
        return name

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters loaded."""
        return list(self._store.loaded)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is set, the first of several; None without."""
        return next((entry.adapter for entry in self._store.active.values()), None)

    @property
    def task(self) -> Task | None:
        """The task of `adapter`."""
        return next(iter(self.tasks.values()), None)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the adapters that are set, by their names."""
        return {name: entry.task for name, entry in self._store.active.items()}

    @property
    def student(self) -> Student:
        """The backbone with the adapters that are set."""
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
        """The parts by name, without those of other families."""
        names, _ = self._get_signature_keys(self)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _family(self) -> str:
        whole = None not in (self.network, self.vae, self.scheduler)
        return self.kind.fingerprint(self.network, self.vae, self.scheduler) if whole else ""

    def infos(self, strength: float = 1.0) -> list[dict[str, Any]]:
        """What the adapters with some influence say of themselves."""
        return self._store.infos(strength)

    @property
    def cell(self) -> int:
        """Pixels along a side of one token, or of one latent cell where the network has no tokens."""
        return codec.downscale(self.vae) * self.kind.patch(self.network.config)

    def cells_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the latent's (h, w) of pictures of `size` (height, width), on whole tokens."""
        f, patch = codec.downscale(self.vae), self.kind.patch(self.network.config)
        return (-(-size[0] // (f * patch)) * patch, -(-size[1] // (f * patch)) * patch)

    def size_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return (height, width) of text-to-image. Raises UserError for sides that are no whole cells."""
        f = self.cell
        own = self.kind.sample_size(self.network, self.vae) * codec.downscale(self.vae)
        for side in (height, width):
            if side is not None and (not isinstance(side, int) or side < f or side % f):
                fix = f"use {max(1, round(side / f)) * f}" if isinstance(side, int) else "use whole numbers"
                raise UserError(f"size {width} x {height}: not multiples of {f} px: {fix}")
        return height or own, width or own

    def tiles(self, given: Tensor, side: int | None = None) -> Tiles | None:
        """Return the tiles that a picture (B, C, h, w) is upscaled in, of `side` input pixels (0: none; None: as
        needed)."""
        scale, f = self.task.scale, codec.downscale(self.vae)  # type: ignore[union-attr]
        return Tiles.choose(side, given, scale, f, max(self.size_of(None, None)), self.cell // f)

    @property
    def text(self) -> PromptEncoder:
        """What turns prompts into tensors."""
        return self.kind.prompts(self.parts)

    @property
    def parts(self) -> Backbone:
        """The checkpoint's parts; those that its family lacks are None."""
        settings: Any = {name: self.config[name] for name in ("force_zeros_for_empty_prompt", "is_distilled")}
        names = {field.name for field in fields(Backbone)} - set(settings)
        return Backbone(**settings | {name: getattr(self, name, None) for name in names})

    @property
    def schedule(self) -> Schedule:
        """The backbone's noise schedule at the size that it was trained at."""
        side = self.kind.sample_size(self.network, self.vae)
        return self.schedule_for((side, side))

    def schedule_for(self, cells: tuple[int, int], steps: int | None = None) -> Schedule:
        """Return the noise schedule for latents of `cells` (h, w)."""
        return self.kind.schedule(self.scheduler, cells, steps or self.kind.usual_steps(self))

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Self:
        """Moves or casts everything, as any diffusers pipeline. `memory_format`: torch.channels_last lays weights out
        as convolutions like them best."""
        super().to(*args, **kwargs)
        if memory_format is not None:
            self._store.layout = memory_format
            parts: Any = filter(None, (self.vae, self.network, self.tiny_vae))
            for part in parts:
                part.to(memory_format=memory_format)
        self._store.follow()
        return self

    def compile(self, **options: Any) -> Self:
        """Has the networks compiled by torch.compile with these options, e.g. mode="max-autotune", when they are first
        used and for each new size of picture: that takes a minute or more. What an adapter and the U-Net do together
        is one graph, with mode="reduce-overhead" one CUDA graph."""
        self._store.compile(**options)
        for part in filter(None, (self.vae.encoder, self.vae.decoder, getattr(self.tiny_vae, "decoder", None))):
            part.compile(**options)
        return self

    def fuse_lora(self, fused: bool = True) -> Self:
        """Makes the adapters' low-rank updates part of the weights they update: faster, for the memory of a second copy
        of these weights. The backbone's own stay as they are; a change of weights or strength makes it happen again."""
        self._store.fused = fused
        return self

    def unfuse_lora(self) -> Self:
        """Undoes `fuse_lora`, exactly."""
        return self.fuse_lora(False)

    def guidance(self, text: float | None = None, image: float | None = None, strength: float = 1.0) -> Guidance:
        """The guidance that scales asked for lead to with the adapters that are set; None is the adapter's own.

        Raises UserError for a scale that is no number from 0 up, an image scale that no adapter has learnt, or a
        strength that a full adapter cannot have.
        """
        self._store.require_whole(strength)
        infos = self._store.infos(strength)
        # Where all influence is turned down there is nothing to refuse: a slider may reach 0.
        return resolve(text, image if infos or not self._store.weights else None, infos)
