"""Where an NHWC map lies in a tensor's memory, and what a launch is. Shared by the GPU kernels of both kinds; imports
neither.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Map(NamedTuple):
    """[n, h, w, c] at `data`, whose first element is the map's; c channels of every `pitch` elements are its own."""

    data: Tensor
    n: int
    h: int
    w: int
    c: int
    pitch: int

    @property
    def rows(self) -> int:
        return self.n * self.h * self.w

    def channels(self, offset: int, count: int) -> Map:
        """Channels [offset, offset + count)."""
        return self._replace(data=self.data[offset:], c=count)


class Launched(Protocol):
    """A kernel call with all its arguments, ready to be put on the current stream any number of times."""

    @property
    def name(self) -> str: ...

    def run(self) -> None: ...


def dense(x: Tensor) -> Map:
    """The map of a contiguous [n, h, w, c] tensor. Raises ValueError for another."""
    if x.dim() != 4 or not x.is_contiguous():
        raise ValueError(f"shape {tuple(x.shape)}, strides {x.stride()}; allowed: contiguous [n, h, w, c]")
    n, h, w, c = x.shape
    return Map(x.reshape(-1), n, h, w, c, c)
