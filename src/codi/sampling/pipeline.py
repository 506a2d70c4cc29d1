"""`CoDiPipeline`: a backbone and an adapter as one diffusers pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError
from ..models import codec
from ..models.adapter import Adapter, load_adapter
from ..models.backbone import find_model, load_backbone, require_finite
from ..models.student import Conditioning, Student
from ..models.text import embed_prompts
from ..schedule import DiscreteSchedule
from ..tasks import Task, get_task
from .colour import match_colour
from .sampler import ddim, initial_noise
from .tiling import covered_size, cut, mirror_pad, starts, upscale_tiled

ImageInput = Tensor | Image.Image | np.ndarray | Sequence[Image.Image]
# Tiles of a small backbone's own size see too little: 256 px crops of two photographs, enlarged x4 by a backbone of
# 16 px, gained 0.2 and 1.4 dB of PSNR with tiles of 64 px instead (two steps, seed 0).
LEAST_TILE = 64
OVERLAP = 4  # a tile overlaps its neighbours by tile / OVERLAP


def alignment(downscale: int, scale: int) -> int:
    """Input pixels after which a picture enlarged `scale` times meets a whole latent cell of `downscale` pixels."""
    return downscale // math.gcd(downscale, scale)


class CoDiPipeline(DiffusionPipeline):
    """Image-conditioned sampling in 1 to 4 steps.

    `adapter` None gives plain text-to-image. `task` and `task_options` say what the condition is (see codi.tasks).
    Saves and loads as any diffusers pipeline; `from_pretrained` also joins a checkpoint and an adapter.
    """

    _optional_components = ["adapter"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        adapter: Adapter | None = None,
        task: str | None = None,
        task_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, adapter=adapter
        )
        self.register_to_config(task=task, task_options=task_options)
        for part in (vae, text_encoder, unet, adapter):
            if part is not None:
                part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: str | Path, task: str | None = None, adapter: str | Path | None = None, **kwargs: Any
    ) -> CoDiPipeline:
        """Loads a saved CoDiPipeline, or a Stable Diffusion checkpoint together with an adapter.

        `model`: "mini", a diffusers folder, a single .safetensors file or a hub id. `adapter`: the name of an embedded
        adapter or a folder; None takes the embedded one of `task`. `torch_dtype`: float32 by default.
        Raises UserError for a missing or broken model or adapter, or one made for another backbone or task.
        """
        folder = Path(find_model(model))
        if (folder / "adapter" / "config.json").is_file():
            if adapter is not None:
                raise UserError(f"{model}: a saved pipeline with an adapter of its own: leave the other adapter out")
            pipe = super().from_pretrained(folder, **kwargs)
            for name in ("vae", "text_encoder", "unet", "adapter"):
                require_finite(getattr(pipe, name), f"{model}/{name}")
            return pipe  # type: ignore[return-value]
        dtype = kwargs.pop("torch_dtype", torch.float32)
        if kwargs:
            raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(kwargs)}")
        backbone = load_backbone(model, dtype)
        loaded, unet, options = None, backbone.unet, {}
        if adapter is not None or task is not None:
            if task is not None:
                get_task(task)
            loaded, unet = load_adapter(adapter or str(task), task, backbone.family, backbone.unet)
            loaded = loaded.to(dtype)
            info = loaded.config["info"] or {}
            task, options = info.get("task", task), info.get("task_options", {})
        return cls(
            backbone.vae, backbone.text_encoder, backbone.tokenizer, unet, backbone.scheduler, loaded, task, options
        )

    @property
    def student(self) -> Student:
        return Student(self.unet, self.adapter)

    @property
    def schedule(self) -> DiscreteSchedule:
        return DiscreteSchedule.from_config(self.scheduler.config)

    @property
    def task(self) -> Task | None:
        return get_task(self.config["task"], **(self.config["task_options"] or {})) if self.config["task"] else None

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | Sequence[str] = "",
        steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        strength: float = 1.0,
        seed: int | Sequence[int] = 0,
        tile: int | None = None,
        colour: str = "wavelet",
        batch_size: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures; `.images` is a list of PIL images, or with output_type "pt" a tensor (B, 3, H, W) in [0, 1],
        "np" an array (B, H, W, 3), "latent" latents.

        image: what the task needs, RGB in [0, 1]: a tensor (B, 3, h, w) or (3, h, w), PIL image(s), or an array
            (B, h, w, 3). None: plain text-to-image at the backbone's own size.
        prompt: one, or one an image. steps: 1 and up; adapters are distilled for 1 to 4.
        guidance_scale: 1 costs one forward pass a step, others two. strength: the adapter's influence, 0 is none.
        seed: one an image, or one number (then image i uses seed + i). The same seed gives the same picture whatever
            else is in the batch.
        tile: side of tiles in input pixels for upscaling; 0 never tiles, None tiles what is larger than 1.5 times the
            backbone's own size (LEAST_TILE at least) in tiles of that size. batch_size: tiles at a time.
        colour: "wavelet", "adain" or "none": correction of the result's colours to the input's (upscaling).
        Raises UserError for arguments that no picture can be made from.
        """
        task = self.task
        if steps < 1 or steps > self.schedule.horizon:
            raise UserError(
                f"steps {steps}: must lie between 1 and {int(self.schedule.horizon)}: use 1 to 4 with an adapter"
            )
        given = None if image is None else to_tensor(image)
        if task is not None and given is None:
            raise UserError(f"image: the task {task.name!r} needs one: pass image=...")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = max(len(prompts), 1 if given is None else len(given))
        prompts = prompts * count if len(prompts) == 1 else prompts
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        if len(prompts) != count or len(seeds) != count or (given is not None and len(given) != count):
            raise UserError(
                f"prompt, seed, image: {len(prompts)} prompts and {len(seeds)} seeds do not fit "
                f"{0 if given is None else len(given)} images: give one, or one for each"
            )

        progress_bar: Any = self.progress_bar

        def callback(step: int, t: int, z: Tensor, x: Tensor) -> Tensor | None:
            bar.update()
            if callback_on_step_end is None:
                return None
            tensors = {"latents": z, "denoised": x}
            named = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, t, named) or {}).get("latents")

        def sample(noise: Tensor, conditions: Tensor | None, texts: list[str]) -> Tensor:
            noise = noise.to(device=self.device, dtype=self.unet.dtype)
            conditioning = self._conditioning(conditions, texts)
            blank = None
            if guidance_scale != 1:
                negative = embed_prompts(self.tokenizer, self.text_encoder, [negative_prompt] * len(texts))
                blank = replace(conditioning, text=negative)
            return ddim(
                self.student, self.schedule, noise, conditioning, steps, guidance_scale, blank, strength, callback
            )

        channels, f = self.vae.config["latent_channels"], codec.downscale(self.vae)
        if given is None:
            side = self.unet.config["sample_size"]
            with progress_bar(total=steps) as bar:
                latent = sample(initial_noise((channels, side, side), seeds), None, prompts)
            return self._finish(latent if output_type == "latent" else self._decode(latent), output_type, return_dict)

        assert task is not None
        scale = getattr(task, "scale", 1)
        align = alignment(f, scale)
        side = max(self.unet.config["sample_size"] * f // scale, LEAST_TILE)  # the backbone's own size, input pixels
        side = max(2, side // align) * align
        tile = (side if max(given.shape[-2:]) > 1.5 * side else 0) if tile is None else tile
        if tile and (tile % align or tile < 2 * align):
            raise UserError(
                f"tile {tile}: not a multiple of {align} from {2 * align} up: use {max(2, tile // align) * align}"
            )

        if not tile:
            # Reflect up to whole latent cells, cut off again below.
            h, w = given.shape[-2:]
            padded = mirror_pad(given, (-(-h // align) * align, -(-w // align) * align))
            shape = (channels, padded.shape[-2] * scale // f, padded.shape[-1] * scale // f)
            with progress_bar(total=steps) as bar:
                latent = sample(initial_noise(shape, seeds), task.condition(padded), prompts)
            if output_type == "latent":
                return self._finish(latent, output_type, return_dict)
            result = self._decode(latent)[:, :, : h * scale, : w * scale]
        else:
            outputs = []
            for one, text, s in zip(given.split(1), prompts, seeds, strict=True):
                covered = covered_size(one.shape[-2], one.shape[-1], tile, align)
                # One noise field for the whole picture, so that neighbouring tiles agree where they overlap.
                field = initial_noise((channels, covered[0] * scale // f, covered[1] * scale // f), [s])

                def run(low: Tensor, corners: list[tuple[int, int]], field=field, text=text) -> Tensor:
                    noise = cut(field, corners, tile, scale / f)
                    return self._decode(sample(noise, task.condition(low), [text] * len(low)))

                overlap = max(align, tile // OVERLAP // align * align)
                tiles = math.prod(len(starts(length, tile, overlap, align)) for length in covered)
                with progress_bar(total=-(-tiles // batch_size) * steps) as bar:
                    outputs.append(upscale_tiled(run, one, scale, tile, overlap, batch_size, align))
            result = torch.cat(outputs)
        result = match_colour(result.float().cpu(), task.condition(given).float(), method=colour)
        return self._finish(result, output_type, return_dict)

    def _conditioning(self, conditions: Tensor | None, prompts: list[str]) -> Conditioning:
        text = embed_prompts(self.tokenizer, self.text_encoder, prompts)
        if conditions is None or self.adapter is None:
            return Conditioning(text)
        return Conditioning(text, self.adapter.read(conditions.to(self.device), self.vae))

    def _decode(self, latent: Tensor) -> Tensor:
        return codec.decode(self.vae, latent).float()

    def _finish(self, result: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        images: Any = result
        if output_type in ("pil", "np"):
            array = result.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            images = (
                array if output_type == "np" else [Image.fromarray((a * 255).round().astype(np.uint8)) for a in array]
            )
        elif output_type not in ("pt", "latent"):
            raise UserError(f"output_type {output_type!r}: not known: use pil, np, pt or latent")
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def to_tensor(image: ImageInput) -> Tensor:
    """Whatever a caller brings -> float32 (B, 3, h, w) in [0, 1]. Raises UserError for another shape or range."""
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, (list, tuple)):
        arrays = [_pixels(i) if isinstance(i, Image.Image) else np.asarray(i) for i in image]
        if len({a.shape for a in arrays}) != 1:
            raise UserError("image: pictures of one call must have one size: call once for each size")
        image = np.stack(arrays)
    if isinstance(image, np.ndarray):
        array = image[None] if image.ndim == 3 else image
        if array.ndim != 4:
            raise UserError(f"image: shape {image.shape} is not (B, h, w, 3): pass RGB pictures")
        image = torch.from_numpy(array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)).permute(0, 3, 1, 2)
    assert isinstance(image, Tensor)
    tensor = (image[None] if image.ndim == 3 else image).float()
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
        raise UserError(f"image: shape {tuple(image.shape)} is not (B, 3, h, w): pass RGB pictures")
    if not bool(torch.isfinite(tensor).all()) or tensor.min() < -1e-3 or tensor.max() > 1 + 1e-3:
        raise UserError("image: values outside [0, 1]: scale the picture to that range")
    return tensor.clamp(0, 1)


def _pixels(picture: Image.Image) -> np.ndarray:
    """float32 (h, w, 3) in [0, 1], upright; 16-bit grey keeps its range. (Files in full: data.images.read_image.)"""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return np.repeat(np.asarray(picture, dtype=np.float32)[..., None] / 65535, 3, axis=2)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
