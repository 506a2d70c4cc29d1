"""An adapter with its backbone, and the parts of it that other programs can load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..models.adapter import Adapter, ControlNetAdapter, FusedAdapter, HintAdapter
from ..models.backbones import EMBEDDED, Backbone, Family, load_backbone
from ..models.lora import lora_names, shared_copy
from ..models.student import Conditioning
from ..sampling.adapter_store import AdapterStore, LoadedAdapter
from ..sampling.guidance import Guidance, resolve
from ..sampling.sampler import sampler_of, time_grid, with_target_time
from ..schedule import Schedule
from ..tasks import Task

WEIGHTS = "diffusion_pytorch_model.safetensors"  # of the adapter's own modules
LICENCE = "Apache-2.0"  # of embedded adapters that name no other


@dataclass(frozen=True)
class Source:
    """The adapter to export and its backbone; `name` and `model` are what the user called them."""

    name: str
    model: str
    backbone: Backbone
    loaded: LoadedAdapter

    @property
    def adapter(self) -> Adapter:
        return self.loaded.adapter

    @property
    def kind(self) -> Family:
        """The backbone's family."""
        return self.backbone.kind

    @property
    def info(self) -> dict[str, Any]:
        return self.loaded.info

    @property
    def task(self) -> Task:
        return self.loaded.task

    @property
    def control(self) -> ControlNetAdapter | None:
        """The adapter, if it is of ControlNet form."""
        return self.adapter if isinstance(self.adapter, ControlNetAdapter) else None

    @property
    def hint(self) -> HintAdapter | None:
        """The adapter, if it is of hint form."""
        return self.adapter if isinstance(self.adapter, HintAdapter) else None

    @property
    def reads(self) -> bool:
        """Whether the adapter takes a condition, in a form that stock pipelines have."""
        return self.control is not None or self.hint is not None

    @property
    def sampler(self) -> str:
        """One of sampling.sampler's SAMPLERS."""
        return sampler_of(self.info)

    @property
    def renoises(self) -> bool:
        """Whether each sampling step adds fresh noise."""
        return self.sampler == "renoise"

    @property
    def shift(self) -> float:
        """Shift of the adapter's time grid."""
        return self.info.get("shift") or 1.0

    @cached_property
    def guidance(self) -> Guidance:
        """The adapter's default guidance."""
        return resolve(None, None, [self.info])

    @property
    def cells(self) -> tuple[int, int]:
        """Size (h, w) of the latents that the backbone was trained on."""
        side = self.kind.sample_size(self.backbone.network, self.backbone.vae)
        return side, side

    @property
    def notes(self) -> dict[str, str]:
        """Metadata of an exported file: name, task, base, licence and the version of codi; no local paths."""
        base = Path(self.model).name if Path(self.model).exists() else self.model
        licence = LICENCE if self.loaded.folder.is_relative_to(EMBEDDED) else "not stated"
        return {
            "name": Path(self.name).name,
            "task": self.task.name,
            "base": f"{base} ({self.backbone.family})",
            "licence": self.info.get("licence") or licence,
            "version": f"codi {version('codi')}",
        }

    def stored_dtype(self, part: Path) -> torch.dtype:
        """Return the precision of the weights in an adapter's safetensors file, or in the first of a folder; float32 if
        there are none."""
        for file in sorted(part.glob("*.safetensors")) if part.is_dir() else [part] if part.is_file() else []:
            with safe_open(file, "pt") as weights:
                dtypes = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118 - no dict
            return max((kind for kind in dtypes if kind.is_floating_point), key=lambda kind: kind.itemsize)
        return torch.float32

    def schedule(self, steps: int) -> Schedule:
        """Return the noise schedule of latents of size `cells`."""
        return self.backbone.schedule_for(self.cells, steps).unstretched()

    def grid(self, steps: int) -> Tensor:
        """Return the `steps` + 1 times of the adapter's sampler."""
        schedule = self.schedule(steps)
        return time_grid(schedule.horizon, steps, self.shift, schedule.whole)

    def timesteps(self, steps: int) -> list[float]:
        """Return the timesteps that the network gets, in the checkpoint's own numbering."""
        return self.schedule(steps).timestep(self.grid(steps)[:-1]).tolist()

    @torch.no_grad()
    def time_conditions(self, steps: int) -> Tensor | None:
        """Return what the adapter adds to the time embedding at its default guidance with a prompt: (1, W) if it is the
        same at all steps, else (steps, W); None if it is zero."""
        grid = self.grid(steps).tolist()
        plain = Conditioning(torch.zeros(1), guidance=self.guidance.columns(["a prompt"]))
        horizon = float(self.schedule(steps).horizon)
        conditionings = [
            with_target_time(plain, self.sampler, t, s, horizon) for t, s in zip(grid, grid[1:], strict=False)
        ]
        rows = [row for c in conditionings if (row := self.adapter.time_condition(c.guidance, c.jump)) is not None]
        if not any(bool(row.any()) for row in rows):
            return None
        same = all(torch.equal(row, rows[0]) for row in rows)
        return rows[0] if same else torch.cat(rows)

    def full_network(self, steps: int) -> Any:
        """Return the network of a full adapter, None for other adapters. What the adapter adds to the time embedding is
        merged into the bias of a layer or, if it has none or the steps differ, into its weight as in `updates`."""
        if not self.loaded.full:
            return None
        network, extra = shared_copy(self.loaded.network), self.time_conditions(steps)
        if extra is not None:
            layer: Any = network.get_submodule(self.kind.time_layer)
            outputs = self._layer_outputs(network, extra)
            if layer.bias is not None and len(outputs) == 1:
                layer.bias = torch.nn.Parameter(layer.bias + outputs[0], requires_grad=False)
            else:
                weight = layer.weight + outputs.T @ self._selectors(network, steps, len(outputs))
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return network

    def lora(self) -> dict[str, Tensor]:
        """Return the trained low-rank updates (B A, unscaled): `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
        unet, weights = self.loaded.network, {}
        for name in lora_names(unet):
            config: Any = unet.peft_config[name]  # type: ignore[index]
            for key, value in get_peft_model_state_dict(unet, adapter_name=name).items():
                weights[key] = value * (config.lora_alpha / config.r) if ".lora_B." in key else value
        return weights

    def merged_unet(self) -> Any:
        """Return the U-Net that works with the adapter, its low-rank updates added to the weights."""
        weights = self.lora()
        unet = shared_copy(self.backbone.unet) if weights else self.loaded.network
        for name in [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]:
            layer: Any = unet.get_submodule(name)
            a, b = (weights[f"{name}.lora_{factor}.weight"].flatten(1) for factor in "AB")
            layer.weight = torch.nn.Parameter(layer.weight + (b @ a).view_as(layer.weight), requires_grad=False)
        return unet

    def updates(self, steps: int) -> dict[str, Tensor]:
        """Return the low-rank updates of the backbone that express the adapter, all of the same rank; {} if it has none
        or is a full one.

        These are the updates of `lora`, and one for what the adapter adds to the time embedding, the output of a linear
        layer of features x(t). For c_i at step i that is sum_i c_i (a_i . x(t)), with a_i . x(t_j) = 1 for i = j and 0
        otherwise. For a c that is the same at all steps, a . x(t) = 1 for all t to within 1e-4, in networks of at least
        64 channels.
        """
        weights, extra = self.lora(), self.time_conditions(steps)
        if self.loaded.full or extra is None:
            return weights
        network, name, count = self.backbone.network, self.kind.time_layer, len(extra)
        a, b = self._selectors(network, steps, count), self._layer_outputs(network, extra).T
        weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b.contiguous()}
        rank = max(len(value) for key, value in weights.items() if ".lora_A." in key)
        return {key: _padded(value, rank, 0 if ".lora_A." in key else 1) for key, value in weights.items()}

    def _layer_outputs(self, network: Any, extra: Tensor) -> Tensor:
        """Return the extra output of the time layer, (n, width), for each row added to the time embedding (n, W)."""
        return torch.stack([self.kind.time_constant(network, row) for row in extra])

    @torch.no_grad()
    def _selectors(self, network: Any, steps: int, count: int) -> Tensor:
        """Return the rows a_i (count, W) of least norm that select the steps from the time layer's features; see
        `updates`."""
        times = torch.tensor(self.timesteps(steps))
        if count > 1:
            return torch.linalg.pinv(self.kind.time_features(network, times).double()).T.float()
        horizon = int(self.schedule(steps).horizon)
        levels = torch.cat([torch.arange(horizon), times])
        weights = torch.ones(len(levels), 1, dtype=torch.float64)
        weights[horizon:] = 1e4  # narrow networks cannot fit all times
        features = weights * self.kind.time_features(network, levels).double()
        left, values, right = torch.linalg.svd(features, full_matrices=False)
        shares = values / (values.square() + 1e-12)  # ridge regression ignores directions of almost no weight
        return (right.T @ (shares * (left.T @ weights)[:, 0])).float()[None]

    def require_format(self, form: str) -> None:
        """Raise UserError unless `codi export --to` can write this `form` for the backbone's family."""
        if form not in self.kind.formats:
            others = " or ".join(self.kind.formats)
            raise UserError(f"{self.name}: --to {form} is for Stable Diffusion's U-Nets so far, and {self.model} is of "
                            f"{self.kind.name}: export --to {others}, or sample with codi")  # fmt: skip

    def require_stock_sampler(self, where: str) -> None:
        """Raise UserError for an adapter that no sampler of `where` (stock diffusers or another program) samples as
        codi does."""
        if self.info.get("boundary"):
            raise UserError(f"{self.name}: was trained with CoDi's boundary scaling, which no sampler of {where} has: "
                            f"train without `boundary`, or {self.alternative}")  # fmt: skip
        if self.guidance.second_pass < 1:
            raise UserError(f"{self.name}: its guidance {self.guidance.second_pass:g} is below 1, which {where} treats "
                            f"as none: train with a `guidance_scale` of at least 1, or {self.alternative}")  # fmt: skip

    @property
    def alternative(self) -> str:
        """Advice for an adapter that other programs cannot load, as the end of an error message."""
        return "export --to onnx" if "onnx" in self.kind.formats else "sample with codi"

    def refuse_form(self, where: str) -> None:
        """Raise UserError for a form that `where` cannot load, which knows ControlNets, LoRA and whole networks."""
        part = self.kind.network_kind
        reasons = {FusedAdapter: f"mixes a condition encoder's features into the {part}",
                   HintAdapter: f"adds the condition to the {part}'s input"}  # fmt: skip
        form = type(self.adapter)
        if form in reasons:
            other = "`adapter: controlnet`" if self.kind.stock_controlnet else "`adapter: lora`"
            raise UserError(f"{self.name}: a {form.__name__} {reasons[form]}, for which {where} has no place: "
                            f"train with {other}, or {self.alternative}")  # fmt: skip


def load_source(
    adapter: str | Path,
    model: str | Path,
    loras: Mapping[str, float] | None = None,
    config: str | Path | None = None,
) -> Source:
    """Load an embedded adapter or a folder, with `model` and `loras` (see load_backbone), in float32. `config`: needed
    for a model that is a single file. Raises UserError if one is missing or broken or they do not fit, and if the
    adapter was trained on a backbone with low-rank updates but none are given."""
    hub: Any = {"config": config} if config else {}
    backbone = load_backbone(model, loras=loras, **hub).freeze()
    store = AdapterStore(backbone.network, backbone.family, model)
    source = Source(str(adapter), str(model), backbone, store.loaded[store.load(adapter)])
    trained_with = (source.info.get("recipe") or {}).get("loras")
    if trained_with and not loras and not source.loaded.full:
        flags = " ".join(f"--lora {file}={weight:g}" for file, weight in trained_with.items())
        raise UserError(f"{adapter}: was trained on a backbone with low-rank updates: name them: {flags}")
    return source


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Return a factor of a low-rank update padded with zeros to `rank` along `axis`."""
    zeros = factor.new_zeros([rank - n if k == axis else n for k, n in enumerate(factor.shape)])
    return torch.cat([factor, zeros], dim=axis)
