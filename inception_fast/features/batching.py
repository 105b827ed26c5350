"""How a stream of images is cut into calls of a plan, and how a network is told from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

LARGEST_BATCH = 32  # images in one call of a plan: memory does not follow the caller's batch


def batches(count: int) -> list[int]:
    """`count` images as calls of LARGEST_BATCH and then powers of two, so that any counts need few plans in all."""
    sizes = [LARGEST_BATCH] * (count // LARGEST_BATCH)
    rest = count % LARGEST_BATCH
    return sizes + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def fingerprint(net: nn.Module) -> str:
    """A digest of the names and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
