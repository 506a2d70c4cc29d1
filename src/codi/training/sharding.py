"""Sharding of trained weights, their gradients and the optimizer's state over the processes (PyTorch FSDP2).

A sharded parameter is a DTensor, of which each process holds a share of the rows. The parameters of a block are
gathered while it runs, those outside of all blocks for a whole batch; gradients are averaged and split as they come.
Frozen parameters and the moving average are not sharded: some batches call these networks more often than others.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..models.backbones.stable_diffusion import StableDiffusion
from ..models.student import Student
from . import processes


class Sharded:
    """A job whose trained parameters, those of `online`, are sharded over all processes, in place. Raises UserError if
    this version of PyTorch cannot exclude the frozen ones."""

    def __init__(self, job: nn.Module, online: nn.Module, device: torch.device) -> None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError(f"shard: PyTorch {torch.__version__} cannot leave frozen weights unsharded: update PyTorch")
        # `uses`: in how many batches of an update each parameter outside of the blocks had a gradient.
        self.job, self.uses = job, dict[str, float]()
        frozen = {id(p): p for p in job.parameters()}
        for trained in (p for p in online.parameters() if p.requires_grad):
            del frozen[id(trained)]
        mesh = init_device_mesh(device.type, (processes.count(),))
        for block in blocks(online):
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=set(frozen.values()))
        fully_shard(job, mesh=mesh, ignored_params=set(frozen.values()))

    def add_zero_gradients(self, loss: Tensor) -> Tensor:
        """Return the loss of a batch with zero gradients for parameters outside of the blocks that the batch did not
        use (the guidance input, in a batch without guidance): all processes must have the same gradients."""
        used = _leaves(loss)
        outside = {n: p for n, p in self.job.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
        for name, parameter in outside.items():
            self.uses[name] = self.uses.get(name, 0.0) + (id(parameter) in used)
        zeros = [0.0 * p.sum() for p in outside.values() if id(p) not in used]
        return loss + torch.stack(zeros).sum() if zeros else loss

    def drop_zero_gradients(self) -> None:
        """Remove the zero gradients of parameters that no batch of the update used: the optimizer then skips these
        parameters, as it does with one process."""
        for name, uses in processes.total(self.uses).items():
            if not uses:
                self.job.get_parameter(name).grad = None
        self.uses.clear()


def blocks(online: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded one by one: blocks of the student's backbone and of an adapter's copies."""
    names = online.kind.sharded_blocks() if isinstance(online, Student) else StableDiffusion.block_classes
    return [module for module in online.modules() if type(module).__name__ in names]


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that `loss` depends on."""
    visited, todo, parameters = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            parameters.add(id(leaf))
        todo.extend(following for following, _ in node.next_functions)
    return parameters


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor. All processes must call it if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, the sharded ones gathered on the CPU of the first process and left out in the others."""
    full: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor.detach())
        if not isinstance(tensor, DTensor):
            full[name] = value
        elif processes.rank() == 0:
            full[name] = value.cpu()
    return full


def shard_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return `value`, the same in all processes, sharded as `tensor` is and on its device."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
