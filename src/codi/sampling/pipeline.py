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
from .prompts import placed
from .sampler import sample, sampler_of, time_grid
from .solvers import scheduler_of, solve
from .tiling import join, mirror_pad


class CoDiPipeline(AdaptedPipeline):
    """Image-conditioned sampling in 1 to 4 steps, by any of the adapters loaded; without one, plain text-to-image.

    `network` (`unet` or `transformer`) is the backbone's own and never changes: adapters stand beside it. A saved
    pipeline is a diffusers folder with an `adapters/` folder in it. `tiny_vae` decodes in the VAE's place if there is
    one; conditions are encoded by the VAE always.

    Adapters with low-rank updates have a network of their own modules on the backbone's weights: attention processors
    that are set on `unet` do not reach it. Set them on `student.network`, that of the adapters that are set. No network
    is called as a whole, since adapters work inside it: so `torch.compile(unet)` changes nothing, `compile` does.

    Arguments of a call, by diffusers' names:

    prompt, negative_prompt: a text, or one an image.
    image: what the task needs, in [0, 1] (see inputs.to_tensor); {name: image} where several adapters are set. None for
        text-to-image, whose size is `height` x `width`, by default the backbone's own.
    mask_image: for inpainting, 1 (white) = make new. `mask` is a short form.
    num_inference_steps: 1 and up, 4 by default; adapters are distilled for 1 to 4. `steps` is a short form.
    guidance_scale: None is the adapter's own. Distilled in, it costs nothing; otherwise any but 1 costs a second
        forward pass a step, away from `negative_prompt`: classifier-free guidance in every family, which diffusers
        calls true_cfg_scale where a network takes a scale as an input too. That input is `embedded_guidance`
        (FLUX.1-dev); None is the adapter's or the family's own.
    num_images_per_prompt: pictures in a row for each prompt and image.
    generator: a torch.Generator or one an image; the noise is what diffusers draws from it. `seed` is a short form: one
        an image, or one number (then image i uses seed + i). The same seed gives the same picture whatever else is in
        the batch, on any device. latents: the noise to begin with.
    prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, and the same with negative_ before: what `encode_prompt`
        returns, in place of texts.
    output_type: "pil", "pt" for a tensor (B, 3, H, W) in [0, 1], "np" for an array (B, H, W, 3), "latent", or "bands",
        of upscaling in tiles: iterators, one a picture, that make it row by row from the top when asked,
        (1, 3, rows, W) at a time, so that no picture need be held whole.
    callback_on_step_end: is called as diffusers does, and may replace "latents", change `_guidance_scale` (of
        classifier-free guidance), or set `_interrupt` to stop.
    cross_attention_kwargs (joint_attention_kwargs): `scale`, of LoRAs that the backbone carries.

    Others of a stock pipeline's arguments are taken where they change nothing: None, or its default.

    And our own:

    image_guidance_scale: how closely an edit keeps to the picture, if that was distilled in.
    strength: the adapters' influence; 0 is exactly the backbone. Full adapters know only 0 and 1.
    tile: upscaling only: side of tiles in input pixels; 0 never tiles, None tiles what is larger than 1.5 times the
        backbone's own size (tiles.LEAST at least) in tiles of that size. batch_size: tiles at a time.
    colour: "wavelet", "back-projection", "adain" or "none": correction of the result to the input (upscaling; see
        colour.match_colour). None is the adapter's own.
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
        """Make pictures; the class explains the arguments. `.images` is what `output_type` says, by default a list of
        PIL pictures. Raises UserError for arguments that no picture can be made from."""
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
        images = self._tiled(call) if call.tiles else self._whole(call)
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- what callbacks read, as of any pipeline of diffusers

    @property
    def guidance_scale(self) -> float:
        """The scale of the current or last call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Of the current or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> int | None:
        """Of the step at work; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the call with the latents as they are."""
        return self._interrupt

    # ---- a picture as a whole, or in tiles

    def _whole(self, call: Call) -> Any:
        high, wide = call.size
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
        result = self._decode(latent)[:, :, :high, :wide].cpu()
        for key, task in call.tasks.items():
            if task.name == "upscale":
                reference = task.condition(call.given[key]).float()
                result = match_colour(result, reference, call.method, task.scale)
        for key, task in call.tasks.items():  # last: what a task puts back exactly, nothing may touch again
            result = task.finish(result, call.given[key])
        return to_output(result, call.output_type)

    def _tiled(self, call: Call) -> Any:
        ((name, task),), tiles, whole = call.tasks.items(), call.tiles, call.given
        assert tiles is not None
        low, late = whole[name], call.method == "adain"  # which needs the whole picture
        total = call.steps * tiles.batches(low, call.batch_size) * len(low)
        bar = cast(Any, self.progress_bar)(total=total)
        pictures = [self._bands(call, row, name, "none" if late else call.method, bar) for row in range(len(low))]
        if call.output_type == "bands":
            return [closing(bar, bands) for bands in pictures]
        with bar:
            result = torch.cat([join(bands, call.size[0]) for bands in pictures])
        if late:
            result = match_colour(result, task.condition(low), call.method)
        return to_output(result, call.output_type)

    def _bands(self, call: Call, row: int, name: str, method: str, bar: Any) -> Iterator[Tensor]:
        """Return the enlargement of one of the pictures, from the top."""
        tiles, enlarge, one = call.tiles, call.tasks[name].condition, call.given[name][row : row + 1]
        assert tiles is not None
        key = call.noise.row(row).key()
        steps = Noise(1, [key], torch.Generator().manual_seed(key))  # the noise of each step, of schedulers that draw

        def make(noise: Tensor, low: Tensor, texts: list[str]) -> Tensor:
            return self._decode(self._sample(call, noise, {name: enlarge(low)}, [row] * len(low), steps, bar))

        text, channels = call.prompts.texts[row], codec.channels(self.vae)
        bands = tiles.bands(make, one, text, key, channels, call.batch_size, self._fields(call))
        return match_bands(bands, partial(tiles.enlarged, enlarge, one), call.size[0], method, tiles.scale)

    def _fields(self, call: Call) -> int:
        return call.steps if self._sampler(call.strength) == "renoise" else 1

    def _draw(self, call: Call, noise: Noise, cells: tuple[int, int]) -> Tensor:
        shape = (codec.channels(self.vae), *cells)
        return noise.draw(shape, self._fields(call), device_of(self.network), self.network.dtype)

    # ---- sampling

    def _sample(
        self, call: Call, noise: Tensor, conditions: dict[str, Tensor], rows: Sequence[int], source: Noise, bar: Any
    ) -> Tensor:
        """Return the latent of noise (B, C, h, w) and of what each task makes of its input, at output size. `rows`:
        which pictures these are; `source`: of further noise."""
        student, strength = self._store.student(call.strength, call.lora_scale)
        device, (h, w) = device_of(self.network), noise.shape[-2:]
        condition: Any = None
        if student.adapter is not None:
            read = {name: c.to(device_of(self.vae)) for name, c in conditions.items()}
            condition = student.adapter.read(read if len(read) > 1 else next(iter(read.values())), self.vae)
        conditioning, blank = self._conditionings(call, rows, (h, w), condition)
        schedule = self.schedule_for((h, w), call.steps)
        noise = noise.to(device=device, dtype=self.network.dtype)
        scheduler = scheduler_of(self, call.strength)
        step = partial(self._step, call, bar)
        with self._store.at_work(student, device, call.lora_scale):
            if scheduler is not None:
                blank = None if scheduler is self.solver else blank
                scheduler.set_timesteps(call.steps)
                self._num_timesteps = len(scheduler.timesteps)  # some take several a step
                return solve(
                    student, scheduler, noise, conditioning, call.steps, call.guide.second_pass, blank, strength, step,
                    PipelineControl(self, blank is not None), source.further(tuple(noise.shape[1:])),
                )  # fmt: skip
            schedule, grid = self._grid(call, schedule)
            return sample(
                student, schedule, noise, conditioning, call.steps, call.guide.second_pass, blank, strength, step, grid,
                self._sampler(call.strength), self._bounded(call.strength),
                PipelineControl(self, blank is not None),
            )  # fmt: skip

    def _grid(self, call: Call, schedule: Schedule) -> tuple[Schedule, Tensor]:
        """Return the schedule and the times to look at: the adapters' own, or the checkpoint's."""
        infos = self.infos(call.strength)
        if not infos and not self.shift:
            return schedule, self.kind.own_grid(self.scheduler, schedule, call.steps)
        shift = self.shift or next((info["shift"] for info in infos if info.get("shift")), 1.0)
        schedule = schedule.unstretched()
        return schedule, time_grid(schedule.horizon, call.steps, shift, schedule.whole)

    def _conditionings(
        self, call: Call, rows: Sequence[int], cells: tuple[int, int], condition: Any
    ) -> tuple[Conditioning, Conditioning | None]:
        """Return what predictions look at, and the same away from which guidance leads, if there is any."""
        size = (codec.downscale(self.vae) * cells[0], codec.downscale(self.vae) * cells[1])
        embedded, encoder = call.embedded, self.text
        if embedded is None and self.network.config.get("guidance_embeds"):
            infos = self.infos(call.strength)
            embedded = next((i["embedded_guidance"] for i in infos if i.get("embedded_guidance")), None)
        place = (device_of(self.network), self.network.dtype)

        def read(negative: bool) -> tuple[Tensor, dict[str, Tensor] | None]:
            bundle = placed(call.prompts.bundle(encoder, rows, negative), *place)
            text, added = encoder.conditions(bundle, size)
            return text, self.kind.with_embedded_guidance(self.network, added, embedded, len(rows))

        text, added = read(negative=False)
        guidance = call.guide.columns(call.prompts.words(rows))
        conditioning = Conditioning(text, condition, added=added, guidance=guidance)
        if call.guide.second_pass == 1:
            return conditioning, None
        text, added = read(negative=True)
        return conditioning, replace(conditioning, text=text, added=added)

    def _step(self, call: Call, bar: Any, index: int, t: int, z: Tensor, x: Tensor) -> Tensor | None:
        """Do what follows a step; return the latent to go on from, if a callback has another."""
        bar.update()
        if call.callback is None:
            return None
        named = {name: {"latents": z, "denoised": x}[name] for name in call.callback_tensors}
        return replaced_latents(call.callback(self, index, t, named), z)

    def _sampler(self, strength: float) -> str:
        """Return the sampler that all adapters that are set were trained for, or "ddim"."""
        names = {sampler_of(info) for info in self.infos(strength)}
        return names.pop() if len(names) == 1 else "ddim"

    def _bounded(self, strength: float) -> bool:
        """Return whether all adapters that are set were trained with boundary scaling."""
        infos = self.infos(strength)
        return bool(infos) and all(info.get("boundary") for info in infos)

    def _decode(self, latent: Tensor) -> Tensor:
        vae = self.vae if self.tiny_vae is None else self.tiny_vae
        return codec.decode(vae, latent.to(device_of(vae))).float()


@dataclass(frozen=True)
class PipelineControl:
    """What a callback may change on the pipeline while it samples; `guided`: by classifier-free guidance."""

    pipe: CoDiPipeline
    guided: bool

    def interrupted(self) -> bool:
        """Whether to stop."""
        return self.pipe.interrupt

    def guidance_scale(self, timestep: int) -> float:
        """Return the scale for this step, whose time the pipeline shows from now on."""
        self.pipe._current_timestep = timestep
        return self.pipe.guidance_scale if self.guided else 1.0


def closing(bar: Any, bands: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the same; the progress bar ends with them."""
    with bar:
        yield from bands
