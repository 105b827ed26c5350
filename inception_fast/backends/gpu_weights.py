"""Packed weights that the GPU backends keep from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .native_cpu import PlanCache
from .stamp import can_stamp
from .streams import Shared, capturing

W = TypeVar("W")  # a tuple with `packed_bytes`


class Packs(Generic[W]):
    """What was packed of tensors, while these live and are as they were."""

    def __init__(self) -> None:
        self._kept = PlanCache()

    def get(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], device: torch.device, pack: Callable[[], W]) -> W:
        """What `pack` makes of the tensors, or made in an earlier call with this key, for the current stream."""
        if capturing(device):
            return pack()
        found: Any = self._kept.get(key, tensors)
        if found is not None:
            found.compiled.follow()
            return found.compiled.value  # type: ignore[no-any-return]
        made = _Packed(pack(), device)
        if all(map(can_stamp, tensors)):
            self._kept.put(key, tensors, _Entry(made))  # type: ignore[arg-type]
        return made.value


class _Packed(Shared[W]):
    @property
    def packed_bytes(self) -> int:
        return int(self.value.packed_bytes)  # type: ignore[attr-defined]


class _Entry(NamedTuple):
    compiled: _Packed[Any]
