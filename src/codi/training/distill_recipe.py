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
    """All settings of a distillation; each field, with those of RunSettings, is a key of the YAML file."""

    out: str
    """Output folder of the finished adapter, with checkpoints, previews and logs in subfolders."""
    task: str = "upscale"
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, e.g. {scale: 4, degradation: bicubic}."""
    degradation: str | None = None
    """Shorthand for task_options.degradation: real or bicubic."""
    model: str = "mini"
    """The backbone: mini, a diffusers folder, a .safetensors file or a hub id (ID@REVISION)."""
    config: str | None = None
    """For a model in a single file: a folder or hub id with its configs and tokenizers. None: downloaded."""
    loras: dict[str, float] = field(default_factory=dict)
    """LoRA files to fuse into the backbone before training, with their weights, e.g. {style.safetensors: 0.8}. Users of
    the adapter need to load the same ones, unless it includes its backbone (train_backbone)."""
    data: str = "scenes:train:20000"
    """Training images: a folder, WebDataset tars (a glob, or paths or URLs with braces, https://host/{000..999}.tar),
    datasets:NAME, or scenes:SPLIT:COUNT."""
    cache: str | None = None
    """A folder written by `codi data cache` for this recipe, with latents and text features. Training then needs no
    text encoder and, unless the adapter reads latents, no VAE encoder. Each image has the cached crops (`--variants` of
    them) instead of a new crop every time. Depth, canny and inpaint can share a cache."""
    held_out: str = "scenes:held-out:64"
    """Images for previews and their scores; never trained on."""
    size: int = 64
    """Side length of training images in pixels."""
    zoom: tuple = ZOOM
    """Range for random crops: the image's shorter side is first scaled to this many times `size`, but never enlarged.
    [1, 2] keeps most of each image; high values, such as [4, 8], crop details at the file's resolution, which suits
    upscaling."""
    max_corrupt: float = 0.05
    """Largest share of unreadable files before the run stops; fewer are skipped and listed in corrupt.json."""
    objective: str = "codi-tuned"
    """codi-tuned (the paper's loss, adjusted for short trainings), codi (the paper's algorithm), codi-release (that of
    the authors' code), flow-map (ours, with a target time: steps of any length), decoupled (two target times), finetune
    (plain conditional diffusion); with a frozen teacher: guided (progressive distillation) and consistency (consistency
    distillation)."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, e.g. {dt: 20, consistency: signal, d_x: pixel}."""
    adapter: str = "fused"
    """fused (CoDi's condition encoder), controlnet, hint (small: a few convolutions; needs lora_rank or
    train_backbone), or lora (no condition: plain acceleration)."""
    reads: str = "latent"
    """Input of a fused adapter: the condition's latent by the VAE, or its pixels by a few convolutions: faster, and
    sufficient for depth or edge maps."""
    depth: int | None = None
    """Number of encoder blocks of a fused adapter on a transformer. None: half of the network's."""
    embedded_guidance: float | None = None
    """For backbones with a guidance scale as an input (FLUX.1-dev): its value in training, stored with the adapter.
    None: the family's default."""
    backbone_precision: str = "no"
    """bf16: keep the frozen backbone (train_backbone: false) in bfloat16, with half the memory; trained weights stay in
    float32. Needs precision: bf16."""
    start: str | None = None
    """An adapter whose weights training starts from, instead of a copy of the backbone's encoder."""
    teacher: str | None = None
    """The teacher adapter of guided, consistency and ode: teacher. None: the starting point."""
    train_backbone: bool = True
    """true: full CoDi. false: PE-CoDi, which trains only the adapter; tasks can share the backbone."""
    lora_rank: int = 0
    """With train_backbone: false, the rank of a LoRA of the backbone that is part of the adapter; 0: none."""
    guidance: dict[str, list[float]] = field(default_factory=dict)
    """Ranges of guidance scales to distil, e.g. {text: [1, 4]} or {text: [1, 4], image: [1, 2]}, for guided sampling
    with one forward pass per step. Empty: none; guidance at inference costs a second pass."""
    guidance_share: float = 0.5
    """Share of the updates that distil guidance; each costs one forward pass per scale plus one."""
    guidance_scale: float = 1.0
    """Default text guidance scale of the adapter, also used for previews."""
    image_guidance_scale: float = 1.0
    """Default image guidance scale of the adapter, also used for previews."""
    shift: float = 1.0
    """Time grid of the sampler, stored with the adapter: above 1 places more steps at high noise, below 1 at low noise,
    which suits networks that predict the end of the ODE."""
    colour: str = "wavelet"
    """For upscaling, the adapter's default color correction towards the input (see sampling.colour); use
    back-projection for small but clean inputs."""
    prompt_dropout: float = 0.5
    """Probability of replacing a prompt by the empty one."""
    mu_rate: float = 30.0
    """Learning rate of the fusion weights mu and the guidance input, as a multiple of learning_rate: they start at 0
    and have far to go."""
    half: bool = True
    """Store the finished adapter in float16."""

    @property
    def parts(self) -> dict[str, Any]:
        """Keyword arguments of load_backbone."""
        dtype = torch.bfloat16 if self.backbone_precision == "bf16" else torch.float32
        return {"dtype": dtype, "loras": self.loras, **({"config": self.config} if self.config else {})}

    @property
    def form_options(self) -> dict[str, Any]:
        """Further arguments of a new adapter of this form."""
        return {"reads": self.reads, "depth": self.depth} if self.adapter == "fused" else {}

    @property
    def sampler(self) -> str:
        """The sampler that the adapter is trained for, one of sampling.sampler.SAMPLERS."""
        return OBJECTIVES[self.objective].sampler

    @property
    def has_target_time(self) -> bool:
        """True if the network gets a target time as an input."""
        return OBJECTIVES[self.objective].target_time

    @property
    def bounded(self) -> bool:
        """True if training and sampling use CoDi's boundary scaling of the network's signal."""
        return bool(self.objective_options.get("boundary"))

    @property
    def teaching(self) -> str:
        """The frozen network that the loss needs: "adapter", "backbone" or "" for none; see Objective.teacher."""
        return OBJECTIVES[self.objective].teacher_for(self.objective_options)

    def encodes(self, control_reads: str) -> bool:
        """Return True if training needs the VAE's encoder for more than the latents of the targets. `control_reads`:
        see Family.control_reads."""
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
        """Raise UserError for invalid values."""
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
            raise UserError("guidance: image: adapter lora has no image condition: leave it out")
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
    """Return the recipe's task with its options. Raises UserError for an unknown task or option."""
    options = dict(recipe.task_options)
    if recipe.degradation is not None:
        options["degradation"] = recipe.degradation
    return get_task(recipe.task, **options)


def require_fits(recipe: DistillRecipe, form: type, config: Mapping[str, Any]) -> None:
    """Raise UserError unless `recipe.start`, of this form and configuration, fits the recipe."""
    if form is not FORMS[recipe.adapter]:
        raise UserError(f"{recipe.start}: not a {recipe.adapter} adapter: set `adapter` to its form")
    if config.get("reads", recipe.reads) != recipe.reads:
        raise UserError(f"reads {recipe.reads}: {recipe.start} was made to read otherwise: set it so")
