"""Adapt and distil in one stage: a backbone, a task and pictures -> an adapter that samples in few steps."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch, batches
from ..data.check import contact_sheet
from ..data.sources import Sample, SceneSource, Source, open_source
from ..errors import UserError, nearest
from ..models import codec
from ..models.adapter import FORMS, FusedAdapter, load_adapter
from ..models.backbone import Backbone, load_backbone
from ..models.student import Conditioning, Student
from ..models.text import embed_prompts
from ..objectives import distances
from ..objectives.batch import LatentBatch
from ..objectives.codi import codi
from ..objectives.finetune import finetune
from ..sampling.sampler import ddim, initial_noise
from ..tasks import Task, get_task
from . import ema
from .checkpoint import Progress, edit_json, require_same_run, write_atomically
from .trainer import Job, RunSettings, make_accelerator, train

# Keys that may differ between a run and its continuation: they do not change what is computed before the next image.
_FREE = {"out", "images", "device", "log_every", "preview_every", "checkpoint_every", "keep", "half"}
OBJECTIVES: dict[str, Callable[..., dict[str, Tensor]]] = {"codi": codi, "finetune": finetune}
PREVIEW_STEPS = (1, 2, 4)
_CHOICES = {"consistency": ("noise", "signal"), "ode": ("own", "teacher"), "d_x": distances.DISTANCES}


@dataclass(kw_only=True)
class DistillRecipe(RunSettings):
    """Everything that decides a run, one key of the YAML file each; RunSettings' keys too."""

    out: str
    """Folder of the finished adapter; checkpoints, previews and logs lie in its sub-folders."""
    task: str = "upscale"
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, e.g. {scale: 4, degradation: bicubic}."""
    degradation: str | None = None
    """Short for task_options.degradation: real or bicubic."""
    model: str = "mini"
    """The backbone: mini, a diffusers folder, a .safetensors file or a hub id."""
    data: str = "scenes:train:20000"
    """Training pictures: a folder, WebDataset tars, or scenes:SPLIT:COUNT."""
    held_out: str = "scenes:held-out:64"
    """Pictures for previews and the obedience curve; never trained on."""
    size: int = 64
    """Side of training pictures in pixels."""
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops; those below it are skipped and listed in corrupt.json."""
    objective: str = "codi"
    """codi (the paper's loss) or finetune (plain conditional diffusion)."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the objective, e.g. {dt: 20, consistency: signal, d_x: pixel}."""
    adapter: str = "fused"
    """fused (CoDi's condition encoder) or controlnet."""
    start: str | None = None
    """An adapter to go on from, instead of a fresh copy of the backbone's encoder."""
    teacher: str | None = None
    """For ode: teacher: the adapter whose path makes z_s; none takes the starting point, frozen."""
    train_backbone: bool = True
    """Full CoDi. false: PE-CoDi, the adapter alone trains and the backbone stays shared between tasks."""
    prompt_dropout: float = 0.5
    """Share of prompts replaced by the empty one."""
    mu_rate: float = 30.0
    """Learning rate of the fusion weights mu, as a multiple: they start at 0 and have a long way to go."""
    half: bool = True
    """Store the finished adapter in float16."""

    def validate(self) -> None:
        """Raises UserError for values that no run can have."""
        super().validate()
        for key, known in (("objective", OBJECTIVES), ("adapter", FORMS)):
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"{key} {value!r}: not known{nearest(value, known)}: use one of {', '.join(known)}")
        if not 0 <= self.prompt_dropout <= 1:
            raise UserError(f"prompt_dropout {self.prompt_dropout}: must lie in [0, 1]: use for example 0.5")
        allowed = [
            p.name
            for p in inspect.signature(OBJECTIVES[self.objective]).parameters.values()
            if p.kind == p.KEYWORD_ONLY and p.name not in ("teacher", "t")  # not for recipes: a network, a tensor
        ]
        for key, values in _CHOICES.items():
            chosen = self.objective_options.get(key, values[0])
            if chosen not in values:
                raise UserError(
                    f"{key} {chosen!r}: not known{nearest(str(chosen), values)}: use one of {', '.join(values)}"
                )
        dt = self.objective_options.get("dt", 1)
        if not isinstance(dt, int) or dt < 1:
            raise UserError(f"dt {dt!r}: must be a whole number of noise levels from 1 up: the paper uses 1")
        for key in self.objective_options:
            if key not in allowed:
                raise UserError(
                    f"objective_options: unknown key {key!r}{nearest(key, allowed)}: known are {', '.join(allowed)}"
                )


def configure_objective(recipe: DistillRecipe, vae: Any, teacher: Student | None) -> Callable[..., dict[str, Tensor]]:
    """The objective with its options bound: names of distances and the teacher become functions."""
    options = dict(recipe.objective_options)
    name = options.pop("d_x", "latent")
    decode = functools.partial(codec.decode, vae, clamp=False)
    if name == "latent":
        distance = distances.latent
    elif name == "pixel":
        distance = distances.pixel(decode)
    elif name == "features":
        distance = distances.features(decode, lambda image: vae.encoder(image * 2 - 1))
    elif name == "perceptual":
        distance = distances.perceptual(decode, _perceptual(vae))
    else:
        known = distances.DISTANCES
        raise UserError(f"d_x {name!r}: not known{nearest(str(name), known)}: use one of {', '.join(known)}")
    if recipe.objective == "codi":
        options["d_x"] = distance
        if options.get("ode") == "teacher":
            options["teacher"] = teacher
    return functools.partial(OBJECTIVES[recipe.objective], **options)


def _perceptual(vae: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from ..evaluation.metrics import Features, enlite0_distance

    extractors: dict[Any, Features] = {}  # made where the codec is, which is not known before training starts

    def metric(a: Tensor, b: Tensor) -> Tensor:
        if vae.device not in extractors:
            extractors[vae.device] = Features(device=vae.device)
        return enlite0_distance(a.float(), b.float(), extractors[vae.device])

    return metric


class DistillJob(Job):
    """The student (online), its average (target network and result), and what turns samples into latents."""

    def __init__(
        self, recipe: DistillRecipe, backbone: Backbone, source: Source, held_out: Source, report: Path
    ) -> None:
        super().__init__()
        self.recipe, self.source, self.report = recipe, source, report
        options = dict(recipe.task_options)
        if recipe.degradation is not None:
            options["degradation"] = recipe.degradation
        self.task: Task = get_task(recipe.task, **options)
        self.vae, self.text_encoder, self.tokenizer = backbone.vae, backbone.text_encoder, backbone.tokenizer
        self.schedule, self.family = backbone.schedule, backbone.family
        cell = codec.downscale(self.vae)
        if recipe.size % cell:
            fitting = max(1, round(recipe.size / cell)) * cell
            raise UserError(f"size {recipe.size}: not a multiple of {cell}, the model's latent cell: use {fitting}")
        backbone.freeze()
        form = FORMS[recipe.adapter]
        if recipe.start:
            adapter, unet = load_adapter(recipe.start, recipe.task, backbone.family, backbone.unet)
            if not isinstance(adapter, form):
                raise UserError(f"{recipe.start}: not a {recipe.adapter} adapter: set `adapter` to its form")
        else:
            adapter = form.from_backbone(backbone.unet, backbone.vae, self.task.condition_channels)
            unet = backbone.unet
        self.own_unet = unet is not backbone.unet  # a full adapter to go on from brings its own
        student = Student(unet, adapter).requires_grad_(True)
        student.unet.requires_grad_(recipe.train_backbone)
        if recipe.gradient_checkpointing:
            student.unet.enable_gradient_checkpointing()
            (adapter.encoder if isinstance(adapter, FusedAdapter) else adapter.net).enable_gradient_checkpointing()  # type: ignore[union-attr]
        self.online: Any = student.train()
        self.average: Any = ema.average_copy(student)
        self.teacher = self._teacher(student, backbone)
        self.objective = configure_objective(recipe, backbone.vae, self.teacher)
        held = held_out.read(range(min(64, len(held_out))), recipe.size)
        samples = [s for s in held if isinstance(s, Sample)]
        if not samples:
            raise UserError(f"{recipe.held_out}: no picture could be read: check the data set")
        extras = {k: torch.stack([s.extras[k] for s in samples]) for k in samples[0].extras}
        self.held = Batch(torch.stack([s.image for s in samples]), [s.text for s in samples], extras)

    def _teacher(self, student: Student, backbone: Backbone) -> Student | None:
        if self.recipe.objective_options.get("ode") != "teacher":
            return None
        if self.recipe.teacher is None:
            return copy.deepcopy(student).requires_grad_(False).eval()
        adapter, unet = load_adapter(
            self.recipe.teacher, self.recipe.task, backbone.family, copy.deepcopy(backbone.unet)
        )
        return Student(unet, adapter).requires_grad_(False).eval()

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        mu = [p for n, p in self.online.named_parameters() if p.requires_grad and n.startswith("adapter.mu.")]
        chosen = {id(p) for p in mu}
        rest = [p for p in self.online.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [{"params": rest, "lr": learning_rate}]
        return [*groups, {"params": mu, "lr": learning_rate * self.recipe.mu_rate}] if mu else groups

    def batches(self, start: int) -> Iterator[Batch]:
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
        )

    def conditioning(self, given: Tensor, prompts: list[str]) -> Conditioning:
        """What the student may look at, from what a user brings."""
        text = embed_prompts(self.tokenizer, self.text_encoder, prompts)
        condition = self.task.condition(given).to(text.device)
        return Conditioning(text, self.online.adapter.read(condition, self.vae))

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        given = self.task.given(batch, generator)
        drop = torch.rand(len(batch.text), generator=generator) < self.recipe.prompt_dropout
        prompts = ["" if d else p for d, p in zip(drop.tolist(), batch.text, strict=True)]
        with torch.no_grad():
            image = batch.image.to(self.vae.device)
            x = codec.encode(self.vae, image, generator).float()
            conditioning = self.conditioning(given, prompts)
        return self.objective(
            self.online, self.average, LatentBatch(x, conditioning, image), self.schedule, generator=generator
        )

    @torch.no_grad()
    def preview(self, out: Path, progress: Progress) -> dict[str, float]:
        parts = [self._samples(start) for start in range(0, len(self.held.image), self.recipe.batch_size)]
        given = torch.cat([p[0] for p in parts])
        outputs = {n: torch.cat([p[1][n] for p in parts]) for n in PREVIEW_STEPS}
        columns = [self.task.condition(given)[:, :3], *outputs.values(), self.held.image]
        folder = out / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        rows = torch.stack([c[:8] for c in columns], dim=1).flatten(0, 1)
        contact_sheet(list(rows), len(columns)).save(folder / f"{progress.images:08d}.png")
        return {f"obedience_{n}": float(self.task.obedience(outputs[n], given).mean()) for n in PREVIEW_STEPS}

    def _samples(self, start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """What is given and what the average makes of it at each step count, for one batch of held-out samples."""
        part = slice(start, start + self.recipe.batch_size)
        extras = {k: v[part] for k, v in self.held.extras.items()}
        batch = Batch(self.held.image[part], self.held.text[part], extras)
        given = self.task.given(batch, torch.Generator().manual_seed(start))
        conditioning = self.conditioning(given, [t if self.task.prompted else "" for t in batch.text])
        shape = (self.vae.config["latent_channels"], *[self.recipe.size // codec.downscale(self.vae)] * 2)
        noise = initial_noise(shape, range(start, start + len(given))).to(self.vae.device)
        latents = {n: ddim(self.average, self.schedule, noise, conditioning, steps=n) for n in PREVIEW_STEPS}
        return given, {n: codec.decode(self.vae, latent).float().cpu() for n, latent in latents.items()}

    def finish(self, out: Path, progress: Progress) -> None:
        figures = self.preview(out, progress)
        recipe = {k: _public(v) for k, v in asdict(self.recipe).items() if k not in ("out", "device")}
        adapter = copy.deepcopy(self.average.adapter)
        own_unet = self.own_unet or self.recipe.train_backbone
        adapter.register_to_config(
            info={
                "task": self.task.name, "task_options": self.task.config(), "steps": list(PREVIEW_STEPS),
                "family": self.family, "full": own_unet, "images": progress.images,
                "finished": progress.images >= self.recipe.images, "seconds": round(progress.seconds),
                "recipe": recipe, "metrics": figures,
            }
        )  # fmt: skip
        save_adapter(out, adapter, self.average.unet if own_unet else None, half=self.recipe.half)


def _public(value: Any) -> Any:
    """A recipe's value as it may be shared: of a local path only the last part."""
    return Path(value).name if isinstance(value, str) and os.sep in value and Path(value).exists() else value


def save_adapter(out: Path, adapter: Any, unet: Any | None, half: bool) -> None:
    """Writes an adapter folder into `out`, which may hold other things: config.json comes last, so that a folder with
    one is whole. `unet`: the trained backbone of a full adapter, kept in `unet/`. Neither argument is changed."""

    def stored(module: Any) -> Any:
        return copy.deepcopy(module).to(torch.float16) if half else module

    def fill(folder: Path) -> None:
        stored(adapter).save_pretrained(folder, safe_serialization=True)
        if unet is not None:
            stored(unet).save_pretrained(folder / "unet", safe_serialization=True)
        for config in folder.rglob("config.json"):
            edit_json(config, _name_or_path=None)  # where it lay on this machine
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors leaves them to their owner alone

    staged = out / ".finished"
    write_atomically(staged, fill)
    for item in sorted(
        staged.rglob("*"), key=lambda p: (p.name == "config.json", len(p.parts) == len(staged.parts) + 1)
    ):
        if item.is_file():
            target = out / item.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            item.replace(target)
    for folder in sorted((p for p in staged.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    staged.rmdir()


def distill(recipe: DistillRecipe, quiet: bool = False, minutes: float | None = None) -> Path:
    """Runs or resumes `recipe`; returns its folder. `minutes` stops early, with a checkpoint, to go on later."""
    recipe.validate()
    out = Path(recipe.out)
    require_same_run(out / "checkpoints", asdict(recipe), _FREE)
    torch.manual_seed(recipe.seed)
    deadline = time.monotonic() + 60 * minutes if minutes else None
    source, held_out = open_source(recipe.data), open_source(recipe.held_out)
    if isinstance(source, SceneSource):
        source.device = str(make_accelerator(recipe).device)
    job = DistillJob(recipe, load_backbone(recipe.model), source, held_out, out / "corrupt.json")
    progress = train(job, recipe, out, asdict(recipe), quiet=quiet, deadline=deadline)
    if 0 < progress.images < recipe.images:  # stopped early: what there is by now can be used and looked at
        job.finish(out, progress)
    return out
