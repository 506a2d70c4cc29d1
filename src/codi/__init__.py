"""Image-conditioned latent diffusion that samples in 1 to 4 steps.

    pipe = codi.CoDiPipeline.from_pretrained("mini", task="upscale")
    picture = pipe(image=small, steps=4, seed=0).images[0]

Names are imported on first use, so that `import codi` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError as UserError
    from .sampling.pipeline import CoDiPipeline as CoDiPipeline

__version__ = "0.1.0"
__all__ = ["CoDiPipeline", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "CoDiPipeline":
        from .sampling.pipeline import CoDiPipeline as value
    elif name == "UserError":
        from .errors import UserError as value
    else:
        raise AttributeError(f"module 'codi' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
