"""What is computed once on a GPU and kept from call to call, on whatever streams the calls are.

Who computes it orders nothing but its own stream. Another stream waits for it once, and the allocator is told that it
reads it, before memory that is given up serves others. A CUDA graph that is being captured has values of its own, made
each time it runs: what they are made of may change between its replays, and what is kept is given up when it does.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

V = TypeVar("V")


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device becomes a part of a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Shared(Generic[V]):
    """A value, and the streams that come behind its making, which the current one was given."""

    def __init__(self, value: V, device: torch.device) -> None:
        self.value, self.device = value, device
        self._streams = set[int]()
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self._made = stream.record_event()
            self._streams.add(stream.cuda_stream)

    def follow(self) -> None:
        """Orders the current stream behind the making, and its reading before the memory is anybody else's."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream in self._streams:
            return
        stream.wait_event(self._made)
        for leaf in pytree.tree_leaves(self.value):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)
        self._streams.add(stream.cuda_stream)
