"""Training of a backbone: the latent codec, then text-to-image latent diffusion, written in diffusers' layout."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from ..data.scenes import sample_edit, sample_scene
from ..data.sources import SceneSource, Source, open_source
from ..errors import UserError
from ..files import write_folder
from ..models import codec
from ..models.backbones import find_model, load_backbone
from . import processes
from .checkpoint import CHECKPOINTS, Progress, require_same_run
from .codec import CodecJob, DecoderJob, new_vae, open_vae
from .flux import FluxJob, new_flux
from .latents import EditedPictures, LatentsJob, encode_all
from .lock import only_run
from .pretrain_recipe import PretrainRecipe, first_pictures
from .scene_store import stored
from .tokenizer import load_unigram, train_tokenizer, train_unigram
from .trainer import Job, RunSettings, SharedSettings, make_accelerator, train
from .unet import UNetJob, new_ldm, new_scheduler

STAGES = ("codec", "decoder", "ldm")  # folders below `training`
# Keys that may differ between a run and its continuation.
_FREE = {"out", "vae_images", "decoder_images", "ldm_images", "max_corrupt", "device", "keep", "scene_store"}
_FREE |= {"log_every", "preview_every", "checkpoint_every"}


def pretrain(recipe: PretrainRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Train the codec, then the latent diffusion model, and write the checkpoint to `recipe.out`.

    Each stage resumes from its own checkpoints; a finished stage is not repeated. After `minutes` the run stops with a
    checkpoint, to go on later. Returns the folder. Raises UserError for an unusable recipe, data or model, and if
    another process trains in that folder.
    """
    recipe.validate()
    shared = RunSettings(
        optimizer=recipe.optimizer, **{field.name: getattr(recipe, field.name) for field in fields(SharedSettings)}
    )
    accelerator, work = make_accelerator(shared), Path(recipe.out) / "training"
    with only_run(Path(recipe.out), work, *(work / stage for stage in STAGES)):
        deadline = time.monotonic() + 60 * minutes if minutes else None
        return _pretrain(_open_run(recipe, shared, accelerator, quiet, deadline))


def _pretrain(run: _Run) -> Path:
    recipe, vae = run.recipe, _codec(run)
    if vae is None:
        return run.out
    latents, captions = _encode(run, vae) if recipe.ldm_images else (np.zeros(0), [])
    vae = _decoder(run, vae)
    if vae is None:
        return run.out
    if not recipe.ldm_images:
        with processes.sharing_errors():
            if run.accelerator.is_main_process:
                write_folder(run.out / "vae", vae.save_pretrained)
        return run.out
    job = _text_to_image(run, vae, latents, captions)
    progress = run.train("ldm", job, recipe.ldm_images, recipe.ldm_batch, recipe.ldm_learning_rate)
    with processes.sharing_errors():
        if progress.updates and run.accelerator.is_main_process:
            job.export(run.out, progress)
    return run.out


@dataclass
class _Run:
    """Settings and data that the stages share. `start`: the backbone whose weights are the starting point, or None."""

    recipe: PretrainRecipe
    shared: RunSettings
    accelerator: Accelerator
    source: Source
    held_out: Source
    start: Any
    quiet: bool
    deadline: float | None

    @property
    def out(self) -> Path:
        return Path(self.recipe.out)

    @property
    def work(self) -> Path:
        return self.out / "training"

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def train(self, stage: str, job: Job, images: int, batch: int, learning_rate: float) -> Progress:
        """Train or resume the job of a stage, below `work`."""
        settings = replace(self.shared, images=images, batch_size=batch, learning_rate=learning_rate)
        record = vars(self.recipe)
        return train(job, settings, self.work / stage, record, self.accelerator, self.quiet, self.deadline)

    def finished_vae(self, stage: str) -> Path | None:
        """Return the folder of the codec of a finished stage, None for an unfinished one."""
        folder = self.work / stage / "vae"
        return folder if (folder / "config.json").is_file() else None


def _open_run(
    recipe: PretrainRecipe, shared: RunSettings, accelerator: Accelerator, quiet: bool, deadline: float | None
) -> _Run:
    with processes.sharing_errors():
        for stage in STAGES:
            require_same_run(Path(recipe.out) / "training" / stage / CHECKPOINTS, recipe, _FREE)
        source, held_out = (_pictures(spec, recipe, accelerator.device) for spec in (recipe.data, recipe.held_out))
        torch.manual_seed(recipe.seed)
        start = open_start(recipe.start, recipe.network) if recipe.start else None
    return _Run(recipe, shared, accelerator, source, held_out, start, quiet, deadline)


def open_start(name: str, network: str) -> Any:
    """Load the checkpoint `name` (a folder or shipped model) in float32; return an object with its parts. Raises
    UserError if its layout is not that of `network`."""
    folder = Path(find_model(name))
    index = folder / "model_index.json"
    kind = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
    if (kind == "FluxPipeline") != (network == "flux"):
        raise UserError(f"start {name}: is a {kind}, which does not fit network {network}: name another checkpoint")
    return FluxPipeline.from_pretrained(folder) if network == "flux" else load_backbone(name)


def _pictures(spec: str, recipe: PretrainRecipe, device: torch.device, columns: tuple[str, ...] = ()) -> Source:
    source = open_source(spec, columns)
    if isinstance(source, SceneSource):
        source.device = str(device)
    return stored(source, recipe.scene_store)


def _codec(run: _Run) -> AutoencoderKL | None:
    """Return the codec: that of the recipe or of the starting point, or a trained one; None if its training is not
    finished."""
    recipe, start = run.recipe, run.start
    if recipe.vae is not None:
        vae = open_vae(recipe.vae)
    elif start is not None and not recipe.tune_codec:
        vae = start.vae
    else:
        if run.finished_vae("codec") is None:
            with processes.sharing_errors():
                initial = start.vae.requires_grad_(True) if start else new_vae(recipe)
                if recipe.vae_start is not None:
                    initial = open_vae(recipe.vae_start)
                job = CodecJob(initial, recipe, run.source, run.held_out)
            progress = run.train("codec", job, recipe.vae_images, recipe.vae_batch, recipe.vae_learning_rate)
            if progress.images < recipe.vae_images:
                return None
        vae = open_vae(run.work / "codec" / "vae")
    return vae.requires_grad_(False).eval().to(run.device)  # type: ignore[return-value]


def _encode(run: _Run, vae: AutoencoderKL) -> tuple[np.ndarray, list[str]]:
    """Return the latents and captions of all training images, then of edited images with their instructions."""
    recipe = run.recipe

    def encode(pictures: Source, folder: Path) -> tuple[np.ndarray, list[str]]:
        return processes.first_then_all(lambda: encode_all(vae, pictures, recipe.size, folder, recipe.max_corrupt))

    latents, captions = encode(run.source, run.work)
    if recipe.edits is not None:
        edits = EditedPictures(_pictures(recipe.edits, recipe, run.device, ("edited_image",)))
        edited, instructions = encode(edits, run.work / "edits")
        latents, captions = np.concatenate([latents, edited]), [*captions, *instructions]
    return latents, captions


def _decoder(run: _Run, vae: AutoencoderKL) -> AutoencoderKL | None:
    """Return the codec after a further training of its decoder, if the recipe has one; None if it is not finished."""
    recipe = run.recipe
    if not recipe.decoder_images:
        return vae
    if run.finished_vae("decoder") is None:
        with processes.sharing_errors():
            job = DecoderJob(vae, recipe, run.source, run.held_out)
        progress = run.train("decoder", job, recipe.decoder_images, recipe.vae_batch, recipe.decoder_learning_rate)
        if progress.images < recipe.decoder_images:
            return None
    vae = open_vae(run.work / "decoder" / "vae")
    return vae.requires_grad_(False).eval().to(run.device)  # type: ignore[return-value]


def _text_to_image(run: _Run, vae: AutoencoderKL, latents: np.ndarray, captions: list[str]) -> LatentsJob:
    """Return the job of latent diffusion, with untrained networks or those of the starting point."""
    recipe, start = run.recipe, run.start
    with processes.sharing_errors():
        images, held_captions = first_pictures(run.held_out, 256, recipe.size)
    with torch.no_grad():
        held_latents: Tensor = torch.cat([codec.encode(vae, part.to(run.device)) for part in images.split(64)])
    data = (vae, recipe, latents, captions, held_latents, held_captions)
    before = 0  # training images of the starting point
    if start is not None:
        record = Path(find_model(recipe.start or "")) / "training.json"
        before = json.loads(record.read_text())["images"] if record.is_file() else 0
    tokenizer = start.tokenizer if start is not None else _tokenizer(run, captions)
    if recipe.network == "flux":
        unigram = start.tokenizer_2 if start is not None else load_unigram(run.work / "tokenizer_2")
        names = ("transformer", "text_encoder", "text_encoder_2")
        parts = {n: getattr(start, n) for n in names} if start is not None else new_flux(recipe, tokenizer, unigram)
        return FluxJob(parts, tokenizer, unigram, *data, before)
    if start is not None:
        return UNetJob(start.unet, start.text_encoder, tokenizer, start.scheduler, *data, before)
    unet, encoder = new_ldm(recipe, tokenizer)
    return UNetJob(unet, encoder, tokenizer, new_scheduler(), *data, before)


def _tokenizer(run: _Run, captions: list[str]) -> CLIPTokenizer:
    """Train CLIP's tokenizer on the captions and return it; for flux, also train T5's below `work`."""
    instructions = []
    if isinstance(run.source, SceneSource):  # adapters are later trained on them
        instructions = [sample_edit(sample_scene(0, "train", i), 0, "train", i).instruction for i in range(2_000)]
    with processes.sharing_errors():
        if run.accelerator.is_main_process:
            train_tokenizer([*captions, *instructions], run.work / "tokenizer")
            if run.recipe.network == "flux":
                train_unigram([*captions, *instructions], run.work / "tokenizer_2")
    return CLIPTokenizer.from_pretrained(run.work / "tokenizer")
