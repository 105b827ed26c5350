"""Weights as autocast rounds them, kept on the CPU until they change: of what is made in each call something would be
packed in each call.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .stamp import Stamp, can_stamp


class Casts:
    """weight.to(dtype), the same tensor again while the weight holds what it held; None where nothing is kept. Safe
    from any number of threads.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], tuple[Stamp, Tensor]] = {}
        self._lock = threading.RLock()  # re-entrant, as of `PlanCache`

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if watched or weight.dtype is dtype or weight.device.type != "cpu" or not can_stamp(weight):
            return None
        key = weight.data_ptr(), dtype
        kept = self._kept.get(key)
        if kept is not None and kept[0].holds(weight):
            return kept[1]

        def dropped(_: Any) -> None:
            with self._lock:
                self._kept.pop(key, None)

        stamp = Stamp(weight, dropped)
        with torch.inference_mode(False), torch.no_grad():
            cast = weight.to(dtype)
        with self._lock:
            self._kept[key] = stamp, cast
        return cast


casts = Casts()
