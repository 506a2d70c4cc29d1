"""The options of a recipe's objective: checks, and the loss with everything bound that it needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError, nearest
from ..models import codec
from ..objectives import OBJECTIVES, distances
from ..objectives.batch import Network

_CHOICES = {
    "consistency": ("noise", "signal"),
    "ode": ("own", "teacher"),
    "d_x": distances.DISTANCES,
    "signal_weighting": ("signal", "velocity"),
    "consistency_weighting": ("velocity", "signal"),
}


def require_options(objective: str, chosen: Mapping[str, Any]) -> None:
    """Raise UserError for unknown options of the objective and for invalid values."""
    defaults = OBJECTIVES[objective].defaults
    options = {**defaults, **chosen}
    for key, values in _CHOICES.items():
        value = chosen.get(key, values[0])
        if value not in values:
            raise UserError(f"{key} {value!r}: not known{nearest(str(value), values)}: use one of {', '.join(values)}")
    if options.get("signal_weighting") == "velocity" and chosen.get("d_x", "latent") != "latent":
        raise UserError(
            "signal_weighting 'velocity': applies to latents only: use it with d_x: latent, or set it to signal"
        )
    for key in ("dt", "dt_end"):
        dt = options.get(key)
        if dt is not None and (not isinstance(dt, int) or not 1 <= dt < 1000):
            raise UserError(f"{key} {dt!r}: must be a whole number of noise levels, 1 to 999: the paper uses 1")
    for key in chosen:
        if key not in defaults:
            raise UserError(
                f"objective_options: unknown key {key!r}{nearest(key, defaults)}: known are {', '.join(defaults)}"
            )

    if objective == "flow-map":
        _require_shares(options)


def _require_shares(options: Mapping[str, Any]) -> None:
    """Raise UserError unless the options of a flow map are weights and shares."""
    for key in ("weight", "weight_end"):
        if not isinstance(options[key], int | float) or not 0 < options[key] < math.inf:
            raise UserError(f"{key} {options[key]!r}: must be a number above 0: use for example 10")
    if not isinstance(options["power"], int | float) or not 0 <= options["power"] < math.inf:
        raise UserError(f"power {options['power']!r}: must be a number from 0: use for example 1")
    for key in ("share", "ends", "noisiest", "warmup"):
        if not isinstance(options[key], int | float) or not 0 <= options[key] < 1:
            raise UserError(f"{key} {options[key]!r}: must be a share from 0 to below 1: use for example 0.5")


def configure_objective(recipe: Any, vae: Any, teacher: Network | None) -> Callable[..., dict[str, Tensor]]:
    """Return the loss of a DistillRecipe's objective with its options, distance and teacher bound."""
    options = dict(recipe.objective_options)
    name = options.pop("d_x", "latent")
    decode = functools.partial(codec.decode, vae, clamp=False)
    if name == "latent":
        distance = distances.latent
    elif name == "pixel":
        distance = distances.pixel(decode)
    elif name == "features":
        distance = distances.features(decode, lambda image: vae.encoder(image * 2 - 1))
    elif name == "perceptual":
        distance = distances.perceptual(decode, _perceptual(vae))
    else:
        known = distances.DISTANCES
        raise UserError(f"d_x {name!r}: not known{nearest(str(name), known)}: use one of {', '.join(known)}")
    objective = OBJECTIVES[recipe.objective]
    if "d_x" in objective.defaults:
        options["d_x"] = distance
    if recipe.teaching:
        options["teacher"] = teacher
    return functools.partial(objective.loss, **options)


def _perceptual(vae: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from ..evaluation.metrics import Features, enlite0_distance

    extractors: dict[Any, Features] = {}  # created on the codec's device, which is not known before training starts

    def metric(a: Tensor, b: Tensor) -> Tensor:
        if vae.device not in extractors:
            extractors[vae.device] = Features(device=vae.device)
        return enlite0_distance(a.float(), b.float(), extractors[vae.device])

    return metric
