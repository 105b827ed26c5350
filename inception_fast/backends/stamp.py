"""Knows whether tensors still hold what they held when something was derived from them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = 64  # elements looked at again in a large tensor
WHOLE = 4096  # a tensor of up to this many elements is compared whole


class Stamp:
    """A tensor's memory, how it lies there, and its version counter.

    For what the counter does not see (`.data`, NumPy views), also a sample of its values: every element of a CPU tensor
    of up to 4096, 64 spread over a larger one, none on another device. The memory is watched, not the tensor: torch
    swaps no parameter that something refers to weakly (`torch.__future__.set_swap_module_params_on_conversion`).
    """

    __slots__ = ("_address", "_sample", "_shape", "_storage", "_stride", "_version", "_view")

    def __init__(self, tensor: Tensor, on_death: Callable[[Any], None] | None = None) -> None:
        self._storage = weakref.ref(tensor.untyped_storage(), on_death)
        self._address, self._stride, self._shape = tensor.data_ptr(), tensor.stride(), tensor.shape
        self._version = tensor._version
        self._view = _sampled(tensor) if tensor.device.type == "cpu" else None
        self._sample = None if self._view is None else self._view.tobytes()

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was stamped, unchanged."""
        return (
            self._storage() is tensor.untyped_storage()
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
            and tensor.stride() == self._stride
            and tensor.shape == self._shape
            and (self._view is None or self._view.tobytes() == self._sample)
        )


def _sampled(tensor: Tensor) -> np.ndarray:
    """Elements of a dense tensor where they lie. Keeps no memory alive, so it is read where the tensor is known to be
    there."""
    size = tensor.element_size()
    memory = (ctypes.c_char * (tensor.numel() * size)).from_address(tensor.data_ptr())
    step = 1 if tensor.numel() <= WHOLE else tensor.numel() // SAMPLE | 1
    return np.ndarray((tensor.numel(),), f"V{size}", memoryview(memory))[::step]


def as_array(tensor: Tensor) -> np.ndarray:
    """The values where they lie; after torch's own `.numpy()` their storage could not be resized, as FSDP does."""
    return np.from_dlpack(tensor.detach())


def can_stamp(tensor: Tensor) -> bool:
    """Inference tensors count no versions, other classes may hold no values, and with holes there is no flat view."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return plain and dense and not tensor.is_inference()
