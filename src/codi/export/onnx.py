"""Export for ONNX: the whole few-step sampler as one graph, from token ids, noise and an image to an image.

model.onnx                            with its name, task, base, licence, version and steps as metadata;
                                      weights in model.onnx.data if they are too large for one file
config.json                           its inputs and output, size, steps, task
tokenizer/                            the prompt's tokenizer, for `CLIPTokenizer.from_pretrained`
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_folder
from ..models import codec, text
from ..models.student import Conditioning, Student
from ..sampling.colour import match_colour
from ..sampling.sampler import sample, time_grid
from .source import Source

OPSET = 18
LARGEST = 1_900_000_000  # bytes in model.onnx: protocol buffers hold at most 2 GiB


class Sampler(nn.Module):
    """The computation of `CoDiPipeline` with its defaults, as one forward pass."""

    def __init__(self, source: Source, steps: int) -> None:
        super().__init__()
        self.student = Student(source.merged_unet(), source.adapter)
        self.vae, self.text_encoder = source.backbone.vae, source.backbone.text_encoder
        self.source, self.steps, self.schedule = source, steps, source.backbone.schedule
        self.blank = nn.Buffer(text.tokenize(source.backbone.tokenizer, [""]))

    def forward(
        self, input_ids: Tensor, noise: Tensor, image: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] for tokens (B, L), noise (B, fields C, h, w), the task's input (B, c, H,
        W) in [0, 1] and guidance scales (B, k)."""
        source, task = self.source, self.source.task
        # An adapter without condition ignores it, but the argument is required.
        condition = noise if image is None else source.adapter.read(task.condition(image), self.vae)
        features = text.embed(self.text_encoder, input_ids)
        conditioning, blank = Conditioning(features, condition, guidance=guidance_scale), None
        scale = source.guidance.second_pass
        if scale != 1:
            empty = text.embed(self.text_encoder, self.blank).expand_as(features)
            blank = Conditioning(empty, condition, guidance=guidance_scale)
        latent = sample(
            self.student, self.schedule, noise, conditioning, self.steps, scale, blank, sampler=source.sampler,
            boundary=bool(source.info.get("boundary")), grid=time_grid(self.schedule.horizon, self.steps, source.shift),
        )  # fmt: skip
        picture = codec.decode(self.vae, latent)
        if image is None:
            return picture
        if task.name == "upscale":
            colour = source.info.get("colour") or "wavelet"
            picture = match_colour(picture, task.condition(image), colour, task.scale)
        return task.finish(picture, image)


def export_onnx(source: Source, out: Path, steps: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Write the folder `out` atomically; return its config.json. `size`: (H, W) of the images, by default the
    backbone's own. The batch size stays free.

    Raises UserError for a size that does not fit, and if the packages for ONNX are missing.
    """
    require_packages()
    source.require_format("onnx")
    if source.backbone.text_encoder_2 is not None:
        raise UserError(f"{source.name}: is for XL, whose two text encoders the graph does not support yet: "
                        "export --to diffusers")  # fmt: skip
    sampler, inputs = Sampler(source, steps).eval(), examples(source, steps, size)
    config = describe(source, steps, inputs)

    def fill(folder: Path) -> None:
        parts = folder / "parts"
        parts.mkdir()
        axes = {name: {0: "batch"} for name in (*inputs, "picture")}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about shapes that become constants, as all but the batch size should
            # Tracing takes seconds where torch.export takes minutes for an unrolled sampler.
            torch.onnx.export(
                sampler, (), str(parts / "model.onnx"), kwargs=inputs, dynamo=False, opset_version=OPSET,
                input_names=list(inputs), output_names=["picture"], dynamic_axes=axes,
            )  # fmt: skip
        gather(parts, folder / "model.onnx", config)
        source.backbone.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    write_folder(out, fill)
    return config


def require_packages() -> None:
    """Raise UserError unless the packages for exporting and checking are installed."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package}: this package is missing, which ONNX needs: pip install codi[export]")


def examples(source: Source, steps: int, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return example inputs of the graph by name, for two images. Raises UserError for a size that is no multiple of a
    latent cell."""
    backbone, task = source.backbone, source.task
    f, channels = codec.downscale(backbone.vae), backbone.vae.config["latent_channels"]
    height, width = size or (backbone.kind.sample_size(backbone.network, backbone.vae) * f,) * 2
    if height % f or width % f or height % task.scale or width % task.scale or not height or not width:
        multiple = max(f, task.scale)
        raise UserError(f"size {width} x {height}: no size for this adapter: use multiples of {multiple} px")
    inputs = {
        "input_ids": text.tokenize(backbone.tokenizer, ["", "a picture"]),
        "noise": torch.zeros(2, channels * (steps if source.renoises else 1), height // f, width // f),
    }
    if source.task.name != "generate":
        low = torch.zeros(2, task.condition_channels, height // task.scale, width // task.scale)
        inputs["image"] = torch.zeros(2, task.bring(low).shape[1], *low.shape[-2:])
    columns = source.guidance.columns(["", "a picture"])
    if columns is not None:
        inputs["guidance_scale"] = columns
    return inputs


def describe(source: Source, steps: int, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return config.json: metadata, inputs and output of the graph."""
    task = " ".join((type(source.task).__doc__ or "").split())
    meanings = {
        "input_ids": "the prompt's tokens, padded to this length",
        "noise": f"N(0, 1){', one field per step' if source.renoises else ''}",
        "image": f"in [0, 1]: {task}",
        "guidance_scale": f"{', '.join(source.guidance.scales)}; text is 1 where the prompt is empty",
    }
    f = codec.downscale(source.backbone.vae)
    height, width = (side * f for side in inputs["noise"].shape[-2:])
    return {
        **source.notes,
        "task_options": source.task.config(),
        "family": source.backbone.family,
        "steps": steps,
        "timesteps": source.timesteps(steps),
        "size": {"height": height, "width": width},
        "inputs": {
            name: {
                "shape": ["batch", *value.shape[1:]],
                "dtype": str(value.dtype).removeprefix("torch."),
                "meaning": meanings[name],
                **({"default": value[1].tolist()} if name == "guidance_scale" else {}),
            }
            for name, value in inputs.items()
        },
        "output": {"picture": {"shape": ["batch", 3, height, width], "dtype": "float32", "meaning": "in [0, 1]"}},
    }


def gather(parts: Path, target: Path, config: dict[str, Any]) -> None:
    """Move the model from the folder `parts`, where torch writes a file per weight of large models, to `target`. Set
    the shape of the output, which torch does not know, and the metadata from `config`."""
    import onnx

    size = sum(part.stat().st_size for part in parts.iterdir())
    model = onnx.load(str(parts / "model.onnx"))
    for output in model.graph.output:
        shape = config["output"][output.name]["shape"]
        for dimension, length in zip(output.type.tensor_type.shape.dim, shape, strict=True):
            if isinstance(length, int):
                dimension.dim_value = length
            else:
                dimension.dim_param = length
    keys = ("name", "task", "base", "licence", "version", "steps")
    onnx.helper.set_model_props(model, {key: str(config[key]) for key in keys})
    data = f"{target.name}.data"
    onnx.save_model(model, str(target), save_as_external_data=size > LARGEST, location=data)
    for part in parts.iterdir():
        part.unlink()
    parts.rmdir()
