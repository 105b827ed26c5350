"""Knows whether tensors still hold what they held when something was derived from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = 64  # elements looked at again in a large tensor
WHOLE = 4096  # a tensor of up to this many elements is compared whole


class Stamp:
    """A tensor's identity, address and version counter.

    For what the counter does not see (`.data`, NumPy views), also a sample of its values: every element of a CPU tensor
    of up to 4096, 64 spread over a larger one, none on another device.
    """

    __slots__ = ("_address", "_sample", "_tensor", "_version", "_view")

    def __init__(self, tensor: Tensor, on_death: Callable[[Any], None] | None = None) -> None:
        self._tensor = weakref.ref(tensor, on_death)
        self._address = tensor.data_ptr()
        self._version = tensor._version
        self._view = None
        if tensor.device.type == "cpu":
            elements = tensor.detach().as_strided((tensor.numel(),), (1,))
            step = 1 if tensor.numel() <= WHOLE else tensor.numel() // SAMPLE | 1
            self._view = as_array(elements[::step].view(torch.uint8 if step == 1 else _integer(tensor)))
            self._sample = self._view.tobytes()

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the stamped one, unchanged."""
        return (
            self._tensor() is tensor
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
            and (self._view is None or self._view.tobytes() == self._sample)
        )


def _integer(tensor: Tensor) -> torch.dtype:
    """The integer dtype as wide as the tensor's: NumPy has no bfloat16."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def as_array(tensor: Tensor) -> np.ndarray:
    """The values where they lie; after torch's own `.numpy()` their storage could not be resized, as FSDP does."""
    return np.from_dlpack(tensor.detach())


def can_stamp(tensor: Tensor) -> bool:
    """Inference tensors count no versions, other classes may hold no values, and with holes there is no flat view."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return plain and dense and not tensor.is_inference()
