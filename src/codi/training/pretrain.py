"""A backbone of one's own: the latent codec, then the text-to-image latent diffusion model, in diffusers' layout."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from ..data.scenes import sample_edit, sample_scene
from ..data.sources import SceneSource, Source, open_source
from ..models import codec
from ..models.backbone import find_model, load_backbone
from . import processes
from .checkpoint import require_same_run
from .codec import CodecJob, DecoderJob, new_vae
from .latents import EditedPictures, LatentsJob, encode_all, new_ldm, new_scheduler
from .pretrain_recipe import PretrainRecipe, first_pictures
from .tokenizer import train_tokenizer
from .trainer import RunSettings, SharedSettings, make_accelerator, train

# Keys that may differ between a run and its continuation.
_FREE = {"out", "vae_images", "decoder_images", "ldm_images", "max_corrupt", "device", "keep"}
_FREE |= {"log_every", "preview_every", "checkpoint_every"}


def pretrain(recipe: PretrainRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Trains the codec, then the latent diffusion model, and writes the checkpoint to `recipe.out`.

    Each stage resumes from its own checkpoints; a finished stage is not repeated. `minutes` ends the run early with
    everything in place to go on. Returns the folder.
    """
    recipe.validate()
    out = Path(recipe.out)
    work = out / "training"
    deadline = time.monotonic() + 60 * minutes if minutes else None
    shared = RunSettings(**{field.name: getattr(recipe, field.name) for field in fields(SharedSettings)})
    accelerator = make_accelerator(shared)
    device = accelerator.device
    with processes.together():
        for stage in ("codec", "decoder", "ldm"):
            require_same_run(work / stage / "checkpoints", recipe, _FREE)
        source, held_out = open_source(recipe.data), open_source(recipe.held_out)
        if isinstance(source, SceneSource):
            source.device = str(device)
        torch.manual_seed(recipe.seed)
        begin = load_backbone(recipe.start) if recipe.start else None

    if begin is None or recipe.tune_codec:
        if not (work / "codec" / "vae" / "config.json").is_file():
            settings = replace(
                shared, images=recipe.vae_images, batch_size=recipe.vae_batch, learning_rate=recipe.vae_learning_rate
            )
            with processes.together():
                fresh = begin.vae.requires_grad_(True) if begin else new_vae(recipe)
                job = CodecJob(fresh, recipe, source, held_out)
            progress = train(job, settings, work / "codec", vars(recipe), accelerator, quiet, deadline)
            if progress.images < recipe.vae_images:
                return out
        vae = AutoencoderKL.from_pretrained(work / "codec" / "vae", use_safetensors=True)
    else:
        vae = begin.vae
    vae.requires_grad_(False).eval().to(device)

    def encode(pictures: Source, folder: Path) -> tuple[np.ndarray, list[str]]:
        return processes.first_then_all(lambda: encode_all(vae, pictures, recipe.size, folder, recipe.max_corrupt))

    latents, captions = encode(source, work)
    if recipe.edits is not None:
        edits = open_source(recipe.edits, ("edited_image",))
        if isinstance(edits, SceneSource):
            edits.device = str(device)
        edited, instructions = encode(EditedPictures(edits), work / "edits")
        latents, captions = np.concatenate([latents, edited]), [*captions, *instructions]
    if recipe.decoder_images:
        if not (work / "decoder" / "vae" / "config.json").is_file():
            settings = replace(
                shared,
                images=recipe.decoder_images,
                batch_size=recipe.vae_batch,
                learning_rate=recipe.decoder_learning_rate,
            )
            with processes.together():
                job = DecoderJob(vae, recipe, source, held_out)
            progress = train(job, settings, work / "decoder", vars(recipe), accelerator, quiet, deadline)
            if progress.images < recipe.decoder_images:
                return out
        vae = AutoencoderKL.from_pretrained(work / "decoder" / "vae", use_safetensors=True)
        vae.requires_grad_(False).eval().to(device)
    if begin is None:
        words = []
        if isinstance(source, SceneSource):  # whose instructions an adapter will be trained on
            words = [sample_edit(sample_scene(0, "train", i), 0, "train", i).instruction for i in range(2_000)]
        with processes.together():
            if accelerator.is_main_process:
                train_tokenizer([*captions, *words], work / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        unet, encoder = new_ldm(recipe, tokenizer)
        scheduler = new_scheduler()
    else:
        tokenizer, unet, encoder, scheduler = begin.tokenizer, begin.unet, begin.text_encoder, begin.scheduler
    note = Path(find_model(recipe.start)) / "training.json" if recipe.start else None
    before = json.loads(note.read_text())["images"] if note is not None and note.is_file() else 0
    with processes.together():
        images, held_captions = first_pictures(held_out, 256, recipe.size)
    with torch.no_grad():
        held = torch.cat([codec.encode(vae, part.to(device)) for part in images.split(64)])
    job = LatentsJob(unet, encoder, tokenizer, vae, scheduler, recipe, latents, captions, held, held_captions, before)
    settings = replace(
        shared, images=recipe.ldm_images, batch_size=recipe.ldm_batch, learning_rate=recipe.ldm_learning_rate
    )
    progress = train(job, settings, work / "ldm", vars(recipe), accelerator, quiet, deadline)
    with processes.together():
        if progress.updates and accelerator.is_main_process:
            job.export(out, progress)
    return out
