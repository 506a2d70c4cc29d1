"""Estimate of a distillation's memory and time from configurations only, without reading weights.

The networks are built on the "meta" device, where tensors have shapes but no values; a forward pass of the objective
there shows which tensors autograd would keep for the backward pass.
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data.sources import open_source
from ..errors import UserError, one_line
from ..models import codec
from ..models.adapter import FORMS
from ..models.adapter_files import read_config
from ..models.backbones import Backbone, family_of_index, find_model, require_buildable, revision_of
from ..models.lora import add_lora
from ..models.student import Conditioning, Student
from ..models.text import FEATURES
from ..objectives.batch import Guidance, LatentBatch
from .cache import require_cache
from .distill_recipe import DistillRecipe, recipe_task, require_fits
from .objective import configure_objective

GB = 1e9


def dry_run(recipe: DistillRecipe) -> dict[str, Any]:
    """Return the parameters, memory in GB, updates and data of a recipe.

    `memory_gb`: weights; gradients, Adam's two moments and the moving average of trained weights; activations that a
    forward pass of the objective keeps (halved under autocast, as most are in 16 bits). The largest operation's
    workspace and the allocator's overhead add about a tenth. `cache_saves_gb`: weights that need no memory with a
    `cache`. Raises UserError as the run itself would for a wrong recipe and for data, a cache or adapters that cannot
    be opened or do not fit, and for a model without configurations (a single file needs `recipe.config`).
    """
    recipe.validate()
    task = recipe_task(recipe)
    source, _ = (open_source(spec, task.columns, zoom=recipe.zoom) for spec in (recipe.data, recipe.held_out))
    if recipe.cache and Path(recipe.cache).exists():  # assume a complete cache if there is none yet
        require_cache(recipe, source)
    single = recipe.config is not None and Path(recipe.model).is_file()
    backbone = blank_backbone(recipe.config if single else recipe.model).freeze()  # type: ignore[arg-type]
    codec.require_cells(backbone.vae, backbone.kind.patch(backbone.network.config), size=recipe.size)
    if recipe.start:
        _, started, config = read_config(recipe.start, recipe.task, backbone.family, recipe.model)
        require_fits(recipe, started, config)
    if recipe.teaching and recipe.teacher:
        read_config(recipe.teacher, recipe.task, backbone.family, recipe.model)
    form: Any = FORMS[recipe.adapter]
    inputs = (task.condition_channels, len(recipe.guidance), recipe.has_target_time)
    with torch.device("meta"):
        adapter = form.from_backbone(backbone.network, backbone.vae, *inputs, **recipe.form_options)
        network = add_lora(backbone.network, recipe.lora_rank, recipe.task) if recipe.lora_rank else backbone.network
    student = Student(network, adapter).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name if recipe.lora_rank else recipe.train_backbone)
    if recipe.gradient_checkpointing:
        for part in (network, getattr(adapter, "encoder", None), getattr(adapter, "net", None)):
            if part is not None:
                part.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    unneeded = [getattr(backbone.vae, part, None) for part in ("encoder", "quant_conv")]
    cacheable = [*backbone.text.encoders, *([] if recipe.encodes(backbone.kind.control_reads) else unneeded)]
    saved = sum(p.numel() for part in cacheable if part is not None for p in part.parameters())
    frozen = sum(p.numel() for part in (student, backbone.vae, *backbone.text.encoders) for p in part.parameters())
    frozen -= trained + (saved if recipe.cache else 0)
    activations = _activation_bytes(recipe, backbone, student) * (1 if recipe.precision == "no" else 0.5)
    frozen_bytes = 2 if recipe.backbone_precision == "bf16" else 4  # per weight
    memory = {
        "weights": (4 * trained + frozen_bytes * frozen) / GB,
        # Gradient, average and two moments: 4 bytes each, or 1 per moment.
        "training": (10 if recipe.optimizer == "adamw8bit" else 16) * trained / GB,
        "activations": activations / GB,
    }
    images = recipe.batch_size * recipe.accumulate
    return {
        "model": recipe.model,
        "family": backbone.family,
        "parameters": {"trained": trained, "frozen": frozen},
        "memory_gb": {**memory, "total": sum(memory.values())},
        "cache_saves_gb": 0.0 if recipe.cache else frozen_bytes * saved / GB,
        "updates": -(-recipe.images // images),
        "images_an_update": images,
        "passes": recipe.passes * recipe.images,
        "data": {"source": recipe.data, "pictures": len(source), "epochs": recipe.images / len(source)},
    }


def blank_backbone(model: str | Path) -> Backbone:
    """Build the parts of a diffusers folder or hub id on the meta device from their configurations, without tokenizers.
    Raises UserError if there are none."""
    source, options = revision_of(find_model(model))
    try:
        index: Any = DiffusionPipeline.load_config(source, **options)
        kind = family_of_index(index, str(model))
        parts: dict[str, Any] = {}
        names = {field.name for field in fields(Backbone)} & set(index)
        for name in sorted(names - {"tokenizer", "tokenizer_2", "tokenizer_3"}):
            if not isinstance(index[name], list):
                parts[name] = index[name]
            elif index[name][0] is not None:
                library, component = index[name]
                parts[name] = _blank(library, component, source, name, options)
    except UserError:
        raise
    except Exception as error:  # diffusers and transformers raise many kinds
        raise UserError(f"{model}: its configurations could not be read ({one_line(error)}): a dry run needs a "
                        "diffusers folder or hub id, or `config` for a single file") from error  # fmt: skip
    kind.require_scheduler(parts["scheduler"], str(model))
    return Backbone(**kind.prepare_parts(parts))


def _blank(library: str, component: str, source: str, name: str, options: dict[str, Any]) -> Any:
    """Build one part of a pipeline from its configuration."""
    require_buildable(Path(source) / name)
    cls = getattr(importlib.import_module(library), component)
    if name == "scheduler":  # whose tables need real values
        return cls.from_config(cls.load_config(source, subfolder=name, **options))
    with torch.device("meta"):
        if library == "transformers":
            return cls(cls.config_class.from_pretrained(source, subfolder=name, **options))
        return cls.from_config(cls.load_config(source, subfolder=name, **options))


def _activation_bytes(recipe: DistillRecipe, backbone: Backbone, student: Student) -> int:
    """Return the bytes that autograd keeps for the backward pass of the objective, without the parameters."""
    cells = recipe.size // codec.downscale(backbone.vae)
    count, channels = recipe.batch_size, codec.channels(backbone.vae)
    picture = torch.zeros(count, recipe_task(recipe).condition_channels, recipe.size, recipe.size, device="meta")
    shapes = backbone.kind.condition_shapes(backbone.network.config)
    added = {name: torch.zeros(count, *shape, device="meta") for name, shape in shapes.items()}
    text = added.pop(FEATURES)
    condition = student.adapter.read(picture, backbone.vae)  # type: ignore[union-attr]
    conditioning = Conditioning(text, condition, added=added or None)
    guidance = None
    if recipe.guidance and recipe.guidance_share:
        scales = torch.ones(count, len(recipe.guidance))
        guidance = Guidance(scales, [conditioning] * (len(recipe.guidance) + 1))
    x = torch.zeros(count, channels, cells, cells, device="meta")
    objective = configure_objective(recipe, backbone.vae, _without_gradient if recipe.teaching else None)
    parameters = {id(p) for p in student.parameters()}
    sizes: dict[int, int] = {}  # bytes by storage
    alive: list[Tensor] = []  # so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters and tensor.device.type == "meta":
            storage = tensor.untyped_storage()
            if storage._cdata not in sizes:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(
            student,
            _without_gradient,
            LatentBatch(x, conditioning, picture[:, :3], guidance),
            backbone.schedule_for((cells, cells)),
        )
    return sum(sizes.values())


def _without_gradient(z: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
    """Return zeros in place of a network that runs without gradient, for which autograd keeps nothing."""
    return torch.zeros_like(z)
