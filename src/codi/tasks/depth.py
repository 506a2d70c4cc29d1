"""Task depth: a depth map and a prompt -> an image with this geometry."""

from __future__ import annotations

import functools
import os
import re
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.images import check_file, read_image, require_size
from ..errors import UserError, nearest
from .base import Task, seeds
from .canny import dilate, edges

if TYPE_CHECKING:
    from ..data.batches import Batch

NEAR = ("auto", "bright", "dark")
JUMP = 0.08  # least difference of neighbouring pixels that is a jump, as a share of the depth range
COLOURLESS = 0.02  # mean spread of the channels up to which an image is grey: JPEG leaves some color in grey images
METRIC = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")  # model types that always estimate distances
EDGE = (50.0, 100.0)  # Canny thresholds of edges compared with jumps: lower than those of task canny


@dataclass(frozen=True)
class Depth(Task):
    """Task with disparity (B, 1, H, W) as input, scaled to [0, 1] in each image: 1 = nearest, 0 = farthest or sky."""

    near: str = "auto"
    """Values that mean near in the data's `conditioning_image`: "bright", "dark" (a distance, 0 = unknown), or "auto":
    16-bit columns are distances, 8-bit ones bright where near."""
    soften: float = 0.0
    """Share of the maps that training blurs, by reducing them to between a quarter and all of their resolution: depth
    estimated from photos is less sharp than exact depth."""

    name: ClassVar[str] = "depth"
    obedience_unit: ClassVar[str] = "share of depth jumps with a picture edge within 1 px, less that of all pixels"

    def __post_init__(self) -> None:
        if self.near not in NEAR:
            raise UserError(f"near={self.near}: unknown{nearest(str(self.near), NEAR)}: use one of {', '.join(NEAR)}")
        if not 0 <= self.soften <= 1:
            raise UserError(f"soften={self.soften}: not a share: use a number from 0 to 1")

    def measured(self) -> Depth:
        """Return the task with exact maps, without softening."""
        return replace(self, soften=0.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """The depth maps."""
        return ("conditioning_image",)

    def given(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the depth in the data, scaled by `normalise`, (B, 1, H, W)."""
        depth = self._column(batch, "conditioning_image")
        eight_bit = depth.shape[1] == 3  # sources return 8-bit columns as RGB in [0, 1]
        depth = depth.mean(1, keepdim=True)
        if self.near == "bright" or (self.near == "auto" and eight_bit):
            near = normalise(depth)
        else:
            near = inverted(depth) if eight_bit else disparity(depth)
        if not self.soften:
            return near
        maps = zip(near.split(1), seeds(batch, generator), strict=True)
        return torch.cat([_softened(depth_map, self.soften, np.random.default_rng(seed)) for depth_map, seed in maps])

    def bring(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale a map (B, 1 or 3, H, W), bright where near, to [0, 1]. Raises UserError for a color image."""
        self._refuse_mask(mask)
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise UserError(f"depth of shape {tuple(image.shape)}: not a depth map: give (B, 1, H, W)")
        if _coloured(image):
            raise UserError("image: is a colour picture, not a depth map: give a grey one, or estimate the depth")
        return normalise(image.mean(1, keepdim=True))

    def condition(self, given: Tensor) -> Tensor:
        """Return `given` in three channels, (B, 3, H, W)."""
        return given.expand(-1, 3, -1, -1)

    def obedience(self, output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the share of depth jumps with an edge of `output` within 1 px, minus the share of all pixels with one,
        so that edges everywhere score 0; NaN without jumps.

        Comparing the depth of the output itself needs a depth estimator, which an external judge can provide.
        """
        jumps, near_edge = depth_jumps(given.float().to(output.device)), dilate(edges(output, *EDGE))
        shown = (jumps * near_edge).sum((1, 2, 3)) / jumps.sum((1, 2, 3))
        return {"jumps_shown": shown - near_edge.mean((1, 2, 3))}


def normalise(near: Tensor) -> Tensor:
    """Scale (..., 1, H, W), larger where nearer, to [0, 1] for each map. Values that are not finite count as farthest;
    a constant map becomes 1 (nearest) if above 0, else 0 (farthest)."""
    known = near.isfinite()
    low = near.where(known, torch.inf).amin((-2, -1), keepdim=True)
    high = near.where(known, -torch.inf).amax((-2, -1), keepdim=True)
    scaled = torch.where(high > low, (near - low) / (high - low), (near > 0).to(near))
    return torch.where(known, scaled, 0.0)


def disparity(distance: Tensor) -> Tensor:
    """Convert distances z (..., 1, H, W) of any unit to `(1/z - 1/z_max) / (1/z_min - 1/z_max)` for each map. A z that
    is not positive and finite (0 = sky) gives 0."""
    known = distance.isfinite() & (distance > 0)
    return normalise(torch.where(known, 1 / distance.double(), torch.nan)).to(distance)


def inverted(levels: Tensor) -> Tensor:
    """Convert levels (..., 1, H, W) in [0, 1], darker where nearer, to `normalise(1 - levels)`. Level 0 means unknown
    or sky, so farthest, unless the whole map is 0."""
    known = levels > 0
    return normalise((1 - levels).where(known | ~known.any(-1, True).any(-2, True), torch.nan))


def _softened(near: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Return the map (1, 1, H, W), with probability `share` blurred by reducing its resolution."""
    if rng.random() >= share:
        return near
    factor, size = rng.uniform(0.25, 1), near.shape[-2:]
    small = F.interpolate(near, [max(1, round(side * factor)) for side in size], mode="area")
    return normalise(F.interpolate(small, size, mode="bilinear"))


def depth_jumps(given: Tensor) -> Tensor:
    """Return (B, 1, H, W): 1 at both pixels of each pair of neighbours in `given` (B, 1, H, W) that differ by more than
    JUMP, else 0."""
    jumps = torch.zeros_like(given)
    for axis in (-2, -1):
        n = given.shape[axis] - 1
        jump = (given.diff(dim=axis).abs() > JUMP).to(given)
        jumps.narrow(axis, 0, n).add_(jump)
        jumps.narrow(axis, 1, n).add_(jump)
    return jumps.clamp_max(1)


# --- depth maps from files and estimators ----------------------------------------------------------------------------


def read_depth(path: str | os.PathLike[str], near: str = "guess") -> Tensor:
    """Read a depth map of any range from an image of 8 or 16 bits or a .npy file, in the format of `Depth.given`,
    (1, H, W).

    `near="dark"`: 16-bit and .npy values are distances of any unit (0, NaN and infinity = sky or unknown, farthest);
    8-bit values are inverted linearly, except 0, which is farthest. `near="bright"`: larger is nearer. "guess" chooses
    the one that makes the bottom nearer than the top, and warns of its choice. Transparent pixels are unknown. Warns of
    a constant map. Raises UserError for a file that cannot be read, is a color image or holds no depth at all.
    """
    if near not in ("guess", "bright", "dark"):
        raise UserError(f"near={near}: unknown: use guess, bright or dark")
    path = Path(path)
    values, levels = _read_array(path) if path.suffix.lower() == ".npy" else _read_grey(path)
    if near == "guess":
        near, why = _guess(values, levels)
        warnings.warn(f"{path}: took {near} as near ({why}): pass --near bright or --near dark", stacklevel=2)
    if near == "bright":
        known, depth = values.isfinite(), normalise(values)
    elif levels:
        known, depth = values.isfinite(), inverted(values)
    else:
        known, depth = values.isfinite() & (values > 0), disparity(values)
    if not known.any():
        raise UserError(f"{path}: holds no depth, only 0, NaN or infinity: give a map with numbers above 0")
    if depth.amin() == depth.amax():
        warnings.warn(f"{path}: is constant, so it holds no depth", stacklevel=2)
    return depth.float()


def _read_grey(path: Path) -> tuple[Tensor, bool]:
    """Return (1, H, W) with NaN where transparent, and True for 8-bit levels in [0, 1], False for 16-bit numbers."""
    picture = read_image(path)
    if not picture.grey and _coloured(picture.rgb):
        raise UserError(f"{path}: is a colour picture, not a depth map: give a grey one, or estimate the depth")
    values = picture.rgb[:1] if picture.grey else picture.rgb.mean(0, keepdim=True)
    if picture.bits == 16:
        values = (values * 65535).round()  # exactly the numbers in the file
    if picture.alpha is not None:
        values = torch.where(picture.alpha < 0.5, torch.nan, values)
    return values.double(), picture.bits == 8


def _coloured(image: Tensor) -> bool:
    """Return whether any image of (..., C, H, W) is not grey."""
    spread = image.amax(-3) - image.amin(-3)
    return bool((spread.mean((-2, -1)) > COLOURLESS).any())


def _read_array(path: Path) -> tuple[Tensor, bool]:
    """Return the same as `_read_grey`; bool and uint8 arrays hold levels, all others numbers."""
    check_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it reads a single plain array only
    except (OSError, ValueError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{path}: cannot be read ({why or 'no whole array of numbers'}): "
                        "save the map with numpy.save") from error  # fmt: skip
    grid = array
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        grid = array[0] if array.shape[0] == 1 else array[..., 0]
    if grid.ndim != 2 or not grid.size or array.dtype.kind not in "buif":
        raise UserError(f"{path}: an array of {array.dtype} of shape {array.shape}: give one number a pixel, (H, W)")
    require_size(path, (grid.shape[1], grid.shape[0]))
    full = 255 if array.dtype == np.uint8 else 1
    return torch.from_numpy(grid.astype(np.float64))[None] / full, array.dtype in (np.bool_, np.uint8)


def _guess(values: Tensor, levels: bool) -> tuple[str, str]:
    """Return "bright" or "dark" for what is near, and why.

    In most photos the ground at the bottom is nearer than the top. Zeros are ignored: in distance maps they are the
    sky.
    """
    known = (values[0].isfinite() & (values[0] != 0)).nonzero(as_tuple=True)
    pairs = torch.stack([known[0].double(), values[0][known]])
    tilt = float(torch.corrcoef(pairs)[0, 1]) if pairs.shape[1] > 1 else 0.0
    if abs(tilt) > 0.1:  # False for the NaN of a constant map
        return ("bright", "its lower part is brighter") if tilt > 0 else ("dark", "its lower part is darker")
    return ("bright", "usual for 8 bits") if levels else ("dark", "usual for distances")


@functools.lru_cache(maxsize=1)
def _estimator(model: str, device: str) -> Any:
    """Return the depth estimation pipeline of transformers, cached so that a folder of photos loads it once."""
    from transformers import pipeline  # imported here: it takes seconds, and reading depth maps does not need it

    return pipeline("depth-estimation", model=model, device=device)


def estimate_depth(picture: Tensor, model: str, device: str = "cpu") -> Tensor:
    """Estimate the depth of a photo (3, H, W) in [0, 1], in the format of `Depth.given`, (1, H, W).

    `model`: a depth estimator of transformers, as a folder or a hub name such as
    depth-anything/Depth-Anything-V2-Small-hf. Relative models give disparity, metric ones distances: both are returned
    as 1 = nearest. Raises UserError if the model cannot be loaded or is no depth estimator.
    """
    try:
        estimator = _estimator(str(model), str(device))
    except Exception as error:  # missing folder, network or weights, or another kind of model: each raises its own type
        sentence = re.split(r"(?<=[.!?])\s", str(error).strip(), maxsplit=1)[0]
        why = textwrap.shorten(sentence.rstrip("."), 240, placeholder=" ...")
        raise UserError(f"{model}: no depth estimator ({why}): give the folder or name of one") from error
    levels = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    estimate = estimator(Image.fromarray(levels))["predicted_depth"].float().cpu()[None, None]
    config = estimator.model.config
    metric = config.model_type in METRIC or getattr(config, "depth_estimation_type", "relative") == "metric"
    if estimate.shape[-2:] != picture.shape[-2:]:
        estimate = F.interpolate(estimate, picture.shape[-2:], mode="bilinear")
    return (disparity(estimate) if metric else normalise(estimate))[0]
