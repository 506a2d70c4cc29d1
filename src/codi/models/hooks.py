"""Hooks of accelerate and diffusers around a network whose parts are called one by one.

Adapters work inside a network, so that it is never called as a whole; but offloading whole models, and the parameters
that belong to no layer of its own, hang on the call of the whole. `called` stands for that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _get_group_onload_device
from torch import nn


def device_of(module: Any) -> torch.device:
    """Return the device on which a module computes: where its hooks bring its weights, or where these are."""
    if not isinstance(module, nn.Module):
        return module.device
    try:
        return _get_group_onload_device(module)
    except ValueError:  # has no such hook
        pass
    for part in module.modules() if hasattr(module, "_hf_hook") else ():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return module.device  # type: ignore[return-value]


@contextmanager
def called(*modules: Any) -> Iterator[None]:
    """Run the hooks that surround the forward pass of each module, while the caller runs its parts."""
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
