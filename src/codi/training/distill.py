"""Adaptation and distillation in one stage: trains an adapter of a backbone for a task, sampled in few steps."""

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
from .prompt_cache import PromptCache, cached_prompts, held_out_batch
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
    """Training of a student (`online`) and its average (the target network and result), with the VAE and text encoders
    that turn samples into latents and features."""

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
        self.trained_on = digest(backbone.network)  # before training, which changes these weights in a full adapter
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
            raise UserError(f"lora_rank {recipe.lora_rank}: {recipe.start} was trained with {rank}: set it to {rank}")
        self._require_scales(adapter, recipe.start or "the adapter")
        if recipe.has_target_time and adapter.jump is None:
            raise UserError(
                f"{recipe.start}: has no input for a target time: leave out start, or use another objective"
            )
        # A full adapter has its own backbone, also one that `start` names.
        self.full = recipe.train_backbone or (network is not backbone.network and not updates)
        student = Student(network, adapter)
        adapter.requires_grad_(True)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name if updates else recipe.train_backbone)
        for parameter in student.parameters():
            if parameter.requires_grad:  # peft uses the backbone's dtype; Adam and the average need float32
                parameter.data = parameter.data.float()
        if recipe.gradient_checkpointing:
            for part in (network, getattr(adapter, "encoder", None), getattr(adapter, "net", None)):
                if part is not None:
                    part.enable_gradient_checkpointing()
        self.online: Any = student.train()
        self.average: Any = ema.average_copy(student)
        self.teacher = self._teacher(student, backbone)
        self.objective = configure_objective(recipe, backbone.vae, self.teacher)
        self.held_samples = held_out_batch(recipe, held_out)
        self._set_encoders(backbone, prompts)

    def _set_encoders(self, backbone: Backbone, prompts: PromptCache | None) -> None:
        """Keep the text encoders, or with a cache the features of a few prompts; drop the VAE's encoder if unused."""
        if not self.recipe.cache:
            self.encoders = nn.ModuleList(backbone.text.encoders)
            self.embed: Any = functools.partial(backbone.text.encode, warn=False)
            return
        self.embed = prompts or PromptCache.of(backbone.text, ["", *self.task.prompts(self.held_samples)])
        if not self.recipe.encodes(backbone.kind.control_reads):
            codec.drop_encoder(self.vae)

    def _teacher(self, student: Student, backbone: Backbone) -> Student | None:
        if not self.recipe.teaching:
            return None
        if self.recipe.teaching == "backbone":
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
        trained, scales = adapter.guidance.scales if adapter.guidance is not None else 0, len(self.recipe.guidance)
        if trained != scales and (scales or not isinstance(adapter, LoraAdapter)):  # whose input may stay unused
            raise UserError(f"guidance: {scales} scales, but {name} was trained with {trained}: set {trained}")

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return parameter groups with a higher learning rate (times `mu_rate`) for mu and the guidance input, which
        start at zero. If the guidance input learned slowly, guided targets would shift the unguided output too; as
        targets are computed from it, they would diverge."""
        prefixes = ("adapter.mu.", "adapter.guidance.")
        named = [(n, p) for n, p in self.online.named_parameters() if p.requires_grad]
        slow, quick = ([p for n, p in named if n.startswith(prefixes) == fast] for fast in (False, True))
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

    def conditioning(self, task_input: Tensor, text: Bundle) -> Conditioning:
        """Return the student's conditioning on the task's input and the bundle of the prompts."""
        features, added = self._conditions(text)
        condition = self.task.condition(task_input).to(features.device)
        return Conditioning(features, self.online.adapter.read(condition, self.vae), added=added)

    def _conditions(self, text: Bundle) -> tuple[Tensor, dict[str, Tensor] | None]:
        text = {name: value.to(self.vae.device) for name, value in text.items()}
        features, added = self.prompt_conditions(text, (self.recipe.size, self.recipe.size))
        scale = self.recipe.embedded_guidance
        return features, self.kind.with_embedded_guidance(self.online.network, added, scale, len(features))

    def guidance(self, conditioning: Conditioning, dropped: Tensor, generator: torch.Generator) -> Guidance | None:
        """Return scales for this batch, drawn uniformly from their ranges, or None for a batch without guidance."""
        ranges = self.recipe.guidance
        if not ranges or torch.rand((), generator=generator) >= self.recipe.guidance_share:
            return None
        names = [name for name in SCALES if name in ranges]
        low, high = (torch.tensor([float(ranges[name][k]) for name in names]) for k in (0, 1))
        scales = low + (high - low) * torch.rand(len(dropped), len(names), generator=generator)
        scales[dropped, 0] = 1.0  # an empty prompt has nothing to guide towards
        blank, added = self._conditions(self.embed([""] * len(dropped)))
        without = replace(conditioning, text=blank, added=added)
        ladder = [conditioning, without, replace(without, condition=None)]  # the last one: the plain backbone
        return Guidance(scales, ladder[: len(names) + 1])

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        task_input = self.task.given(batch, generator)
        drop = torch.rand(len(batch.text), generator=generator) < self.recipe.prompt_dropout
        with torch.no_grad():
            image = self.task.truth(batch).to(self.vae.device)
            if self.recipe.cache:
                moments, text = cache.cached_inputs(batch, drop, self.embed([""]))
                moments = moments.to(image)
            else:
                moments = codec.moments(self.vae, image)
                text = self.embed(
                    ["" if d else p for d, p in zip(drop.tolist(), self.task.prompts(batch), strict=True)]
                )
            x = codec.draw(self.vae, moments, generator).float()
            conditioning = self.conditioning(task_input, text)
        guidance = self.guidance(conditioning, drop, generator)
        if guidance is not None:
            conditioning = replace(conditioning, guidance=guidance.scales.to(x.device))
        latents = LatentBatch(x, conditioning, image, guidance, self.progress)
        return self.objective(self.online, self.average, latents, self.schedule, generator=generator)

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        size, count = self.recipe.batch_size, len(self.held_samples.image)
        parts = [(self.held_samples.part(slice(k, k + size)), k) for k in range(0, count, size)]
        # A backbone in bfloat16 under an adapter in float32 needs autocast here as in training.
        half = self.recipe.backbone_precision == "bf16"
        with torch.autocast(self.vae.device.type, torch.bfloat16, enabled=half):
            results = [self._samples(part, start) for part, start in parts]
        folder = out / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        first, (task_input, outputs) = parts[0][0], results[0]
        columns = [self.task.condition(task_input)[:, :3], *outputs.values(), self.task.truth(first)]
        rows = torch.stack([c[:8] for c in columns], dim=1).flatten(0, 1)
        contact_sheet(list(rows), len(columns)).save(folder / f"{progress.images:08d}.png")
        (folder / "prompts.txt").write_text("\n".join(self.task.prompts(first)[:8]) + "\n")
        figures: dict[str, float] = {}
        measured = self.task.measured()
        for steps in PREVIEW_STEPS:
            scores = [measured.obedience(o[steps], i, part) for (part, _), (i, o) in zip(parts, results, strict=True)]
            averages = means({name: torch.cat([s[name] for s in scores]) for name in scores[0]})
            for number, (name, value) in enumerate(averages.items()):
                figures[f"obedience_{steps}" if number == 0 else f"{name}_{steps}"] = value  # the first is the headline
        return figures

    def _samples(self, batch: Batch, start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the task's input and the average's output at each step count, for a batch of held-out samples."""
        task_input = self.task.measured().given(batch, torch.Generator().manual_seed(start))
        conditioning = self.conditioning(task_input, self.embed(self.task.prompts(batch)))
        if self.recipe.guidance:
            scales = {"text": self.recipe.guidance_scale, "image": self.recipe.image_guidance_scale}
            row = torch.tensor([[scales[name] for name in SCALES if name in self.recipe.guidance]])
            conditioning.guidance = row.expand(len(task_input), -1).to(conditioning.text.device)
        shape = (codec.channels(self.vae), self.cells, self.cells)
        outputs = {}
        for steps in PREVIEW_STEPS:
            seeds, sampler, schedule = range(start, start + len(task_input)), self.recipe.sampler, self.sampling[steps]
            noise = initial_noise(shape, seeds, steps if sampler == "renoise" else 1).to(self.vae.device)
            latent = sample(
                self.average, schedule, noise, conditioning, steps, sampler=sampler, boundary=self.recipe.bounded,
                grid=time_grid(schedule.horizon, steps, self.recipe.shift, schedule.whole),
            )  # fmt: skip
            outputs[steps] = codec.decode(self.vae, latent).float().cpu()
        return task_input, outputs

    def finish(self, out: Path, progress: Progress) -> None:
        figures = self.preview(out, progress)
        recipe = {**shareable(self.recipe), "format": FORMAT}
        adapter = copy.deepcopy(self.average.adapter)
        keys = ("guidance", "guidance_scale", "image_guidance_scale", "shift", "colour")
        defaults = {key: recipe[key] for key in keys}
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
    """Run or resume `recipe`; return its folder. After `minutes` the run stops with a checkpoint, to go on later.
    Raises UserError for an unusable recipe, data or model, and if another process trains in that folder."""
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
        prompts = cached_prompts(recipe, held_out)
        backbone = load_backbone(recipe.model, text=prompts is None, **recipe.parts)
        if recipe.cache:
            source = cache.open_cache(recipe, backbone, source)
        report = out / (f"corrupt-{rank}.json" if (rank := processes.rank()) else "corrupt.json")  # one per process
        job = DistillJob(recipe, backbone, source, held_out, report, prompts)
    progress = train(job, recipe, out, {**asdict(recipe), "format": FORMAT}, accelerator, quiet, deadline)
    with processes.sharing_errors():  # stopped early: write the model as it is by now
        if 0 < progress.images < recipe.images and accelerator.is_main_process:
            job.finish(out, progress)
    return out
