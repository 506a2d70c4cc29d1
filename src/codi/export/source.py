"""What is exported: an adapter on its backbone, taken apart into what other programs know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict
from torch import Tensor

from ..errors import UserError
from ..models.adapter import Adapter, ControlNetAdapter, FusedAdapter, HintAdapter
from ..models.backbones import Backbone, load_backbone
from ..models.lora import lora_names, shared_copy
from ..sampling.guidance import Guidance, resolve
from ..sampling.sampler import time_grid
from ..sampling.shelf import Shelf, Shelved
from ..tasks import Task

TIME = "time_embedding.linear_1"  # the layer that the time features enter


@dataclass(frozen=True)
class Source:
    """An adapter, `name` as the user gave it, and its backbone, `model` as the user gave it."""

    name: str
    model: str
    backbone: Backbone
    shelved: Shelved

    @property
    def adapter(self) -> Adapter:
        return self.shelved.adapter

    @property
    def info(self) -> dict[str, Any]:
        return self.shelved.info

    @property
    def task(self) -> Task:
        return self.shelved.task

    @property
    def control(self) -> ControlNetAdapter | None:
        """The adapter, if it is of ControlNet form."""
        return self.adapter if isinstance(self.adapter, ControlNetAdapter) else None

    @property
    def jumps(self) -> bool:
        """Whether it is sampled by jumps, with fresh noise at each step."""
        return bool(self.info.get("jumps"))

    @property
    def shift(self) -> float:
        """Of its time grid."""
        return self.info.get("shift") or 1.0

    @cached_property
    def guidance(self) -> Guidance:
        """The adapter's own."""
        return resolve(None, None, [self.info])

    def timesteps(self, steps: int) -> list[int]:
        """What the network is told at each step, in the checkpoint's own numbering."""
        schedule = self.backbone.schedule
        return schedule.timestep(time_grid(schedule.horizon, steps, self.shift)[:-1]).tolist()

    def told(self) -> Tensor | None:
        """What the adapter adds to the time features (W,) at its own guidance, with a prompt; None: nothing."""
        columns, jump = self.guidance.columns(["a prompt"]), torch.ones(1) if self.jumps else None
        with torch.no_grad():
            told = self.adapter.time_condition(columns, jump)
        return told[0] if told is not None and bool(told.any()) else None

    def full_unet(self) -> UNet2DConditionModel | None:
        """The U-Net that a full adapter brings, with what the adapter tells it in the bias of a layer: W (x + c) + b =
        W x + (b + W c). None for other adapters."""
        if not self.shelved.full:
            return None
        unet, told = shared_copy(self.shelved.network), self.told()
        if told is not None:
            layer: Any = unet.get_submodule(TIME)
            layer.bias = torch.nn.Parameter(layer.bias + layer.weight @ told, requires_grad=False)
        return unet

    def lora(self) -> dict[str, Tensor]:
        """The low-rank updates (B A, unscaled) that were trained: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
        unet, weights = self.shelved.network, {}
        for name in lora_names(unet):
            config: Any = unet.peft_config[name]  # type: ignore[index]
            for key, value in get_peft_model_state_dict(unet, adapter_name=name).items():
                weights[key] = value * (config.lora_alpha / config.r) if ".lora_B." in key else value
        return weights

    def merged_unet(self) -> UNet2DConditionModel:
        """The U-Net that works with the adapter, its low-rank updates added to the weights."""
        weights = self.lora()
        unet = shared_copy(self.backbone.unet) if weights else self.shelved.network
        for name in [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]:
            layer: Any = unet.get_submodule(name)
            a, b = (weights[f"{name}.lora_{factor}.weight"].flatten(1) for factor in "AB")
            layer.weight = torch.nn.Parameter(layer.weight + (b @ a).view_as(layer.weight), requires_grad=False)
        return unet

    def updates(self, steps: int) -> dict[str, Tensor]:
        """The low-rank updates that make the backbone the adapter's, all of one rank; {} for none, and for full ones.

        Those of `lora`, and one for what the adapter adds to the time features x(t): a . x(t) = 1 for all t very
        nearly, and for the timesteps of `steps` exactly, so W (x + c) = W x + (W c) (a . x). From 64 channels up,
        a . x(t) is off by less than 1e-5 at any t.
        """
        weights, told = self.lora(), self.told()
        if self.shelved.full or told is None:
            return weights
        rank = next((len(value) for key, value in weights.items() if ".lora_A." in key), 1)
        layer: Any = self.backbone.unet.get_submodule(TIME)
        a, b = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        a[0], b[:, 0] = self._constant(steps), layer.weight.detach() @ told
        return {**weights, f"{TIME}.lora_A.weight": a, f"{TIME}.lora_B.weight": b}

    def _constant(self, steps: int) -> Tensor:
        """The smallest `a` (W,) with a . x(t) = 1, x(t) the sinusoidal time features; see `updates`."""
        unet, levels = self.backbone.unet, torch.arange(int(self.backbone.schedule.horizon))
        features = unet.get_time_embed(sample=torch.zeros(len(levels), 1), timestep=levels).double()  # type: ignore[union-attr]
        heavy = torch.ones(len(levels), 1, dtype=torch.float64)
        heavy[self.timesteps(steps)] = 1e4  # narrow networks cannot be right everywhere
        ridge = 1e-6 * torch.eye(features.shape[1], dtype=torch.float64)
        wanted = torch.cat([heavy, heavy.new_zeros(len(ridge), 1)])
        return torch.linalg.lstsq(torch.cat([heavy * features, ridge]), wanted).solution[:, 0].float()

    def refuse_what_is_ours(self, where: str) -> None:
        """Raises UserError for adapters that `where`, which knows ControlNets, LoRA and U-Nets, cannot express."""
        form = type(self.adapter)
        if form in (FusedAdapter, HintAdapter):
            way = "mixes a condition encoder's features into the U-Net" if form is FusedAdapter else "adds the condition to the U-Net's input"  # fmt: skip # noqa: E501
            raise UserError(f"{self.name}: a {form.__name__} {way}, for which {where} has no place: "
                            "train with `adapter: controlnet`, or export --to onnx")  # fmt: skip
        if self.info.get("boundary"):
            raise UserError(f"{self.name}: was trained with CoDi's boundary scaling, which no sampler of {where} has: "
                            "train without `boundary`, or export --to onnx")  # fmt: skip
        if self.guidance.second_pass < 1:
            raise UserError(f"{self.name}: its guidance {self.guidance.second_pass:g} is below 1, which {where} takes "
                            "for none: train with a `guidance_scale` from 1 up, or export --to onnx")  # fmt: skip


def load_source(
    adapter: str | Path,
    model: str | Path,
    loras: Mapping[str, float] | None = None,
    config: str | Path | None = None,
) -> Source:
    """Loads an embedded adapter or a folder, on `model` with `loras` (see load_backbone), in float32. `config`: of a
    model that is a single file. Raises UserError where one is missing or broken, or they do not fit, and for an adapter
    that was trained on low-rank updates of the backbone when none are given."""
    hub: Any = {"config": config} if config else {}
    backbone = load_backbone(model, loras=loras, **hub).freeze()
    shelf = Shelf(backbone.network, backbone.family, model)
    source = Source(str(adapter), str(model), backbone, shelf.loaded[shelf.load(adapter)])
    wanted = (source.info.get("recipe") or {}).get("loras")
    if wanted and not loras and not source.shelved.full:
        words = " ".join(f"--lora {file}={weight:g}" for file, weight in wanted.items())
        raise UserError(f"{adapter}: was trained on a backbone with low-rank updates: name them: {words}")
    return source
