"""Adapt and distil in one stage: a backbone, a task and pictures -> an adapter that samples in few steps."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, batches
from ..data.check import contact_sheet
from ..data.sources import SceneSource, Source, open_source
from ..errors import UserError
from ..models import codec
from ..models.adapter import FORMS, Adapter, LoraAdapter
from ..models.adapter_files import fitting_adapter, load_adapter
from ..models.backbones import Backbone, digest, load_backbone
from ..models.lora import add_lora, lora_names
from ..models.student import Conditioning, Student
from ..models.text import Bundle
from ..objectives.batch import Guidance, LatentBatch
from ..sampling.sampler import initial_noise, sample, time_grid
from ..tasks.base import means
from . import cache, ema, processes
from .checkpoint import CHECKPOINTS, Progress, require_same_run
from .distill_recipe import SCALES, DistillRecipe, recipe_task, require_fits
from .lock import only_run
from .objective import configure_objective
from .prompt_cache import PromptCache, held_out_batch, kept_prompts
from .recipe import FORMAT, current_names
from .saving import save_adapter, shareable
from .trainer import Job, make_accelerator, train

# Keys that may differ between a run and its continuation: they do not change what is computed before the next image.
_FREE = {
    "out",
    "images",
    "device",
    "log_every",
    "preview_every",
    "checkpoint_every",
    "keep",
    "half",
    "shift",
    "max_corrupt",
    "shard",
}
_FREE |= {"guidance_scale", "image_guidance_scale", "colour"}
PREVIEW_STEPS = (1, 2, 4)


class DistillJob(Job):
    """The student (online), its average (target network and result), and what turns samples into latents."""

    def __init__(
        self,
        recipe: DistillRecipe,
        backbone: Backbone,
        source: Source,
        held_out: Source,
        report: Path,
        prompts: PromptCache | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.source, self.report = recipe, source, report
        self.task = recipe_task(recipe)
        self.vae = backbone.vae
        self.kind, self.family = backbone.kind, backbone.family
        codec.require_cells(self.vae, self.kind.patch(backbone.network.config), size=recipe.size)
        self.cells = recipe.size // codec.downscale(self.vae)
        self.schedule = backbone.schedule_for((self.cells, self.cells)).unstretched()
        self.sampling = {n: backbone.schedule_for((self.cells, self.cells), n).unstretched() for n in PREVIEW_STEPS}
        self.prompt_conditions = type(backbone.text).conditions
        backbone.freeze()
        self.trained_on = digest(backbone.network)  # now: a full adapter trains these very weights
        form = FORMS[recipe.adapter]
        if recipe.start:
            start = fitting_adapter(recipe.start, backbone.network, backbone.family, recipe.model)
            adapter, network = load_adapter(start, recipe.task, backbone.family, backbone.network, recipe.model)
            require_fits(recipe, type(adapter), adapter.config)
        else:
            inputs = (self.task.condition_channels, len(recipe.guidance), recipe.has_target_time)
            adapter = form.from_backbone(backbone.network, backbone.vae, *inputs, **recipe.form_options)
            network = backbone.network
            if recipe.lora_rank:
                network = add_lora(network, recipe.lora_rank, recipe.task, recipe.seed)
        updates = lora_names(network)
        rank = network.peft_config[updates[0]].r if updates else 0
        if rank != recipe.lora_rank:
            raise UserError(f"lora_rank {recipe.lora_rank}: {recipe.start} was trained with {rank}: set it so")
        self._require_scales(adapter, recipe.start or "the adapter")
        if recipe.has_target_time and adapter.jump is None:
            raise UserError(
                f"{recipe.start}: has no input for a target time: leave out start, or use another objective"
            )
        # A full adapter has a backbone of its own, also one to go on from.
        self.full = recipe.train_backbone or (network is not backbone.network and not updates)
        student = Student(network, adapter)
        adapter.requires_grad_(True)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name if updates else recipe.train_backbone)
        for parameter in student.parameters():
            if parameter.requires_grad:  # peft gives updates the backbone's type; Adam and the average want float32
                parameter.data = parameter.data.float()
        if recipe.gradient_checkpointing:
            for part in (network, getattr(adapter, "encoder", None), getattr(adapter, "net", None)):
                if part is not None:
                    part.enable_gradient_checkpointing()
        self.online: Any = student.train()
        self.average: Any = ema.average_copy(student)
        self.teacher = self._teacher(student, backbone)
        self.objective = configure_objective(recipe, backbone.vae, self.teacher)
        self.held = held_out_batch(recipe, held_out)
        self._take_encoders(backbone, prompts)

    def _take_encoders(self, backbone: Backbone, prompts: PromptCache | None) -> None:
        """Keep what computes text features and latents; with a cache of these, as little as is left to compute."""
        if not self.recipe.cache:
            self.encoders = nn.ModuleList(backbone.text.encoders)
            self.embed: Any = functools.partial(backbone.text.encode, warn=False)
            return
        wanted = ["", *self.task.prompts(self.held)]
        self.embed = prompts or PromptCache.of(backbone.text, wanted)
        if not self.recipe.encodes(backbone.kind.control_reads):
            codec.drop_encoder(self.vae)

    def _teacher(self, student: Student, backbone: Backbone) -> Student | None:
        if not self.recipe.taught:
            return None
        if self.recipe.objective == "codi-release":
            return Student(copy.deepcopy(backbone.network)).requires_grad_(False).eval()
        r = self.recipe
        if r.teacher is None:
            return copy.deepcopy(student).requires_grad_(False).eval()
        network = copy.deepcopy(backbone.network)
        teacher = fitting_adapter(r.teacher, network, backbone.family, r.model)
        adapter, network = load_adapter(teacher, r.task, backbone.family, network, r.model)
        self._require_scales(adapter, r.teacher)
        return Student(network, adapter).requires_grad_(False).eval()

    def _require_scales(self, adapter: Adapter, name: str) -> None:
        scales, wanted = adapter.guidance.scales if adapter.guidance is not None else 0, len(self.recipe.guidance)
        if scales != wanted and (wanted or not isinstance(adapter, LoraAdapter)):  # a LoraAdapter has an idle one
            raise UserError(f"guidance: {wanted} scales, {name} was trained with {scales}: set as many")

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What starts at zero and decides early learns faster: mu, and guidance's input, without which guided targets
        would teach the unguided answer too and then, being made of it, run away."""
        fast = ("adapter.mu.", "adapter.guidance.")
        named = [(n, p) for n, p in self.online.named_parameters() if p.requires_grad]
        slow, quick = ([p for n, p in named if n.startswith(fast) == is_fast] for is_fast in (False, True))
        groups = [{"params": slow, "lr": learning_rate}]
        return [*groups, {"params": quick, "lr": learning_rate * self.recipe.mu_rate}] if quick else groups

    def batches(self, start: int, stride: int) -> Iterator[Batch]:
        r = self.recipe
        return batches(
            self.source,
            r.batch_size,
            r.size,
            r.seed,
            start,
            report=self.report,
            max_corrupt=r.max_corrupt,
            prefetch=True,
            stride=stride,
        )

    def conditioning(self, given: Tensor, text: Bundle) -> Conditioning:
        """What the student may look at, from what a user brings and the bundle of the prompts."""
        features, added = self._conditions(text)
        condition = self.task.condition(given).to(features.device)
        return Conditioning(features, self.online.adapter.read(condition, self.vae), added=added)

    def _conditions(self, text: Bundle) -> tuple[Tensor, dict[str, Tensor] | None]:
        text = {name: value.to(self.vae.device) for name, value in text.items()}
        features, added = self.prompt_conditions(text, (self.recipe.size, self.recipe.size))
        scale = self.recipe.embedded_guidance
        return features, self.kind.with_embedded_guidance(self.online.network, added, scale, len(features))

    def guidance(self, conditioning: Conditioning, dropped: Tensor, generator: torch.Generator) -> Guidance | None:
        """Scales for this batch, drawn uniformly from their ranges, or None for a batch without guidance."""
        spans = self.recipe.guidance
        if not spans or torch.rand((), generator=generator) >= self.recipe.guidance_share:
            return None
        chosen = [name for name in SCALES if name in spans]
        low, high = (torch.tensor([float(spans[name][k]) for name in chosen]) for k in (0, 1))
        scales = low + (high - low) * torch.rand(len(dropped), len(chosen), generator=generator)
        scales[dropped, 0] = 1.0  # without a prompt there is nothing to be guided towards
        blank, added = self._conditions(self.embed([""] * len(dropped)))
        without = replace(conditioning, text=blank, added=added)
        ladder = [conditioning, without, replace(without, condition=None)]  # nothing at all: the backbone as it was
        return Guidance(scales, ladder[: len(chosen) + 1])

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        given = self.task.given(batch, generator)
        drop = torch.rand(len(batch.text), generator=generator) < self.recipe.prompt_dropout
        with torch.no_grad():
            image = self.task.truth(batch).to(self.vae.device)
            if self.recipe.cache:
                moments, text = cache.stored(batch, drop, self.embed([""]))
                moments = moments.to(image)
            else:
                moments = codec.moments(self.vae, image)
                text = self.embed(
                    ["" if d else p for d, p in zip(drop.tolist(), self.task.prompts(batch), strict=True)]
                )
            x = codec.draw(self.vae, moments, generator).float()
            conditioning = self.conditioning(given, text)
        guidance = self.guidance(conditioning, drop, generator)
        if guidance is not None:
            conditioning = replace(conditioning, guidance=guidance.scales.to(x.device))
        latents = LatentBatch(x, conditioning, image, guidance, self.progress)
        return self.objective(self.online, self.average, latents, self.schedule, generator=generator)

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        size, count = self.recipe.batch_size, len(self.held.image)
        parts = [(self.held.part(slice(k, k + size)), k) for k in range(0, count, size)]
        # A backbone in bfloat16 under an adapter in float32 needs autocast here as in training.
        half = self.recipe.backbone_precision == "bf16"
        with torch.autocast(self.vae.device.type, torch.bfloat16, enabled=half):
            made = [self._samples(part, start) for part, start in parts]
        folder = out / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        first, (given, outputs) = parts[0][0], made[0]
        columns = [self.task.condition(given)[:, :3], *outputs.values(), self.task.truth(first)]
        rows = torch.stack([c[:8] for c in columns], dim=1).flatten(0, 1)
        contact_sheet(list(rows), len(columns)).save(folder / f"{progress.images:08d}.png")
        (folder / "prompts.txt").write_text("\n".join(self.task.prompts(first)[:8]) + "\n")
        figures: dict[str, float] = {}
        measured = self.task.measured()
        for steps in PREVIEW_STEPS:
            told = [measured.obedience(o[steps], g, part) for (part, _), (g, o) in zip(parts, made, strict=True)]
            averages = means({name: torch.cat([t[name] for t in told]) for name in told[0]})
            for number, (name, value) in enumerate(averages.items()):
                figures[f"obedience_{steps}" if number == 0 else f"{name}_{steps}"] = value  # the first is the headline
        return figures

    def _samples(self, batch: Batch, start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """What is given and what the average makes of it at each step count, for one batch of held-out samples."""
        given = self.task.measured().given(batch, torch.Generator().manual_seed(start))
        conditioning = self.conditioning(given, self.embed(self.task.prompts(batch)))
        if self.recipe.guidance:
            scales = {"text": self.recipe.guidance_scale, "image": self.recipe.image_guidance_scale}
            row = torch.tensor([[scales[name] for name in SCALES if name in self.recipe.guidance]])
            conditioning.guidance = row.expand(len(given), -1).to(conditioning.text.device)
        shape = (codec.channels(self.vae), self.cells, self.cells)
        outputs = {}
        for steps in PREVIEW_STEPS:
            seeds, sampler, schedule = range(start, start + len(given)), self.recipe.sampler, self.sampling[steps]
            noise = initial_noise(shape, seeds, steps if sampler == "renoise" else 1).to(self.vae.device)
            latent = sample(
                self.average, schedule, noise, conditioning, steps, sampler=sampler, boundary=self.recipe.bounded,
                grid=time_grid(schedule.horizon, steps, self.recipe.shift, schedule.whole),
            )  # fmt: skip
            outputs[steps] = codec.decode(self.vae, latent).float().cpu()
        return given, outputs

    def finish(self, out: Path, progress: Progress) -> None:
        figures = self.preview(out, progress)
        recipe = {**shareable(self.recipe), "format": FORMAT}
        adapter = copy.deepcopy(self.average.adapter)
        names = ("guidance", "guidance_scale", "image_guidance_scale", "shift", "colour")
        defaults = {key: recipe[key] for key in names}
        if self.recipe.embedded_guidance is not None:
            defaults["embedded_guidance"] = self.recipe.embedded_guidance
        adapter.register_to_config(
            info={
                "task": self.task.name, "task_options": self.task.config(), "steps": list(PREVIEW_STEPS),
                "family": self.family, "backbone": self.trained_on, "full": self.full, **defaults,
                "sampler": self.recipe.sampler, "boundary": self.recipe.bounded,
                "images": progress.images,
                "finished": progress.images >= self.recipe.images, "seconds": round(progress.seconds),
                "recipe": recipe, "metrics": figures,
            }
        )  # fmt: skip
        save_adapter(out, adapter, self.average.network, self.full, half=self.recipe.half)


def distill(recipe: DistillRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Run or resume `recipe`; return its folder. `minutes` stops early, with a checkpoint, to go on later. Raises
    UserError for a recipe, data or a model that will not do, and where another process trains in that folder."""
    recipe.validate()
    accelerator = make_accelerator(recipe)
    with only_run(Path(recipe.out)):
        return _distill(recipe, accelerator, quiet, time.monotonic() + 60 * minutes if minutes else None)


def _distill(recipe: DistillRecipe, accelerator: Any, quiet: bool, deadline: float | None) -> Path:
    out = Path(recipe.out)
    with processes.sharing_errors():
        require_same_run(out / CHECKPOINTS, recipe, _FREE, current_names)
        torch.manual_seed(recipe.seed)
        columns = recipe_task(recipe).columns
        source, held_out = (open_source(spec, columns, zoom=recipe.zoom) for spec in (recipe.data, recipe.held_out))
        if isinstance(source, SceneSource):
            source.device = str(accelerator.device)
        prompts = kept_prompts(recipe, held_out)
        backbone = load_backbone(recipe.model, text=prompts is None, **recipe.parts)
        if recipe.cache:
            source = cache.open_cache(recipe, backbone, source)
        report = out / (f"corrupt-{rank}.json" if (rank := processes.rank()) else "corrupt.json")  # of what each reads
        job = DistillJob(recipe, backbone, source, held_out, report, prompts)
    progress = train(job, recipe, out, {**asdict(recipe), "format": FORMAT}, accelerator, quiet, deadline)
    with processes.sharing_errors():  # stopped early: what there is by now can be used and looked at
        if 0 < progress.images < recipe.images and accelerator.is_main_process:
            job.finish(out, progress)
    return out
