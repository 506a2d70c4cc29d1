"""`CoDiPipeline`: a backbone and its adapters as one diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ..models import codec
from ..models.hooks import device_of
from ..models.student import Conditioning
from ..schedule import Schedule
from .adapted import AdaptedPipeline
from .arguments import Arguments, Call, resolve
from .checks import CALLBACK_TENSORS, Callback, replaced_latents
from .colour import match_bands, match_colour
from .inputs import ImageInput, to_output
from .noise import Noise
from .prompts import move_bundle
from .sampler import sample, sampler_of, time_grid
from .solvers import scheduler_of, solve
from .tiling import join, mirror_pad


class CoDiPipeline(AdaptedPipeline):
    """Image-conditioned sampling in 1 to 4 steps with any of the loaded adapters; without one, plain text-to-image.

    `network` (`unet` or `transformer`) is the backbone's and never changes: adapters are kept separately. A saved
    pipeline is a diffusers folder with an `adapters/` folder in it. `tiny_vae`, if present, decodes instead of the VAE;
    conditions are always encoded by the VAE.

    Adapters with low-rank updates use a network with modules of their own that shares the backbone's weights, so
    attention processors set on `unet` do not affect them: set them on `student.network`, the network of the active
    adapters. Adapters work inside the network, which is therefore never called as a whole: `torch.compile(unet)` has no
    effect; use the method `compile`.

    Arguments of a call, by diffusers' names:

    prompt, negative_prompt: a text, or one per image.
    image: the task's input, in [0, 1] (see inputs.to_tensor); {name: image} with several active adapters. None for
        text-to-image, whose size is `height` x `width`, by default the backbone's training size.
    mask_image: for inpainting, 1 (white) = repaint. Alias: `mask`.
    num_inference_steps: 1 and up, 4 by default; adapters are distilled for 1 to 4. Alias: `steps`.
    guidance_scale: None is the adapter's default. Distilled guidance costs nothing; otherwise any scale but 1 costs a
        second forward pass per step, with `negative_prompt`. This is classifier-free guidance in every family, called
        true_cfg_scale in diffusers for networks that also take a scale as an input. That input is `embedded_guidance`
        (FLUX.1-dev); None is the adapter's or the family's default.
    num_images_per_prompt: consecutive images for each prompt and input image.
    generator: a torch.Generator or one per image, for the same noise as in diffusers. Alternative: `seed`, one per
        image, or a single number (then image i uses seed + i). A seed gives the same image in any batch and on any
        device. latents: the initial noise.
    prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, and the same with prefix negative_: embeddings from
        `encode_prompt`, instead of texts.
    output_type: "pil", "pt" for a tensor (B, 3, H, W) in [0, 1], "np" for an array (B, H, W, 3), "latent", or "bands",
        for upscaling in tiles: one iterator per image, which computes it on demand from the top, (1, 3, rows, W) at a
        time, so that no image is held in memory as a whole.
    callback_on_step_end: called as in diffusers; it may replace "latents", change `_guidance_scale` (of classifier-free
        guidance), or set `_interrupt` to stop.
    cross_attention_kwargs (joint_attention_kwargs): `scale`, the strength of the backbone's LoRAs.

    Other arguments of stock pipelines are accepted if they change nothing: None, or the default.

    Arguments of our own:

    image_guidance_scale: how closely an edit follows the input image, if the adapter has distilled this guidance.
    strength: influence of the adapters; 0 is exactly the backbone. Full adapters support only 0 and 1.
    tile: upscaling only: side of tiles in input pixels; 0 never tiles; None tiles images larger than 1.5 times the
        backbone's training size (at least tiles.MIN_SIDE), in tiles of that size. batch_size: tiles at a time.
    colour: "wavelet", "back-projection", "adain" or "none": color correction of upscaled images (see
        colour.match_colour). None is the adapter's default.
    """

    _callback_tensor_inputs = list(CALLBACK_TENSORS)
    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _current_timestep: int | None = None
    _interrupt: bool = False

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = "", image: ImageInput | dict[str, ImageInput] | None = None,
        mask_image: Any = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = "", num_images_per_prompt: int = 1, generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None, negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
        mask: Any = None, steps: int | None = None, seed: int | Sequence[int] = 0, strength: float = 1.0,
        image_guidance_scale: float | None = None, embedded_guidance: float | None = None, tile: int | None = None,
        colour: str | None = None, batch_size: int = 4, **stock: Any,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Generate images; the class documents the arguments. `.images` has the type `output_type`, by default a list
        of PIL images. Raises UserError for invalid arguments."""
        embeddings = {
            "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }  # fmt: skip
        attention = {"cross_attention_kwargs": cross_attention_kwargs, "joint_attention_kwargs": joint_attention_kwargs}
        arguments = Arguments(
            prompt, image, mask_image, height, width, num_inference_steps, guidance_scale, negative_prompt,
            num_images_per_prompt, generator, latents, embeddings, output_type, callback_on_step_end,
            callback_on_step_end_tensor_inputs, attention, stock, mask, steps, seed, strength, image_guidance_scale,
            embedded_guidance, tile, colour, batch_size,
        )  # fmt: skip
        call = resolve(self, arguments)
        self._interrupt, self._num_timesteps, self._guidance_scale = False, call.steps, call.guide.scales["text"]
        images = self._tiled(call) if call.tiles else self._untiled(call)
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- attributes that callbacks read, as in any diffusers pipeline

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> int | None:
        """Timestep of the current step; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """True if a callback has set `_interrupt`, which ends the call with the current latents."""
        return self._interrupt

    # ---- images as a whole, or in tiles

    def _untiled(self, call: Call) -> Any:
        height, width = call.size
        covered = tuple(side * codec.downscale(self.vae) for side in self.cells_of(call.size))
        conditions = {
            key: mirror_pad(task.condition(call.given[key]), covered)  # type: ignore[arg-type] # cut off again below
            for key, task in call.tasks.items()
        }
        with cast(Any, self.progress_bar)(total=call.steps) as bar:
            noise = self._draw(call, call.noise, self.cells_of(call.size))
            latent = self._sample(call, noise, conditions, range(call.noise.count), call.noise, bar)
        if call.output_type == "latent":
            return latent
        result = self._decode(latent)[:, :, :height, :width].cpu()
        for key, task in call.tasks.items():
            if task.name == "upscale":
                reference = task.condition(call.given[key]).float()
                result = match_colour(result, reference, call.method, task.scale)
        for key, task in call.tasks.items():  # last: nothing may change the pixels that a task restores
            result = task.finish(result, call.given[key])
        return to_output(result, call.output_type)

    def _tiled(self, call: Call) -> Any:
        ((name, task),), tiles, inputs = call.tasks.items(), call.tiles, call.given
        assert tiles is not None
        low, late = inputs[name], call.method == "adain"  # which needs the whole image
        total = call.steps * tiles.batches(low, call.batch_size) * len(low)
        bar = cast(Any, self.progress_bar)(total=total)
        pictures = [self._bands(call, row, name, "none" if late else call.method, bar) for row in range(len(low))]
        if call.output_type == "bands":
            return [_with_bar(bar, bands) for bands in pictures]
        with bar:
            result = torch.cat([join(bands, call.size[0]) for bands in pictures])
        if late:
            result = match_colour(result, task.condition(low), call.method)
        return to_output(result, call.output_type)

    def _bands(self, call: Call, row: int, name: str, method: str, bar: Any) -> Iterator[Tensor]:
        """Return the enlargement of one image, in bands from the top."""
        tiles, enlarge, image = call.tiles, call.tasks[name].condition, call.given[name][row : row + 1]
        assert tiles is not None
        key = call.noise.row(row).key()
        source = Noise(1, [key], torch.Generator().manual_seed(key))  # for schedulers that draw noise at each step

        def make(noise: Tensor, low: Tensor, texts: list[str]) -> Tensor:
            return self._decode(self._sample(call, noise, {name: enlarge(low)}, [row] * len(low), source, bar))

        text, channels = call.prompts.texts[row], codec.channels(self.vae)
        bands = tiles.bands(make, image, text, key, channels, call.batch_size, self._fields(call))
        return match_bands(bands, partial(tiles.enlarged, enlarge, image), call.size[0], method, tiles.scale)

    def _fields(self, call: Call) -> int:
        return call.steps if self._sampler(call.strength) == "renoise" else 1

    def _draw(self, call: Call, noise: Noise, cells: tuple[int, int]) -> Tensor:
        shape = (codec.channels(self.vae), *cells)
        return noise.draw(shape, self._fields(call), device_of(self.network), self.network.dtype)

    # ---- sampling

    def _sample(
        self, call: Call, noise: Tensor, conditions: dict[str, Tensor], rows: Sequence[int], source: Noise, bar: Any
    ) -> Tensor:
        """Return the latent sampled from noise (B, C, h, w) with each task's condition at output size. `rows`: indices
        of the images; `source`: for the noise of each step."""
        student, strength = self._store.student(call.strength, call.lora_scale)
        device, (h, w) = device_of(self.network), noise.shape[-2:]
        condition: Any = None
        if student.adapter is not None:
            moved = {name: c.to(device_of(self.vae)) for name, c in conditions.items()}
            condition = student.adapter.read(moved if len(moved) > 1 else next(iter(moved.values())), self.vae)
        conditioning, negative = self._conditionings(call, rows, (h, w), condition)
        schedule = self.schedule_for((h, w), call.steps)
        noise = noise.to(device=device, dtype=self.network.dtype)
        scheduler = scheduler_of(self, call.strength)
        step = partial(self._step, call, bar)
        with self._store.on_device(student, device, call.lora_scale):
            if scheduler is not None:
                negative = None if scheduler is self.solver else negative
                scheduler.set_timesteps(call.steps)
                self._num_timesteps = len(scheduler.timesteps)  # some have several per step
                return solve(
                    student, scheduler, noise, conditioning, call.steps, call.guide.second_pass, negative, strength,
                    step, PipelineControl(self, negative is not None), source.step_generators(tuple(noise.shape[1:])),
                )  # fmt: skip
            schedule, grid = self._grid(call, schedule)
            return sample(
                student, schedule, noise, conditioning, call.steps, call.guide.second_pass, negative, strength, step,
                grid, self._sampler(call.strength), self._bounded(call.strength),
                PipelineControl(self, negative is not None),
            )  # fmt: skip

    def _grid(self, call: Call, schedule: Schedule) -> tuple[Schedule, Tensor]:
        """Return the schedule and the times of the steps: the adapters', or the checkpoint's without adapters."""
        infos = self.infos(call.strength)
        if not infos and not self.shift:
            return schedule, self.kind.own_grid(self.scheduler, schedule, call.steps)
        shift = self.shift or next((info["shift"] for info in infos if info.get("shift")), 1.0)
        schedule = schedule.unstretched()
        return schedule, time_grid(schedule.horizon, call.steps, shift, schedule.whole)

    def _conditionings(
        self, call: Call, rows: Sequence[int], cells: tuple[int, int], condition: Any
    ) -> tuple[Conditioning, Conditioning | None]:
        """Return the conditioning, and the negative one for classifier-free guidance or None."""
        size = (codec.downscale(self.vae) * cells[0], codec.downscale(self.vae) * cells[1])
        embedded, encoder = call.embedded, self.text
        if embedded is None and self.network.config.get("guidance_embeds"):
            infos = self.infos(call.strength)
            embedded = next((i["embedded_guidance"] for i in infos if i.get("embedded_guidance")), None)
        target = (device_of(self.network), self.network.dtype)

        def encode(is_negative: bool) -> tuple[Tensor, dict[str, Tensor] | None]:
            bundle = move_bundle(call.prompts.bundle(encoder, rows, is_negative), *target)
            text, added = encoder.conditions(bundle, size)
            return text, self.kind.with_embedded_guidance(self.network, added, embedded, len(rows))

        text, added = encode(is_negative=False)
        guidance = call.guide.columns(call.prompts.guided_texts(rows))
        conditioning = Conditioning(text, condition, added=added, guidance=guidance)
        if call.guide.second_pass == 1:
            return conditioning, None
        text, added = encode(is_negative=True)
        return conditioning, replace(conditioning, text=text, added=added)

    def _step(self, call: Call, bar: Any, index: int, t: int, z: Tensor, x: Tensor) -> Tensor | None:
        """Update the progress bar and call the callback; return the latent to continue from if it replaces it."""
        bar.update()
        if call.callback is None:
            return None
        tensors = {name: {"latents": z, "denoised": x}[name] for name in call.callback_tensors}
        return replaced_latents(call.callback(self, index, t, tensors), z)

    def _sampler(self, strength: float) -> str:
        """Return the sampler that all active adapters were trained for, "ddim" if they differ."""
        names = {sampler_of(info) for info in self.infos(strength)}
        return names.pop() if len(names) == 1 else "ddim"

    def _bounded(self, strength: float) -> bool:
        """Return whether all active adapters were trained with boundary scaling."""
        infos = self.infos(strength)
        return bool(infos) and all(info.get("boundary") for info in infos)

    def _decode(self, latent: Tensor) -> Tensor:
        vae = self.vae if self.tiny_vae is None else self.tiny_vae
        return codec.decode(vae, latent.to(device_of(vae))).float()


@dataclass(frozen=True)
class PipelineControl:
    """Pipeline attributes that a callback may change during sampling; `guided`: with classifier-free guidance."""

    pipe: CoDiPipeline
    guided: bool

    def interrupted(self) -> bool:
        """Return whether to stop."""
        return self.pipe.interrupt

    def guidance_scale(self, timestep: int) -> float:
        """Set the pipeline's current timestep and return the guidance scale for it."""
        self.pipe._current_timestep = timestep
        return self.pipe.guidance_scale if self.guided else 1.0


def _with_bar(bar: Any, bands: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the bands, and close the progress bar after them."""
    with bar:
        yield from bands
