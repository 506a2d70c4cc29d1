"""Methods of diffusers' pipelines, besides sampling, that concern adapters too: offloading, slicing, tiling."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from torch import Tensor, nn

from ..models import codec
from ..models.text import FEATURES
from .adapter_store import AdapterStore
from .prompts import repeat_rows, texts_of


class DiffusersMixin(DiffusionPipeline):
    """Offloading, slicing, tiling and prompt encoding of a stock pipeline, extended to the networks in `_store`."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae->tiny_vae"
    _store: AdapterStore
    network: Any
    text: Any

    def _set_up_vae(self, vae: Any) -> None:
        """Set the attributes that users of diffusers preprocess images with."""
        self.vae_scale_factor = codec.downscale(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(
        self,
        prompt: Any = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = None,
    ) -> tuple[Tensor | None, ...]:
        """Return the embeddings of the prompts and, for guidance, of the negative prompts, as `__call__` takes them.

        Always six, None for those that the family lacks: prompt_embeds, negative_prompt_embeds,
        pooled_prompt_embeds, negative_pooled_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask.
        """
        texts, negative = texts_of(prompt), texts_of(negative_prompt, "negative_prompt")
        negative = negative * len(texts) if len(negative) == 1 else negative
        bundles = []
        for prompts, is_negative in ((texts, False), (negative, True)):
            needed = do_classifier_free_guidance or not is_negative
            bundle = self.text.encode(prompts, negative=is_negative) if needed else {}
            bundles.append({k: repeat_rows(v if device is None else v.to(device), num_images_per_prompt)
                            for k, v in bundle.items()})  # fmt: skip
        names = (FEATURES, "pooled", "mask")
        prompt_embeds, pooled_prompt_embeds, prompt_attention_mask = (bundles[0].get(name) for name in names)
        negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask = (
            bundles[1].get(name) for name in names
        )
        return (
            prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds,
            prompt_attention_mask, negative_prompt_attention_mask,
        )  # fmt: skip

    # ---- offloading: adapters' networks are offloaded like the pipeline's parts

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Keep the models on the CPU and move each to the accelerator when it runs, with the active adapters."""
        super().enable_model_cpu_offload(gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> Any:
        """Keep all weights on the CPU and move each layer's to the accelerator when it runs. Parts of adapters outside
        the network's layers stay on the accelerator."""
        super().enable_sequential_cpu_offload(gpu_id, device)

        def offload(module: Any) -> Any:
            if module in self._store.networks:
                cpu_offload(module, self._offload_device, offload_buffers=len(module._parameters) > 0)
                return module
            return nn.Module.to(module, device=self._offload_device)

        self._store.set_offload(offload)
        return self

    def enable_group_offload(self, onload_device: Any, *args: Any, **kwargs: Any) -> None:
        """Keep groups of layers on the CPU and move each to the accelerator when it runs, as diffusers does."""
        super().enable_group_offload(onload_device, *args, **kwargs)
        names = ("offload_device", "offload_type", "num_blocks_per_group", "non_blocking", "use_stream")
        options = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}

        def offload(module: Any) -> Any:
            if module in self._store.networks:
                apply_group_offloading(module, onload_device=torch.device(onload_device), **options)
                return module
            return nn.Module.to(module, device=onload_device)

        self._store.set_offload(offload)

    def remove_all_hooks(self) -> None:
        """Undo offloading of models or layers."""
        super().remove_all_hooks()
        self._store.set_offload(None)

    # ---- memory and quality

    def enable_vae_slicing(self) -> None:
        """Decode one image of a batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self.vae.disable_tiling()

    def set_attention_slice(self, slice_size: Any) -> None:
        """Slice attention in all networks, including those of adapters (see enable_attention_slicing)."""
        super().set_attention_slice(slice_size)
        for network in self._store.networks[1:]:
            if hasattr(network, "set_attention_slice"):
                network.set_attention_slice(slice_size)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweight the skip features of U-Nets (FreeU), including those of adapters."""
        for network in self._store.networks:
            network.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        for network in self._store.networks:
            network.disable_freeu()

    fuse_qkv_projections = StableDiffusionMixin.fuse_qkv_projections
    unfuse_qkv_projections = StableDiffusionMixin.unfuse_qkv_projections
