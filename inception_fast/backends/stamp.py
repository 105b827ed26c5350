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
LANES = 509  # sums of a tensor that counts no versions: a prime, so that rows that changed places change them


class Stamp:
    """A tensor's memory, how it lies there, and its version counter.

    For what the counter does not see (`.data`, NumPy views), also a sample of its values: every element of a CPU tensor
    of up to 4096, 64 spread over a larger one, none on another device. A tensor made in inference mode counts no
    versions, so every value of it is read each time, into 509 sums. The memory is watched, not the tensor: torch swaps
    no parameter that something refers to weakly (`torch.__future__.set_swap_module_params_on_conversion`).
    """

    __slots__ = ("_address", "_sample", "_shape", "_storage", "_stride", "_version", "_view")

    def __init__(self, tensor: Tensor, on_death: Callable[[Any], None] | None = None) -> None:
        self._storage = weakref.ref(tensor.untyped_storage(), on_death)
        self._address, self._stride, self._shape = tensor.data_ptr(), tensor.stride(), tensor.shape
        self._version = None if tensor.is_inference() else tensor._version
        self._view = _viewed(tensor) if tensor.device.type == "cpu" else None
        self._sample = self._look()

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was stamped, unchanged."""
        return (
            self._storage() is tensor.untyped_storage()
            and (None if tensor.is_inference() else tensor._version) == self._version
            and tensor.data_ptr() == self._address
            and tensor.stride() == self._stride
            and tensor.shape == self._shape
            and (self._view is None or self._look() == self._sample)
        )

    def _look(self) -> bytes | None:
        view = self._view
        return None if view is None else _sums(view) if view.dtype == np.uint8 else view.tobytes()


def _viewed(tensor: Tensor) -> np.ndarray:
    """What is looked at of a dense tensor, where it lies: bytes if all of them are to be summed, else elements. Keeps
    no memory alive, so it is read where the tensor is known to be there."""
    size, count = tensor.element_size(), tensor.numel()
    memory = memoryview((ctypes.c_char * (count * size)).from_address(tensor.data_ptr()))
    if count > WHOLE and tensor.is_inference():
        return np.ndarray((count * size,), np.uint8, memory)
    return np.ndarray((count,), f"V{size}", memory)[:: 1 if count <= WHOLE else count // SAMPLE | 1]


def _sums(memory: np.ndarray) -> bytes:
    """Of 64-bit words, every 509th in a sum, and what is left over as it is."""
    words = memory[: memory.size // 8 * 8].view(np.uint64)
    rows = words[: words.size // LANES * LANES].reshape(-1, LANES)
    return b"".join(part.tobytes() for part in (rows.sum(0), words[rows.size :], memory[words.nbytes :]))


def as_array(tensor: Tensor) -> np.ndarray:
    """The values where they lie; after torch's own `.numpy()` their storage could not be resized, as FSDP does."""
    return np.from_dlpack(tensor.detach())


def can_stamp(tensor: Tensor) -> bool:
    """Of inference tensors, which count no versions, those whose values the CPU can look at; other classes may hold no
    values, and with holes there is no flat view."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return plain and dense and (tensor.device.type == "cpu" or not tensor.is_inference())
