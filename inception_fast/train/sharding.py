"""FSDP2: weights, gradients and the optimizer's memory shared out over the processes, gathered layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import World, share_statistics


def share_out(model: nn.Module, world: World, batch_norm: str) -> nn.Module:
    """Shards every child of `model` that has weights, then what is left. Returns the model.

    Raises:
        ValueError: one process alone, or statistics that would differ between the processes.
    """
    from torch.distributed.fsdp import fully_shard

    if world.size == 1:
        raise ValueError("sharding over one process; allowed: two or more, started by torchrun")
    if batch_norm == "local":
        raise ValueError("batch_norm 'local' with sharding; allowed: sync, frozen")
    if batch_norm == "sync":
        share_statistics(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    mesh = torch.distributed.init_device_mesh(world.device.type, (world.size,))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must call this, in the same order."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def local(tensor: Tensor) -> Tensor:
    """The part of it that this process holds, the very memory."""
    if not _is_shared(tensor):
        return tensor
    return tensor.detach().to_local()  # type: ignore[attr-defined, no-any-return]


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole `value` shared out as `target` is, without a word between the processes."""
    if not _is_shared(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    place = value.to(target.device)
    return distribute_tensor(place, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]
