"""The recipe of a distillation: one dataclass, whose fields are the keys of the YAML file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.crops import ZOOM
from ..errors import UserError, nearest
from ..models.adapter import FORMS, READS
from ..objectives import OBJECTIVES
from ..sampling.colour import METHODS
from ..tasks import Task, get_task
from .objective import require_options
from .trainer import RunSettings

SCALES = ("text", "image")  # of distilled guidance, in the order of the network's input


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
    """The backbone: mini, a diffusers folder, a .safetensors file or a hub id (ID@REVISION)."""
    config: str | None = None
    """Of a model that is a single file: a folder or hub id whose configs and tokenizers are its own. None: fetched."""
    loras: dict[str, float] = field(default_factory=dict)
    """LoRA files made part of the backbone before training, each with its weight, e.g. {style.safetensors: 0.8}. Users
    of the adapter name the same ones, unless it brings its own backbone (train_backbone)."""
    data: str = "scenes:train:20000"
    """Training pictures: a folder, WebDataset tars (a glob, or paths or URLs with braces, https://host/{000..999}.tar),
    datasets:NAME, or scenes:SPLIT:COUNT."""
    cache: str | None = None
    """A folder that `codi data cache` made of this recipe: latents and text features are read from it, so that neither
    the text encoders nor, unless the adapter reads latents, the VAE's encoder take memory or time. A picture then has
    the crops that were cached, `--variants` of them, instead of a new one every time. Depth, canny and inpaint can
    share one."""
    held_out: str = "scenes:held-out:64"
    """Pictures for previews and the obedience curve; never trained on."""
    size: int = 64
    """Side of training pictures in pixels."""
    zoom: tuple = ZOOM
    """Of random crops from files: their picture's shorter side is scaled to between so many times `size`, never
    enlarged. [1, 2] shows most of each picture; high values, such as [4, 8], cut details at the file's own pixels,
    which upscaling is about."""
    max_corrupt: float = 0.05
    """Share of unreadable files above which the run stops; those below it are skipped and listed in corrupt.json."""
    objective: str = "codi-tuned"
    """flow-map (ours: steps of any length), codi (the paper's algorithm), codi-release (that of its authors' code),
    codi-tuned (the paper's loss, for short training), decoupled, finetune (plain conditional diffusion), or of a frozen
    teacher: guided (progressive distillation), consistency (consistency distillation)."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the objective, e.g. {dt: 20, consistency: signal, d_x: pixel}."""
    adapter: str = "fused"
    """fused (CoDi's condition encoder), controlnet, hint (lean: a few convolutions; wants lora_rank or a backbone that
    trains), or lora (no condition: plain acceleration)."""
    reads: str = "latent"
    """What a fused adapter sees of the condition: its latent, by the VAE, or its pixels, by convolutions of its own:
    faster, and enough for maps of depth or edges."""
    depth: int | None = None
    """Blocks of a fused adapter's encoder on a transformer. None: half of the network's."""
    embedded_guidance: float | None = None
    """Of backbones that take a guidance scale as an input (FLUX.1-dev): its value in training, kept as the adapter's
    own. None: the family's default."""
    backbone_precision: str = "no"
    """bf16: the frozen backbone (train_backbone: false) is kept in bfloat16, at half the memory; what trains stays in
    float32. Wants precision: bf16."""
    start: str | None = None
    """An adapter to go on from, instead of a fresh copy of the backbone's encoder."""
    teacher: str | None = None
    """For guided, consistency and ode: teacher: the adapter whose path is followed; none takes the starting point."""
    train_backbone: bool = True
    """Full CoDi. false: PE-CoDi, the adapter alone trains and the backbone stays shared between tasks."""
    lora_rank: int = 0
    """With train_backbone: false, low-rank updates of the shared backbone as part of the adapter; 0: none."""
    guidance: dict[str, list[float]] = field(default_factory=dict)
    """Ranges of guidance scales to distil in, e.g. {text: [1, 4]} or {text: [1, 4], image: [1, 2]}: guided pictures at
    one forward pass a step. Empty: none, and guidance at inference costs a second pass."""
    guidance_share: float = 0.5
    """Share of the updates that train with guidance; each costs one more forward pass a scale, and one more."""
    guidance_scale: float = 1.0
    """The default for users of the adapter, and what previews are made with."""
    image_guidance_scale: float = 1.0
    """The same for guidance by the picture."""
    shift: float = 1.0
    """Time grid of the sampler, kept with the adapter: above 1, more steps lie where noise is high, below 1 where it
    is low, which suits those that predict the end of the ODE."""
    colour: str = "wavelet"
    """Of upscaling, the default for users of the adapter: how results are corrected to their inputs (see
    sampling.colour); back-projection where these are small but clean."""
    prompt_dropout: float = 0.5
    """Share of prompts replaced by the empty one."""
    mu_rate: float = 30.0
    """Learning rate of the fusion weights mu and of the guidance input, as a multiple: they start at 0 and have a long
    way to go."""
    half: bool = True
    """Store the finished adapter in float16."""

    @property
    def parts(self) -> dict[str, Any]:
        """Keyword arguments of load_backbone."""
        dtype = torch.bfloat16 if self.backbone_precision == "bf16" else torch.float32
        return {"dtype": dtype, "loras": self.loras, **({"config": self.config} if self.config else {})}

    @property
    def form_options(self) -> dict[str, Any]:
        """What a new adapter of this form takes beside its inputs."""
        return {"reads": self.reads, "depth": self.depth} if self.adapter == "fused" else {}

    @property
    def sampler(self) -> str:
        """The sampler that the adapter is trained for, one of sampling.sampler.SAMPLERS."""
        return OBJECTIVES[self.objective].sampler

    @property
    def has_target_time(self) -> bool:
        """Whether the network gets a target time as an input."""
        return OBJECTIVES[self.objective].target_time

    @property
    def bounded(self) -> bool:
        """Whether the network's signal is scaled as CoDi's boundary scaling does, in training and sampling."""
        return bool(self.objective_options.get("boundary"))

    @property
    def teaching(self) -> str:
        """The frozen network that the loss needs: "adapter", "backbone" or "" for none; see Objective.teacher."""
        return OBJECTIVES[self.objective].teacher_for(self.objective_options)

    def encodes(self, control_reads: str) -> bool:
        """Whether training needs the VAE's encoder for more than the latents of the true pictures. `control_reads`: see
        Family.control_reads."""
        reads = {"fused": self.reads, "hint": "latent", "controlnet": control_reads}.get(self.adapter)
        reads_latents = reads == "latent"
        return reads_latents or self.objective_options.get("d_x") == "features"

    @property
    def passes(self) -> float:
        """Forward passes of the network that an image costs on average, a backward pass counted as two."""
        objective = OBJECTIVES[self.objective]
        return objective.cost(self.objective_options, len(self.guidance), self.guidance_share)

    def __post_init__(self) -> None:
        if self.objective == "paper":
            warnings.warn("objective paper: is called codi now, and what was codi is codi-tuned", stacklevel=2)
            self.objective = "codi"

    def validate(self) -> None:
        """Raises UserError for values that no run can have."""
        super().validate()
        for key, known in (("objective", OBJECTIVES), ("adapter", FORMS), ("reads", READS), ("colour", METHODS)):
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"{key} {value!r}: not known{nearest(value, known)}: use one of {', '.join(known)}")
        for key in ("prompt_dropout", "guidance_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key} {getattr(self, key)}: must lie in [0, 1]: use for example 0.5")
        self._within(0, 1, "max_corrupt")
        self._within(0, 1e6, "mu_rate")
        self._at_least_1("size", *(["depth"] if self.depth is not None else []))
        numbers = [z for z in self.zoom if isinstance(z, int | float)]
        if len(self.zoom) != 2 or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] < math.inf:
            raise UserError(f"zoom {list(self.zoom)}: not a range from 1 up: use for example [1, 2] or [4, 8]")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift {self.shift}: must be above 0: 1 spaces the steps evenly, 3 favours noise")
        if self.lora_rank < 0 or (self.lora_rank and self.train_backbone):
            raise UserError(
                f"lora_rank {self.lora_rank}: needs a rank from 1 up and a frozen backbone: set train_backbone: false"
            )
        if self.backbone_precision not in ("no", "bf16"):
            raise UserError(f"backbone_precision {self.backbone_precision!r}: not known: use one of no, bf16")
        if self.backbone_precision == "bf16" and (self.train_backbone or self.precision != "bf16"):
            raise UserError("backbone_precision 'bf16': is for a frozen backbone under autocast: set train_backbone: "
                            "false and precision: bf16")  # fmt: skip
        if self.adapter == "lora" and self.task != "generate":
            raise UserError(
                f"adapter 'lora': sees no condition, and {self.task} has one: use fused, controlnet or hint"
            )
        if self.reads == "pixels" and self.adapter != "fused":
            raise UserError(f"reads 'pixels': is for adapter fused, {self.adapter} reads in its own way: leave it out")
        if self.adapter == "lora" and not (self.lora_rank or self.train_backbone):
            raise UserError("lora_rank 0: nothing to train with a frozen backbone: set for example lora_rank: 16")
        self._validate_guidance()
        require_options(self.objective, self.objective_options)

    def _validate_guidance(self) -> None:
        if unknown := set(self.guidance) - set(SCALES):
            raise UserError(f"guidance: unknown scale {sorted(unknown)[0]!r}: known are {', '.join(SCALES)}")
        if "image" in self.guidance and self.adapter == "lora":
            raise UserError("guidance: image: there is none to keep to: leave it out")
        if "image" in self.guidance and self.train_backbone:
            raise UserError("guidance: image: is measured from the backbone without a picture, which must stay as it "
                            "was: set train_backbone: false")  # fmt: skip
        options = self.objective_options
        if self.guidance and (options.get("d_x", "latent") != "latent" or options.get("boundary")):
            raise UserError("guidance: is distilled in latents, without boundary scaling: leave d_x and boundary out")
        if self.guidance and options.get("signal_weight") == 0:
            raise UserError("guidance: is trained by the signal term: give it some signal_weight")
        if "image" in self.guidance and "text" not in self.guidance:
            raise UserError("guidance: image alone: give a range for text too, for example text: [1, 1]")
        for name, span in self.guidance.items():
            two = isinstance(span, (list, tuple)) and [isinstance(v, (int, float)) for v in span] == [True, True]
            if not two or not 0 < span[0] <= span[1] < float("inf"):
                raise UserError(f"guidance: {name} {span}: must be [least, most] above 0: use for example [1, 4]")
        for key, name in (("guidance_scale", "text"), ("image_guidance_scale", "image")):
            value = getattr(self, key)
            low, high = self.guidance.get(name, [1, 1] if name == "image" else [0, float("inf")])
            if not low <= value <= high:
                raise UserError(
                    f"{key} {value:g}: not within the range that is trained, {low:g} to {high:g}: change one"
                )


def recipe_task(recipe: DistillRecipe) -> Task:
    """The task with the recipe's options. Raises UserError for an unknown task or option."""
    options = dict(recipe.task_options)
    if recipe.degradation is not None:
        options["degradation"] = recipe.degradation
    return get_task(recipe.task, **options)


def require_fits(recipe: DistillRecipe, form: type, config: Mapping[str, Any]) -> None:
    """Raises UserError unless `recipe.start`, of that form and configuration, is an adapter as the recipe's."""
    if form is not FORMS[recipe.adapter]:
        raise UserError(f"{recipe.start}: not a {recipe.adapter} adapter: set `adapter` to its form")
    if config.get("reads", recipe.reads) != recipe.reads:
        raise UserError(f"reads {recipe.reads}: {recipe.start} was made to read otherwise: set it so")
