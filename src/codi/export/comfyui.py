"""A ComfyUI workflow in API format that samples with an exported adapter, of ComfyUI's built-in nodes only.

Load the file in the browser, or send it to /prompt as {"prompt": ...}. Steps are listed as sigma / alpha, which ComfyUI
calls sigma, so they are the adapter's own for any shift.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models import codec
from .source import Source

SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
LAST_SIGNAL = 4.8973451890853435e-08  # alpha^2 of ComfyUI's last level with zero terminal SNR


class Graph:
    """The workflow's nodes by their numbers, counted as they are added."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> str:
        """Add a node of class `kind` and return its number; an input [number, k] is the k-th output of another node."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return number


def workflow(source: Source, steps: int, files: dict[str, str]) -> dict[str, Any]:
    """Return the workflow. `files`: names of the exported files by "control", "unet" and "lora". Raises UserError for a
    prediction type that ComfyUI does not know."""
    prediction = source.schedule(steps).prediction
    if prediction not in SAMPLING:
        raise UserError(f"{source.name}: ComfyUI knows no {prediction} of U-Nets: export --to diffusers")
    side = source.cells[0] * codec.downscale(source.backbone.vae)
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", "The backbone", ckpt_name=f"{Path(source.model).stem}.safetensors")
    model: list[Any] = [checkpoint, 0]
    if "unet" in files:
        model = [graph.add("UNETLoader", unet_name=files["unet"], weight_dtype="default"), 0]
    if "lora" in files:
        model = [graph.add("LoraLoaderModelOnly", model=model, lora_name=files["lora"], strength_model=1.0), 0]
    zero = sigmas(source, steps)[0] > 1000
    model = [graph.add("ModelSamplingDiscrete", model=model, sampling=SAMPLING[prediction], zsnr=zero), 0]
    prompts = [_prompt(graph, source, [checkpoint, 1], text, side) for text in ("a red ball", "")]
    if "control" in files:
        prompts = _control(graph, source, files["control"], prompts, side)
    latent = graph.add(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=source.guidance.second_pass,
        positive=prompts[0], negative=prompts[1],
        sampler=[graph.add("KSamplerSelect", sampler_name="lcm" if source.renoises else "euler"), 0],
        sigmas=[graph.add("ManualSigmas", sigmas=", ".join(f"{value:.6f}" for value in sigmas(source, steps))), 0],
        latent_image=[graph.add("EmptyLatentImage", width=side, height=side, batch_size=1), 0],
    )  # fmt: skip
    picture = graph.add("VAEDecode", samples=[latent, 0], vae=[checkpoint, 2])
    graph.add("SaveImage", images=[picture, 0], filename_prefix="codi")
    return graph.nodes


def sigmas(source: Source, steps: int) -> list[float]:
    """Return sigma / alpha at the adapter's `steps` + 1 times."""
    grid = source.grid(steps)
    alpha, sigma = source.schedule(steps).alpha_sigma(grid, grid.double())
    last = ((1 - LAST_SIGNAL) / LAST_SIGNAL) ** 0.5
    return [float(s / a) if a > 0 else last for a, s in zip(alpha, sigma, strict=True)]


def _prompt(graph: Graph, source: Source, clip: list[Any], text: str, side: int) -> list[Any]:
    """Add a prompt's nodes and return their output; XL's have the image size, and zeros for an empty prompt."""
    if source.backbone.text_encoder_2 is None:
        return [graph.add("CLIPTextEncode", text=text, clip=clip), 0]
    size: Any = {"width": side, "height": side, "crop_w": 0, "crop_h": 0, "target_width": side, "target_height": side}
    node = graph.add("CLIPTextEncodeSDXL", clip=clip, text_g=text, text_l=text, **size)
    if not text and source.backbone.force_zeros_for_empty_prompt:
        node = graph.add("ConditioningZeroOut", conditioning=[node, 0])
    return [node, 0]


def _control(graph: Graph, source: Source, file: str, prompts: list[Any], side: int) -> list[Any]:
    """Add a ControlNet and its image to the two prompts; return both conditionings."""
    image = [graph.add("LoadImage", "The condition", image="condition.png"), 0]
    if source.task.scale != 1:
        size: Any = {"width": side, "height": side, "crop": "disabled"}
        image = [graph.add("ImageScale", image=image, upscale_method="bicubic", **size), 0]
    net = [graph.add("ControlNetLoader", control_net_name=file), 0]
    node = graph.add(
        "ControlNetApplyAdvanced", positive=prompts[0], negative=prompts[1], control_net=net, image=image,
        strength=1.0, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    return [[node, 0], [node, 1]]
