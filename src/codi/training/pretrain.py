"""A backbone of one's own: the latent codec, then the text-to-image latent diffusion model, in diffusers' layout."""

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

    Each stage resumes from its own checkpoints; a finished stage is not repeated. `minutes` ends the run early with
    everything in place to go on. Returns the folder. Raises UserError for a recipe, data or a model that will not do,
    and where another process trains in that folder.
    """
    recipe.validate()
    shared = RunSettings(
        optimizer=recipe.optimizer, **{field.name: getattr(recipe, field.name) for field in fields(SharedSettings)}
    )
    accelerator, work = make_accelerator(shared), Path(recipe.out) / "training"
    with only_run(Path(recipe.out), work, *(work / stage for stage in STAGES)):
        deadline = time.monotonic() + 60 * minutes if minutes else None
        return _pretrain(_open(recipe, shared, accelerator, quiet, deadline))


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
    """What the stages share. `begin`: the backbone whose weights are the starting point, if there is one."""

    recipe: PretrainRecipe
    shared: RunSettings
    accelerator: Accelerator
    source: Source
    held_out: Source
    begin: Any
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
        """Trains or resumes the job of a stage, below `work`."""
        settings = replace(self.shared, images=images, batch_size=batch, learning_rate=learning_rate)
        record = vars(self.recipe)
        return train(job, settings, self.work / stage, record, self.accelerator, self.quiet, self.deadline)

    def finished_vae(self, stage: str) -> Path | None:
        """The folder of the codec that a stage has finished, if it has."""
        folder = self.work / stage / "vae"
        return folder if (folder / "config.json").is_file() else None


def _open(
    recipe: PretrainRecipe, shared: RunSettings, accelerator: Accelerator, quiet: bool, deadline: float | None
) -> _Run:
    with processes.sharing_errors():
        for stage in STAGES:
            require_same_run(Path(recipe.out) / "training" / stage / CHECKPOINTS, recipe, _FREE)
        source, held_out = (_pictures(spec, recipe, accelerator.device) for spec in (recipe.data, recipe.held_out))
        torch.manual_seed(recipe.seed)
        begin = open_start(recipe.start, recipe.network) if recipe.start else None
    return _Run(recipe, shared, accelerator, source, held_out, begin, quiet, deadline)


def open_start(name: str, network: str) -> Any:
    """Returns an object with the parts of the checkpoint `name` (a folder or shipped model), in float32. Raises
    UserError for one in another layout than that of `network`."""
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
    """The codec: given, trained now or before, or of the starting point; None where its training is not finished."""
    recipe, begin = run.recipe, run.begin
    if recipe.vae is not None:
        vae = open_vae(recipe.vae)
    elif begin is not None and not recipe.tune_codec:
        vae = begin.vae
    else:
        if run.finished_vae("codec") is None:
            with processes.sharing_errors():
                fresh = begin.vae.requires_grad_(True) if begin else new_vae(recipe)
                if recipe.vae_start is not None:
                    fresh = open_vae(recipe.vae_start)
                job = CodecJob(fresh, recipe, run.source, run.held_out)
            progress = run.train("codec", job, recipe.vae_images, recipe.vae_batch, recipe.vae_learning_rate)
            if progress.images < recipe.vae_images:
                return None
        vae = open_vae(run.work / "codec" / "vae")
    return vae.requires_grad_(False).eval().to(run.device)  # type: ignore[return-value]


def _encode(run: _Run, vae: AutoencoderKL) -> tuple[np.ndarray, list[str]]:
    """The latents and captions of all training pictures, edited ones under their instructions among them."""
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
    """The codec after its decoder has trained alone, if the recipe wants that; None where that is not finished."""
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
    """The job of stage two, with its untrained networks or those of the starting point."""
    recipe, begin = run.recipe, run.begin
    with processes.sharing_errors():
        images, held_captions = first_pictures(run.held_out, 256, recipe.size)
    with torch.no_grad():
        held: Tensor = torch.cat([codec.encode(vae, part.to(run.device)) for part in images.split(64)])
    data = (vae, recipe, latents, captions, held, held_captions)
    before = 0
    if begin is not None:
        note = Path(find_model(recipe.start or "")) / "training.json"
        before = json.loads(note.read_text())["images"] if note.is_file() else 0
    tokenizer = begin.tokenizer if begin is not None else _tokenizer(run, captions)
    if recipe.network == "flux":
        unigram = begin.tokenizer_2 if begin is not None else load_unigram(run.work / "tokenizer_2")
        names = ("transformer", "text_encoder", "text_encoder_2")
        parts = {n: getattr(begin, n) for n in names} if begin is not None else new_flux(recipe, tokenizer, unigram)
        return FluxJob(parts, tokenizer, unigram, *data, before)
    if begin is not None:
        return UNetJob(begin.unet, begin.text_encoder, tokenizer, begin.scheduler, *data, before)
    unet, encoder = new_ldm(recipe, tokenizer)
    return UNetJob(unet, encoder, tokenizer, new_scheduler(), *data, before)


def _tokenizer(run: _Run, captions: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer, and below `work` T5's, with vocabularies of the captions' words."""
    words = []
    if isinstance(run.source, SceneSource):  # whose instructions an adapter will be trained on
        words = [sample_edit(sample_scene(0, "train", i), 0, "train", i).instruction for i in range(2_000)]
    with processes.sharing_errors():
        if run.accelerator.is_main_process:
            train_tokenizer([*captions, *words], run.work / "tokenizer")
            if run.recipe.network == "flux":
                train_unigram([*captions, *words], run.work / "tokenizer_2")
    return CLIPTokenizer.from_pretrained(run.work / "tokenizer")
