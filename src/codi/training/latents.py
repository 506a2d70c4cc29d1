"""Stage two of a backbone: text-to-image diffusion of the codec's latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..data.batches import judge, report_corrupt
from ..data.samples import CorruptSample, Sample
from ..data.sources import Source
from ..models import codec, text
from ..models.student import Conditioning, Student
from ..sampling.sampler import initial_noise, sample
from ..schedule import DiscreteSchedule
from . import ema
from .checkpoint import Progress, edit_json, write_atomically
from .pretrain_recipe import PretrainRecipe, read_pictures, write_sheet
from .tokenizer import write_classic_files
from .trainer import Job


class LatentsJob(Job):
    """Text-to-image latent diffusion: squared error of the velocity, U-Net and text encoder trained together.

    Times are stratified over the batch; with the paper's notation the loss is |v - v_hat|^2, t ~ U{1..T}.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        recipe: PretrainRecipe,
        latents: np.ndarray,
        captions: list[str],
        held_latents: Tensor,
        held_captions: list[str],
        images_before: int = 0,
    ) -> None:
        super().__init__()
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a quarter faster on all devices
        self.online = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        self.average = ema.average_copy(self.online)
        self.vae, self.tokenizer, self.scheduler = vae.requires_grad_(False), tokenizer, scheduler
        self.schedule = DiscreteSchedule.from_config(scheduler.config)
        self.recipe, self.latents = recipe, latents
        self.images_before = images_before  # that the starting weights had seen
        self.held_latents, self.held_captions = held_latents, held_captions
        self.tokens = text.tokenize(tokenizer, captions)
        self.empty = text.tokenize(tokenizer, [""])

    def batches(self, start: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.recipe.ldm_batch, len(self.latents)
        while True:
            index = [shuffled(self.recipe.seed, i // count, count)[i % count] for i in range(start, start + size)]
            yield torch.from_numpy(self.latents[index]).float(), self.tokens[index]
            start += stride

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        x, tokens = batch
        drop = torch.rand(len(x), generator=generator) < self.recipe.prompt_dropout
        tokens = torch.where(drop[:, None], self.empty, tokens.cpu())  # which DDP may have moved to a GPU
        share = (torch.arange(len(x)) + torch.rand(len(x), generator=generator)) / len(x)
        t = 1 + (share * self.schedule.horizon).long().clamp_max(int(self.schedule.horizon) - 1)
        return {"velocity": self._loss(self.online, x, tokens, t, generator)}

    def _loss(self, model: Any, x: Tensor, tokens: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        x = x.to(next(model.parameters()).device)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        z = self.schedule.mix(x, eps, t)
        features = text.embed(model["text_encoder"], tokens)
        output = model["unet"](z, self.schedule.timestep(t).to(x.device), features).sample
        return (output.float() - self.schedule.output(x, eps, t)).square().mean()

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        unet, encoder = self.average["unet"], self.average["text_encoder"]  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)  # the same noise and times at every call, so that figures compare
        tokens = text.tokenize(self.tokenizer, self.held_captions)
        t = self.schedule.draw(len(tokens), 1, False, generator)
        held_out = self._loss(self.average, self.held_latents, tokens, t, generator)
        prompts = self.held_captions[:32]
        features = text.embed(encoder, text.tokenize(self.tokenizer, prompts))
        blank = text.embed(encoder, self.empty).expand_as(features)
        shape = (unet.config["in_channels"], *[unet.config["sample_size"]] * 2)
        z = initial_noise(shape, list(range(len(prompts)))).to(features)
        latent = sample(
            Student(unet), self.schedule, z, Conditioning(features), steps=20, guidance_scale=3.0,
            unconditional=Conditioning(blank),
        )  # fmt: skip
        write_sheet(out, f"samples-{progress.images:07d}.png", codec.decode(self.vae, latent).cpu(), 8)
        (out / "previews" / "prompts.txt").write_text("\n".join(prompts) + "\n")
        return {"held_out_velocity": float(held_out)}

    def export(self, out: Path, progress: Progress) -> None:
        """Writes the whole checkpoint in diffusers' Stable Diffusion layout, float16 safetensors."""
        average: Any = self.average
        build: Any = StableDiffusionPipeline  # its annotations forbid what its documentation allows
        pipe = build(
            vae=self.vae, text_encoder=average["text_encoder"], tokenizer=self.tokenizer, unet=average["unet"],
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        before = {p: next(p.parameters()).dtype for p in (pipe.vae, pipe.text_encoder, pipe.unet)}
        for part in before:
            part.to(dtype=torch.float16)

        def fill(folder: Path) -> None:
            pipe.save_pretrained(folder, safe_serialization=True)
            # float16 on disk, but a stock pipeline without a dtype shall load all parts in float32 alike.
            edit_json(folder / "text_encoder" / "config.json", dtype="float32")
            for part in ("vae", "unet", "text_encoder"):
                edit_json(folder / part / "config.json", _name_or_path=None)  # where it lay on this machine
            write_classic_files(folder / "tokenizer")
            (folder / "training.json").write_text(
                json.dumps({"images": self.images_before + progress.images}, indent=1) + "\n"
            )

        staged, index = out / "training" / "finished", "model_index.json"
        write_atomically(staged, fill)
        for part, dtype in before.items():
            part.to(dtype=dtype)
        # Without its index a folder is no model: gone first and back last, it never stands beside parts of two models.
        (out / index).unlink(missing_ok=True)
        for item in sorted(staged.iterdir(), key=lambda item: item.name == index):
            target = out / item.name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            item.rename(target)
        staged.rmdir()


def shuffled(seed: int, epoch: int, count: int, _memory: dict = {}) -> np.ndarray:  # noqa: B006 - a one-entry cache
    """The order of `count` things in that epoch."""
    key = (seed, epoch, count)
    if key not in _memory:
        _memory.clear()
        _memory[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _memory[key]


def new_ldm(recipe: PretrainRecipe, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """An untrained U-Net and text encoder of the recipe's size."""
    ids: Any = tokenizer
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            pad_token_id=ids.pad_token_id,
        )
    )
    attends = [False] + [True] * (len(recipe.unet_widths) - 1)  # attention is dear at the finest level
    # diffusers reads "attention_head_dim" of this class as the number of heads: these have 32 channels each.
    heads: Any = tuple(max(1, width // 32) for width in recipe.unet_widths)
    unet = UNet2DConditionModel(
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=tuple(recipe.unet_widths),
        layers_per_block=recipe.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=heads,
        norm_num_groups=16,
    )
    return unet, encoder


def new_scheduler() -> DDIMScheduler:
    """Velocity prediction with zero terminal signal-to-noise, so that sampling starts where training ended."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


class EditedPictures:
    """A source's edited pictures under their instructions, as if these were captions."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        return f"{self.source.describe()}, edited"

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        found = self.source.read(indices, size, crops)
        return [
            replace(s, image=s.extras["edited_image"], text=s.instruction, extras={}) if isinstance(s, Sample) else s
            for s in found
        ]


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, source: Source, size: int, folder: Path, max_corrupt: float = 0.05
) -> tuple[np.ndarray, list[str]]:
    """Latents (float16 memory map) and captions of every picture of `source`, computed once per codec. Those that
    cannot be read are listed in `folder`/corrupt.json. Raises UserError where they are more than the share
    `max_corrupt`."""
    weights = sum(p.double().sum().item() for p in vae.parameters())
    mark = {"codec": round(weights, 6), "source": source.describe(), "size": size, "count": len(source)}
    index, data = folder / "latents.json", folder / "latents.npy"
    if index.is_file() and (kept := json.loads(index.read_text()))["mark"] == mark:
        return np.load(data, mmap_mode="r"), kept["captions"]
    folder.mkdir(parents=True, exist_ok=True)
    captions: list[str] = []
    corrupt: list[CorruptSample] = []
    chunks, report = [], folder / "corrupt.json"
    for start in range(0, len(source), 64):
        indices = range(start, min(start + 64, len(source)))
        images, texts, unread = read_pictures(source, indices, size)
        if images:
            chunks.append(codec.encode(vae, torch.stack(images).to(vae.device)).half().cpu().numpy())
        captions, corrupt = captions + texts, corrupt + unread
        report_corrupt(report, indices.stop, corrupt)
    judge(corrupt, len(source), len(source), max_corrupt, report)
    np.save(data, np.concatenate(chunks))
    index.write_text(json.dumps({"mark": mark, "captions": captions}))
    return np.load(data, mmap_mode="r"), captions
