"""`CoDiPipeline`: a backbone and its adapters as one diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ..errors import UserError
from ..models import codec
from ..models.student import Conditioning
from ..models.text import embed_prompts
from ..schedule import FlowSchedule
from .adapted import AdaptedPipeline
from .colour import match_bands, match_colour, require_method
from .guidance import Guidance
from .inputs import ImageInput, brought, one_for_each, output_size, require_possible, to_output
from .sampler import StepCallback, initial_noise, sample, time_grid
from .solvers import solve
from .tiles import Tiles
from .tiling import join, mirror_pad

LARGE = 3  # times the size that the backbone was trained at: beyond it users are warned, but for tiled upscaling


class CoDiPipeline(AdaptedPipeline):
    """Image-conditioned sampling in 1 to 4 steps, by any of the adapters loaded; without one, plain text-to-image.

    `network` (`unet` or `transformer`) is the backbone's own and never changes: adapters stand beside it. A saved
    pipeline is a diffusers folder with an `adapters/` folder in it, so that diffusers opens the backbone of it as well.
    `tiny_vae` decodes in the VAE's place if there is one; conditions are encoded by the VAE always.

    Adapters with low-rank updates have a network of their own modules on the backbone's weights: attention processors
    and slicing that are set on `unet`, or by the pipeline's `enable_...`, do not reach it. Set them on
    `student.network`, that of the adapters that are set. No network is called as a whole, since adapters work inside
    it: so `torch.compile(unet)` changes nothing, `compile` does, and offloading of whole models is not supported.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | dict[str, ImageInput] | None = None,
        mask: Any = None,
        prompt: str | Sequence[str] | None = "",
        steps: int = 4,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        embedded_guidance: float | None = None,
        negative_prompt: str | None = "",
        strength: float = 1.0,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        tile: int | None = None,
        colour: str | None = None,
        batch_size: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures; `.images` is a list of PIL images, or with output_type "pt" a tensor (B, 3, H, W) in [0, 1],
        "np" an array (B, H, W, 3), "latent" latents.

            "bands", of upscaling in tiles: iterators, one a picture, that make it row by row from the top when asked,
            (1, 3, rows, W) at a time, so that no picture need be held whole.
        image: what the task needs, in [0, 1] (see inputs.to_tensor); {name: image} where several adapters are set.
            None for text-to-image, whose size is `height` x `width`, by default the backbone's own.
        mask: for inpainting, 1 (white) = make new. prompt: one, or one an image. steps: 1 and up; adapters are
            distilled for 1 to 4.
        guidance_scale: None is the adapter's own. Distilled in, it costs nothing; otherwise any but 1 costs a second
            forward pass a step, away from `negative_prompt`. image_guidance_scale: how closely an edit keeps to the
            picture, if that was distilled in. embedded_guidance: a scale that the backbone itself takes as an input
            (FLUX.1-dev); None is the adapter's or the family's own.
        strength: the adapters' influence; 0 is exactly the backbone. Full adapters know only 0 and 1.
        seed: one an image, or one number (then image i uses seed + i). The same seed gives the same picture whatever
            else is in the batch.
        tile: upscaling only: side of tiles in input pixels; 0 never tiles, None tiles what is larger than 1.5 times the
            backbone's own size (tiles.LEAST at least) in tiles of that size. batch_size: tiles at a time.
        colour: "wavelet", "back-projection", "adain" or "none": correction of the result to the input (upscaling; see
            colour.match_colour). None is the adapter's own.
        Raises UserError for arguments that no picture can be made from.
        """
        tasks, f = self.tasks, self.cell
        require_possible(steps, int(self.schedule.horizon), strength, output_type, callback_on_step_end_tensor_inputs)
        if image is not None and not tasks:
            raise UserError("image: no adapter is set, and text-to-image takes none: load_adapter first")
        guide = self.guidance(guidance_scale, image_guidance_scale, strength)
        if guide.second_pass != 1:
            self.kind.require_guidance(self, guide.second_pass)
        if guide.distilled and negative_prompt:
            raise UserError("negative_prompt: guidance is distilled into this adapter, away from no prompt at all: "
                            "leave it out")  # fmt: skip
        own = self._size(None, None)
        # A picture that is given sets the size itself.
        size = own if image is not None else self._size(height, width)
        given = brought(tasks, image, mask, size) if tasks else {"": torch.zeros(1, 0, *size)}
        given, prompts, seeds = one_for_each(given, prompt, seed)
        name, one = next(iter(given.items()))
        high, wide = output_size(tasks[name], one) if tasks else size
        if (height or high, width or wide) != (high, wide):
            raise UserError(f"size {width} x {height}: the picture given makes {wide} x {high} px: leave the size out")
        tiles = None
        if [task.name for task in tasks.values()] == ["upscale"]:
            tiles = self.tiles(one, tile)
        elif tile:
            raise UserError(f"tile {tile}: tiles are for upscaling alone: leave it out")
        elif tasks and max(high, wide) > LARGE * max(own):
            warnings.warn(f"picture of {wide} x {high} px: this model was trained at {max(own)}: what it makes may not "
                          "hold together, and takes long: make the picture smaller first", stacklevel=1)  # fmt: skip
        if tiles and output_type == "latent":
            raise UserError("output_type 'latent': tiles have none in common: pass tile=0, or another type")
        shelved = self._shelf.infos(strength)
        method: str = colour or next((info["colour"] for info in shelved if info.get("colour")), "wavelet")
        if output_type == "bands" and (not tiles or method == "adain"):
            raise UserError("output_type 'bands': of pictures that are upscaled in tiles, without adain: use pt")
        require_method(method)

        def step(index: int, t: int, z: Tensor, x: Tensor) -> Tensor | None:
            bar.update()
            if callback_on_step_end is None:
                return None
            named = {key: {"latents": z, "denoised": x}[key] for key in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, index, t, named) or {}).get("latents")

        away = negative_prompt or ""
        walk = partial(
            self._walk, steps=steps, strength=strength, guide=guide, negative_prompt=away, callback=step,
            embedded=embedded_guidance, embed=cache(partial(embed_prompts, self.text)),
        )  # fmt: skip
        channels, progress_bar = codec.channels(self.vae), cast(Any, self.progress_bar)
        fields = steps if self._all(strength, "jumps") else 1
        bar = progress_bar(total=steps * (tiles.batches(one, batch_size) * len(one) if tiles else 1))
        if tiles:
            enlarge, late = tasks[name].condition, method == "adain"  # which needs the whole picture

            def make(noise: Tensor, low: Tensor, texts: list[str]) -> Tensor:
                return self._decode(walk(noise, {name: enlarge(low)}, texts))

            pictures = [
                match_bands(
                    tiles.bands(make, low, text, number, channels, batch_size, fields),
                    partial(tiles.enlarged, enlarge, low), high, "none" if late else method, tiles.scale,
                )
                for low, text, number in zip(one.split(1), prompts, seeds, strict=True)
            ]  # fmt: skip
            if output_type == "bands":
                return self._handed([closing(bar, bands) for bands in pictures], return_dict)
            with bar:
                result = torch.cat([join(bands, high) for bands in pictures])
            if late:
                result = match_colour(result, enlarge(one), method)
        else:
            covered = (-(-high // f) * f, -(-wide // f) * f)  # mirrored up to whole tokens, cut off again below
            cells = tuple(side // codec.downscale(self.vae) for side in covered)
            conditions = {key: mirror_pad(task.condition(given[key]), covered) for key, task in tasks.items()}
            with bar:
                latent = walk(initial_noise((channels, *cells), seeds, fields), conditions, prompts)
            if output_type == "latent":
                return self._handed(latent, return_dict)
            result = self._decode(latent)[:, :, :high, :wide].cpu()
            for key, task in tasks.items():
                if task.name == "upscale":
                    result = match_colour(result, task.condition(given[key]).float(), method, task.scale)
            for key, task in tasks.items():  # last: what a task puts back exactly, nothing may touch again
                result = task.finish(result, given[key])
        return self._handed(to_output(result, output_type), return_dict)

    def _handed(self, images: Any, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def tiles(self, given: Tensor, side: int | None = None) -> Tiles | None:
        """The tiles that a picture (B, C, h, w) is upscaled in, of `side` input pixels (0: none; None: as needed)."""
        scale, f = self.task.scale, codec.downscale(self.vae)  # type: ignore[union-attr]
        return Tiles.choose(side, given, scale, f, max(self._size(None, None)), self.cell // f)

    @property
    def cell(self) -> int:
        """Pixels along a side of one token, or of one latent cell where the network has no tokens."""
        return codec.downscale(self.vae) * self.kind.patch(self.network.config)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(h, w) of text-to-image. Raises UserError for sides that are no whole cells."""
        f = self.cell
        own = self.kind.sample_size(self.network, self.vae) * codec.downscale(self.vae)
        for side in (height, width):
            if side is not None and (side < f or side % f):
                raise UserError(f"size {width} x {height}: not multiples of {f} px: use {max(1, round(side / f)) * f}")
        return height or own, width or own

    def _walk(
        self,
        noise: Tensor,
        conditions: dict[str, Tensor],
        prompts: list[str],
        *,
        steps: int,
        strength: float,
        guide: Guidance,
        negative_prompt: str,
        embedded: float | None,
        callback: StepCallback,
        embed: Callable[..., tuple[Tensor, dict[str, Tensor] | None]],
    ) -> Tensor:
        """From noise (B, C, h, w) and what each task makes of its input, at output size, to the latent. `embed` is
        embed_prompts of the pipeline's text encoders, and may remember: tiles have one prompt."""
        infos = self._shelf.infos(strength)
        jumps, boundary = (self._all(strength, key) for key in ("jumps", "boundary"))
        student, strength = self._shelf.student(strength)
        condition: Any = None
        if student.adapter is not None:
            read = {name: c.to(self.device) for name, c in conditions.items()}
            condition = student.adapter.read(read if len(read) > 1 else next(iter(read.values())), self.vae)
        size = (codec.downscale(self.vae) * noise.shape[-2], codec.downscale(self.vae) * noise.shape[-1])
        if embedded is None and self.network.config.get("guidance_embeds"):
            embedded = next((i["embedded_guidance"] for i in infos if i.get("embedded_guidance")), None)

        def conditions_of(words: tuple[str, ...], negative: bool = False) -> tuple[Tensor, dict[str, Tensor] | None]:
            text, added = embed(words, size, negative)
            return text, self.kind.with_embedded_guidance(self.network, added, embedded, len(words))

        text, added = conditions_of(tuple(prompts))
        conditioning = Conditioning(text, condition, added=added, guidance=guide.columns(prompts))
        blank = None
        if guide.second_pass != 1:
            negative, added = conditions_of((negative_prompt,) * len(prompts), True)
            blank = replace(conditioning, text=negative, added=added)
        shift = self.shift or next((info["shift"] for info in infos if info.get("shift")), 1.0)
        schedule = self.schedule_for((noise.shape[-2], noise.shape[-1]), steps)
        if infos or self.shift:
            schedule = schedule.unstretched()
            grid = time_grid(schedule.horizon, steps, shift, schedule.whole)
        else:
            grid = self.kind.own_grid(self.scheduler, schedule, steps)
        noise = noise.to(device=self.device, dtype=self.network.dtype)
        if self.solver is not None:
            if isinstance(schedule, FlowSchedule):
                raise UserError("solver: is for Stable Diffusion's noise levels: leave it out for flow matching")
            return solve(student, self.solver, noise, conditioning, steps)
        own = None if infos or self.shift else self.kind.solver(self.scheduler)
        if own is not None:
            return solve(student, own, noise, conditioning, steps, guide.second_pass, blank, strength, callback)
        return sample(
            student, schedule, noise, conditioning, steps, guide.second_pass, blank, strength, callback, grid,
            jumps, boundary,
        )  # fmt: skip

    def _all(self, strength: float, key: str) -> bool:
        """Whether all adapters that are set have this in their info, e.g. `jumps`: that they are asked where the ODE
        ends, having learnt to say so."""
        infos = self._shelf.infos(strength)
        return bool(infos) and all(info.get(key) for info in infos)

    def _decode(self, latent: Tensor) -> Tensor:
        return codec.decode(self.vae if self.tiny_vae is None else self.tiny_vae, latent).float()


def closing(bar: Any, bands: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same; the progress bar ends with them."""
    with bar:
        yield from bands
