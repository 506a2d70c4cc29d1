"""A backbone of one's own: the latent codec, then the text-to-image latent diffusion model, in diffusers' layout."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..data.batches import Batch, batches
from ..data.check import contact_sheet
from ..data.scenes import sample_edit, sample_scene
from ..data.sources import Sample, Source, open_source
from ..data.textures import dead_leaves
from ..errors import UserError
from ..models import codec, text
from ..models.backbone import load_backbone
from ..models.student import Conditioning, Student
from ..sampling.sampler import ddim, initial_noise
from ..schedule import DiscreteSchedule
from . import ema
from .checkpoint import Progress, write_atomically
from .tokenizer import train_tokenizer
from .trainer import Job, RunSettings, train

# At most this much of the posterior's spread is trained away: a codec whose log-variance starts at 0 drowns its means.
_LOG_VARIANCE = -6.0


@dataclass(kw_only=True)
class PretrainRecipe:
    """A text-to-image backbone from captioned pictures. One key of the YAML file each."""

    out: str
    """Folder of the finished checkpoint; work in progress lies in its `work/` sub-folder."""
    data: str = "scenes:train:48000"
    """Training pictures: a folder, WebDataset tars, or scenes:SPLIT:COUNT."""
    held_out: str = "scenes:held-out:256"
    """Pictures for figures and previews."""
    size: int = 64
    """Side of training pictures in pixels."""
    start: str | None = None
    """A checkpoint in the same layout whose weights are the starting point."""
    vae_images: int = 120_000
    vae_crop: int = 32
    """Side of the codec's training crops: it is convolutional, so crops train it as well as whole pictures."""
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    vae_widths: tuple = (24, 48, 96)
    latent_channels: int = 8
    kl_weight: float = 1e-5
    textures: float = 0.25
    """Share of procedural textures among the codec's training pictures, so that it can also hold photographs."""
    ldm_images: int = 160_000
    ldm_batch: int = 16
    ldm_learning_rate: float = 5e-4
    unet_widths: tuple = (64, 128, 192)
    unet_layers: int = 1
    text_width: int = 128
    text_layers: int = 2
    prompt_dropout: float = 0.1
    """Share of captions replaced by the empty prompt, so that guidance has an unconditional answer to move away from."""
    warmup: int = 8_000
    decay_to: float = 0.05
    ema: float = 0.999
    seed: int = 0
    device: str = "auto"
    precision: str = "no"
    log_every: int = 1_600
    preview_every: int = 20_000
    checkpoint_every: int = 8_000


class CodecJob(Job):
    """AutoencoderKL: squared and absolute error of the reconstruction, and a light KL term."""

    def __init__(self, vae: AutoencoderKL, recipe: PretrainRecipe, source: Source, held_out: Source) -> None:
        super().__init__()
        self.online, self.average = vae, ema.average_copy(vae)
        self.recipe, self.source = recipe, source
        generator = torch.Generator().manual_seed(recipe.seed)
        self.textures = dead_leaves(512, recipe.size, generator)
        self.held_out, _ = _first(held_out, 64, recipe.size)

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.source, self.recipe.vae_batch, self.recipe.size, self.recipe.seed, start)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        recipe, crop = self.recipe, self.recipe.vae_crop
        count = int(len(batch.image) * recipe.textures)
        pick = torch.randint(len(self.textures), (count,), generator=generator)
        image = torch.cat([batch.image[count:], self.textures[pick].float() / 255])
        corners = torch.randint(recipe.size - crop + 1, (len(image), 2), generator=generator).tolist()
        image = torch.stack([x[:, i : i + crop, j : j + crop] for x, (i, j) in zip(image, corners, strict=True)])
        vae: Any = self.online
        x = image.to(vae.device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return {
            "squared": (rebuilt - x).square().mean(),
            "absolute": 0.05 * (rebuilt - x).abs().mean(),
            "kl": recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        vae: Any = self.average
        image = self.held_out.to(vae.device)
        rebuilt = codec.decode(vae, codec.encode(vae, image))
        pairs = torch.stack([image[:8], rebuilt[:8]]).flatten(0, 1).cpu()
        _write_sheet(out, f"codec-{progress.images:07d}.png", pairs, 8)
        return {"psnr": _psnr(rebuilt, image)}

    def finish(self, out: Path, progress: Progress) -> None:
        vae: Any = self.average
        images, _ = _first(self.source, 512, self.recipe.size)
        with torch.no_grad():
            latents = torch.cat([vae.encode(x.to(vae.device) * 2 - 1).latent_dist.mean for x in images.split(32)])
            standardise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        write_atomically(out / "vae", lambda folder: vae.to(memory_format=torch.contiguous_format).save_pretrained(folder))


def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Folds (latent - mean) / std into the codec's two quant convolutions, in place, so that latents have mean 0 and
    variance 1 per channel and the stock scaling factor is 1. Decoding is unchanged. `mean`, `std`: (C,)."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    with torch.no_grad():
        # decode(z) = rest(W (z std + mean) + b): first, from the old weights.
        assert post is not None and quant is not None and post.bias is not None and quant.bias is not None
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()  # the log-variance shrinks with the latent
    vae.register_to_config(scaling_factor=1.0)


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
        prompts: list[str],
    ) -> None:
        super().__init__()
        self.online = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        self.average = ema.average_copy(self.online)
        self.vae, self.tokenizer, self.scheduler = vae.requires_grad_(False), tokenizer, scheduler
        self.schedule = DiscreteSchedule.from_config(scheduler.config)
        self.recipe, self.latents, self.prompts = recipe, latents, prompts
        self.tokens = text.tokenize(tokenizer, captions)
        self.empty = text.tokenize(tokenizer, [""])

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.recipe.ldm_batch, len(self.latents)
        while True:
            index = [_shuffled(self.recipe.seed, i // count, count)[i % count] for i in range(start, start + size)]
            yield torch.from_numpy(self.latents[index]).float(), self.tokens[index]
            start += size

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        device = next(self.online.parameters()).device
        x, tokens = batch[0].to(device), batch[1]
        drop = torch.rand(len(x), generator=generator) < self.recipe.prompt_dropout
        tokens = torch.where(drop[:, None], self.empty, tokens)
        share = (torch.arange(len(x)) + torch.rand(len(x), generator=generator)) / len(x)
        t = 1 + (share * self.schedule.horizon).long().clamp_max(int(self.schedule.horizon) - 1)
        eps = torch.randn(x.shape, generator=generator).to(device)
        z = self.schedule.mix(x, eps, t)
        features = text.embed(self.online["text_encoder"], tokens)  # type: ignore[index]
        output = self.online["unet"](z, self.schedule.timestep(t).to(device), features).sample  # type: ignore[index]
        return {"velocity": (output.float() - self.schedule.output(x, eps, t)).square().mean()}

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        unet, encoder = self.average["unet"], self.average["text_encoder"]  # type: ignore[index]
        prompts = self.prompts[:32]
        features = text.embed(encoder, text.tokenize(self.tokenizer, prompts))
        blank = text.embed(encoder, self.empty).expand_as(features)
        shape = (unet.config["in_channels"], *[unet.config["sample_size"]] * 2)
        z = initial_noise(shape, list(range(len(prompts)))).to(features)
        latent = ddim(
            Student(unet), self.schedule, z, Conditioning(features), steps=20, guidance_scale=3.0,
            unconditional=Conditioning(blank),
        )  # fmt: skip
        _write_sheet(out, f"samples-{progress.images:07d}.png", codec.decode(self.vae, latent).cpu(), 8)
        (out / "previews" / "prompts.txt").write_text("\n".join(prompts) + "\n")
        return {}

    def finish(self, out: Path, progress: Progress) -> None:
        self.export(out, progress)

    def export(self, out: Path, progress: Progress) -> None:
        """Writes the whole checkpoint in diffusers' Stable Diffusion layout, float16 safetensors."""
        average: Any = self.average
        pipe = StableDiffusionPipeline(
            vae=self.vae, text_encoder=average["text_encoder"], tokenizer=self.tokenizer, unet=average["unet"],
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        before = {p: next(p.parameters()).dtype for p in (pipe.vae, pipe.text_encoder, pipe.unet)}
        for part in before:
            part.to(dtype=torch.float16)

        def fill(folder: Path) -> None:
            pipe.save_pretrained(folder, safe_serialization=True)
            (folder / "training.json").write_text(json.dumps({"images": progress.images}, indent=1) + "\n")

        staged = out / "work" / "finished"
        write_atomically(staged, fill)
        for part, dtype in before.items():
            part.to(dtype=dtype)
        for item in staged.iterdir():
            target = out / item.name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            item.rename(target)
        staged.rmdir()


def _shuffled(seed: int, epoch: int, count: int, _memory: dict = {}) -> np.ndarray:  # noqa: B006 - a one-entry cache
    key = (seed, epoch, count)
    if key not in _memory:
        _memory.clear()
        _memory[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _memory[key]


def _read(source: Source, indices: range, size: int) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, S, S) and captions of the readable samples among `indices`."""
    samples = [s for s in source.read(indices, size) if isinstance(s, Sample)]
    if not samples:
        raise UserError(f"{source.describe()}: no picture could be read: check the data set")
    return torch.stack([s.image for s in samples]), [s.text for s in samples]


def _first(source: Source, count: int, size: int) -> tuple[Tensor, list[str]]:
    return _read(source, range(min(count, len(source))), size)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float((-10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-8).log10()).mean())


def _write_sheet(out: Path, name: str, images: Tensor, columns: int) -> None:
    folder = out / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, columns).save(folder / name)


def _new_vae(recipe: PretrainRecipe) -> AutoencoderKL:
    levels = len(recipe.vae_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(recipe.vae_widths),
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,  # so that tiles of any size decode alike
        sample_size=recipe.size,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        channels = recipe.latent_channels
        assert vae.encoder.conv_out.bias is not None
        vae.encoder.conv_out.bias[channels:] = _LOG_VARIANCE
        for conv in (vae.quant_conv, vae.post_quant_conv):
            assert conv is not None
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return vae


def _new_ldm(recipe: PretrainRecipe, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    attends = [False] + [True] * (len(recipe.unet_widths) - 1)  # attention is dear at the finest level
    unet = UNet2DConditionModel(
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=tuple(recipe.unet_widths),
        layers_per_block=recipe.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=32,
        norm_num_groups=16,
    )
    return unet, encoder


def _new_scheduler() -> DDIMScheduler:
    """Velocity prediction with zero terminal signal-to-noise, so that sampling starts where training ended."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


@torch.no_grad()
def _latents(vae: AutoencoderKL, source: Source, size: int, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Latents (float16 memory map) and captions of every picture of `source`, computed once per codec."""
    weights = sum(p.double().sum().item() for p in vae.parameters())
    mark = {"codec": round(weights, 6), "source": source.describe(), "size": size, "count": len(source)}
    index, data = folder / "latents.json", folder / "latents.npy"
    if index.is_file() and (kept := json.loads(index.read_text()))["mark"] == mark:
        return np.load(data, mmap_mode="r"), kept["captions"]
    folder.mkdir(parents=True, exist_ok=True)
    captions: list[str] = []
    chunks = []
    for start in range(0, len(source), 64):
        images, texts = _read(source, range(start, min(start + 64, len(source))), size)
        chunks.append(codec.encode(vae, images.to(vae.device)).half().cpu().numpy())
        captions += texts
    np.save(data, np.concatenate(chunks))
    index.write_text(json.dumps({"mark": mark, "captions": captions}))
    return np.load(data, mmap_mode="r"), captions


def pretrain(recipe: PretrainRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Trains the codec, then the latent diffusion model, and writes the checkpoint to `recipe.out`.

    Each stage resumes from its own checkpoints; a finished stage is not repeated. `minutes` ends the run early with
    everything in place to go on. Returns the folder.
    """
    out = Path(recipe.out)
    work = out / "work"
    deadline = time.monotonic() + 60 * minutes if minutes else None
    source, held_out = open_source(recipe.data), open_source(recipe.held_out)
    torch.manual_seed(recipe.seed)
    begin = load_backbone(recipe.start) if recipe.start else None
    shared = RunSettings(
        seed=recipe.seed, device=recipe.device, ema=recipe.ema, warmup=recipe.warmup, decay_to=recipe.decay_to,
        log_every=recipe.log_every, preview_every=recipe.preview_every, checkpoint_every=recipe.checkpoint_every,
    )  # fmt: skip

    if begin is None:
        if not (work / "codec" / "vae" / "config.json").is_file():
            settings = replace(
                shared, images=recipe.vae_images, batch_size=recipe.vae_batch, learning_rate=recipe.vae_learning_rate,
                # bf16 is 1.6 times faster than float32 for the codec even on CPUs that have it
                precision=recipe.precision,
            )  # fmt: skip
            job = CodecJob(_new_vae(recipe), recipe, source, held_out)
            progress = train(job, settings, work / "codec", vars(recipe), quiet=quiet, deadline=deadline)
            if progress.images < recipe.vae_images:
                return out
        vae = AutoencoderKL.from_pretrained(work / "codec" / "vae", use_safetensors=True)
    else:
        vae = begin.vae
    vae.requires_grad_(False).eval()

    latents, captions = _latents(vae, source, recipe.size, work)
    if begin is None:
        instructions = [sample_edit(sample_scene(0, "train", i), 0, "train", i).instruction for i in range(2_000)]
        tokenizer = train_tokenizer([*captions, *instructions], work / "tokenizer")
        unet, encoder = _new_ldm(recipe, tokenizer)
        scheduler = _new_scheduler()
    else:
        tokenizer, unet, encoder, scheduler = begin.tokenizer, begin.unet, begin.text_encoder, begin.scheduler
    _, prompts = _first(held_out, 32, recipe.size)
    job = LatentsJob(unet, encoder, tokenizer, vae, scheduler, recipe, latents, captions, prompts)
    settings = replace(
        shared, images=recipe.ldm_images, batch_size=recipe.ldm_batch, learning_rate=recipe.ldm_learning_rate,
        precision=recipe.precision,
    )  # fmt: skip
    progress = train(job, settings, work / "ldm", vars(recipe), quiet=quiet, deadline=deadline)
    job.export(out, progress)
    return out
