"""Run the hooks of accelerate and diffusers around a network whose layers are called one by one.

Adapters change features inside a network, so its own forward pass is never called. But the hooks that offload a whole
model, or parameters outside of its layers, run on that call. `called` runs them instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _get_group_onload_device
from torch import nn


def device_of(module: Any) -> torch.device:
    """Return the device on which a module computes: the one its hooks move its weights to, or that of the weights."""
    if not isinstance(module, nn.Module):
        return module.device
    try:
        return _get_group_onload_device(module)
    except ValueError:  # it has no hook of group offloading
        pass
    for part in module.modules() if hasattr(module, "_hf_hook") else ():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return module.device  # type: ignore[return-value]


@contextmanager
def called(*modules: Any) -> Iterator[None]:
    """Within the context, run the hooks of each module's forward pass; the caller runs the module's layers."""
    with ExitStack() as stack:
        for module in {id(module): module for module in modules}.values():
            stack.enter_context(_called(module))
        yield


@contextmanager
def _called(module: Any) -> Iterator[None]:
    hooks = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())
    hooks += [hook for hook in (getattr(module, "_hf_hook", None),) if hook is not None]
    for hook in reversed(hooks):
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)
