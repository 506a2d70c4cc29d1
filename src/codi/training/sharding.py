"""Weights that train, their gradients and the optimiser's state split over the processes: PyTorch's FSDP2, fully_shard.

A parameter so split is a DTensor, of which each process has a share of the rows. A block is put together when it is
called, what stands outside of all blocks for a whole batch; gradients are averaged and split as they come. What does
not train stays whole, the moving average with it: some batches call these networks more often than others.
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
    """`job` with the parameters of `online` that train split over all processes, in place. Raises UserError where
    PyTorch cannot leave the others whole."""

    def __init__(self, job: nn.Module, online: nn.Module, device: torch.device) -> None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError(f"shard: PyTorch {torch.__version__} cannot leave out what does not train: update PyTorch")
        self.job, self.uses = job, dict[str, float]()  # batches of an update that a parameter outside of blocks served
        kept = {id(p): p for p in job.parameters()}
        for trained in (p for p in online.parameters() if p.requires_grad):
            del kept[id(trained)]
        mesh = init_device_mesh(device.type, (processes.count(),))
        for block in blocks(online):
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=set(kept.values()))
        fully_shard(job, mesh=mesh, ignored_params=set(kept.values()))

    def reach_all(self, loss: Tensor) -> Tensor:
        """The loss of one batch. All processes must bring gradients of the same parameters, so those outside of blocks
        that this batch did not use (guidance's input, in a batch without) get zeros."""
        reached = _leaves(loss)
        loose = {n: p for n, p in self.job.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
        for name, parameter in loose.items():
            self.uses[name] = self.uses.get(name, 0.0) + (id(parameter) in reached)
        missed = [0.0 * p.sum() for p in loose.values() if id(p) not in reached]
        return loss + torch.stack(missed).sum() if missed else loss

    def forget_unused(self) -> None:
        """Takes those zeros away where no batch of the update had a gradient: as in one process, the optimiser then
        leaves the parameter alone."""
        for name, uses in processes.total(self.uses).items():
            if not uses:
                self.job.get_parameter(name).grad = None
        self.uses.clear()


def blocks(online: nn.Module) -> list[nn.Module]:
    """What is put together at a time: the blocks of the student's backbone, and of an adapter's copies of it."""
    names = online.kind.sharded_blocks() if isinstance(online, Student) else StableDiffusion.block_classes
    return [module for module in online.modules() if type(module).__name__ in names]


def _leaves(loss: Tensor) -> set[int]:
    """Which parameters `loss` depends on."""
    seen, todo, found = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        todo.extend(following for following, _ in node.next_functions)
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is split, all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, but those that are split are whole on the CPU of the first process, and not in the others'."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if not isinstance(tensor, DTensor):
            made[name] = value
        elif processes.rank() == 0:
            made[name] = value.cpu()
    return made


def split_like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value` split as `tensor` is, on its device; all processes bring the same."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
