"""Packed weights that the GPU backends keep from call to call, on whatever streams the calls are.

Who packs weights orders nothing but its own stream. Another stream waits for them once, and the allocator is told that
it reads them, before memory that is given up serves others. A CUDA graph that is being captured packs weights of its
own each time it runs: parameters may change between its replays, and what is kept here is given up when they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .native_cpu import PlanCache
from .stamp import can_stamp

W = TypeVar("W")  # a tuple with `packed_bytes`


class Packs(Generic[W]):
    """What was packed of tensors, while these live and are as they were."""

    def __init__(self) -> None:
        self._kept = PlanCache()

    def get(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], device: torch.device, pack: Callable[[], W]) -> W:
        """What `pack` makes of the tensors, or made in an earlier call with this key, for the current stream."""
        if device.type != "cuda":
            return self._found(key, tensors, device, pack)
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
            return pack() if capturing else self._found(key, tensors, device, pack)

    def _found(
        self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], device: torch.device, pack: Callable[[], W]
    ) -> W:
        found: Any = self._kept.get(key, tensors)
        if found is not None:
            found.compiled.follow()
            return found.compiled.packed  # type: ignore[no-any-return]
        made = _Shared(pack(), device)
        if all(map(can_stamp, tensors)):
            self._kept.put(key, tensors, _Entry(made))  # type: ignore[arg-type]
        return made.packed


class _Shared(Generic[W]):
    """Packed weights, and the streams that come behind the packing."""

    def __init__(self, packed: W, device: torch.device) -> None:
        self.packed, self._device = packed, device
        self._streams = set[int]()
        if device.type == "cuda":
            self._made = torch.cuda.current_stream(device).record_event()
            self._streams.add(torch.cuda.current_stream(device).cuda_stream)

    @property
    def packed_bytes(self) -> int:
        return int(self.packed.packed_bytes)  # type: ignore[attr-defined]

    def follow(self) -> None:
        """Orders the current stream behind the packing, and its reading before the memory is anybody else's."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._streams:
            return
        stream.wait_event(self._made)
        for leaf in pytree.tree_leaves(self.packed):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)
        self._streams.add(stream.cuda_stream)


class _Entry(NamedTuple):
    compiled: _Shared[Any]
