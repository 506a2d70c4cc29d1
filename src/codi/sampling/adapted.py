"""A backbone and its adapters as one diffusers pipeline: loaded, set, moved and saved; `pipeline` samples with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from diffusers import DiffusionPipeline

from ..models.adapter import Adapter
from ..models.backbones import Family, Hub, family_of, find_model, load_backbone
from ..models.student import Student
from ..models.text import PromptEncoder, limit_tokenizers
from ..models.tiny import mark_saved, open_decoder, saved_decoder
from ..schedule import Schedule
from ..tasks import Task, get_task
from .guidance import Guidance, resolve
from .shelf import Shelf


class AdaptedPipeline(DiffusionPipeline):
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
        self.register_modules(**parts)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, is_distilled=is_distilled)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self._shelf = Shelf(self.network, self.kind.fingerprint(self.network, vae, scheduler))
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
        dtype: torch.dtype | None = None,
        loras: Mapping[str, float] | None = None,
        decoder: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub: Unpack[Hub],
    ) -> Self:
        """Loads a checkpoint of a supported family or a saved CoDiPipeline, and sets an adapter.

        `model`: "mini", "photo", a diffusers folder, a single .safetensors file or a hub id, which may end in
        "@revision". `adapter`: the name of one in the model's folder `adapters` or of an embedded one, or a folder;
        None takes that of `task`. `dtype`: float32 by default; `torch_dtype` is its older name. `loras`: low-rank
        updates made part of the backbone, with weights. `decoder`: "full", "tiny", the one in the model's folder, or an
        AutoencoderTiny folder or hub id; None: as the pipeline was saved, else the full one. `hub`: revision, variant,
        token, cache_dir, local_files_only and config of the model, as diffusers knows them.
        Raises UserError for a missing or broken model, adapter or decoder, or one made for another backbone or task.
        """
        if task is not None:
            get_task(task)
        dtype = dtype or torch_dtype or torch.float32
        backbone, folder = load_backbone(model, dtype, loras, **hub), Path(find_model(model))
        tiny = open_decoder(decoder or saved_decoder(folder), model, backbone.vae, dtype, **hub)
        pipe = cls(**vars(backbone), tiny_vae=tiny)
        shelf = pipe._shelf
        shelf.model = model
        shelf.load_saved(folder)
        of_task = [name for name, shelved in shelf.loaded.items() if shelved.task.name == task]
        if adapter is not None:
            shelf.set(shelf.load(adapter, task=task))
        elif task is not None and task not in [shelved.task.name for shelved in shelf.active.values()]:
            shelf.set(of_task[0] if of_task else shelf.load(task, task=task))
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves the checkpoint, its tiny decoder, every adapter loaded, and which ones are set with what weights."""
        super().save_pretrained(save_directory, **kwargs)
        mark_saved(Path(save_directory), self.tiny_vae is not None)
        self._shelf.save(Path(save_directory))

    def load_adapter(self, adapter: str | Path, as_: str | None = None, task: str | None = None) -> str:
        """Loads one more adapter, an embedded one's name or a folder, and returns the name that `set_adapters` knows it
        by: `as_`, or the folder's. It is set at once if no other is. Raises UserError for one that does not fit."""
        name = self._shelf.load(adapter, as_, task)
        if not self._shelf.weights:
            self._shelf.set(name)
        return name

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Sets one adapter or several at once, each with a weight (1: as trained); an empty list sets none.

        Raises UserError for unknown names, and for several where one brings a backbone of its own.
        """
        self._shelf.set(names, weights)

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters loaded."""
        return list(self._shelf.loaded)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is set, the first of several; None without."""
        return next((shelved.adapter for shelved in self._shelf.active.values()), None)

    @property
    def task(self) -> Task | None:
        """The task of `adapter`."""
        return next(iter(self.tasks.values()), None)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the adapters that are set, by their names."""
        return {name: shelved.task for name, shelved in self._shelf.active.items()}

    @property
    def student(self) -> Student:
        """The backbone with the adapters that are set."""
        return self._shelf.student()[0]

    @property
    def network(self) -> Any:
        """The backbone's denoising network."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def kind(self) -> Family:
        """The backbone's family."""
        return family_of(self.network)

    @property
    def text(self) -> PromptEncoder:
        """What turns prompts into tensors."""
        return self.kind.prompts(self)

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
            self._shelf.layout = memory_format
            parts: Any = filter(None, (self.vae, self.network, self.tiny_vae))
            for part in parts:
                part.to(memory_format=memory_format)
        self._shelf.follow()
        return self

    def compile(self, **options: Any) -> Self:
        """Has the networks compiled by torch.compile with these options, e.g. mode="max-autotune", when they are first
        used and for each new size of picture: that takes a minute or more. What an adapter and the U-Net do together
        is one graph, with mode="reduce-overhead" one CUDA graph."""
        self._shelf.compile(**options)
        for part in filter(None, (self.vae.encoder, self.vae.decoder, getattr(self.tiny_vae, "decoder", None))):
            part.compile(**options)
        return self

    def fuse_lora(self, fused: bool = True) -> Self:
        """Makes the adapters' low-rank updates part of the weights they update: faster, for the memory of a second copy
        of these weights. The backbone's own stay as they are; a change of weights or strength makes it happen again."""
        self._shelf.fused = fused
        return self

    def unfuse_lora(self) -> Self:
        """Undoes `fuse_lora`, exactly."""
        return self.fuse_lora(False)

    def guidance(self, text: float | None = None, image: float | None = None, strength: float = 1.0) -> Guidance:
        """The guidance that scales asked for lead to with the adapters that are set; None is the adapter's own.

        Raises UserError for a scale that is no number from 0 up, an image scale that no adapter has learnt, or a
        strength that a full adapter cannot have.
        """
        self._shelf.require_whole(strength)
        infos = self._shelf.infos(strength)
        # Where all influence is turned down there is nothing to refuse: a slider may reach 0.
        return resolve(text, image if infos or not self._shelf.weights else None, infos)
