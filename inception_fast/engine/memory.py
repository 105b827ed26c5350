"""Places buffers in one arena by when they live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.plan import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `bytes` that is in use from step `first` to step `last`, both included."""

    bytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def place(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Byte offsets such that buffers alive at one time never overlap, and the bytes needed in all.

    The largest go first, each into the tightest gap that its living neighbours leave.
    """
    positions = [0] * len(lifetimes)
    placed: list[int] = []
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, lifetimes[i].first)):
        taken = sorted(
            (positions[j], positions[j] + aligned(lifetimes[j].bytes))
            for j in placed
            if lifetimes[i].meets(lifetimes[j])
        )
        positions[i] = _gap(taken, aligned(lifetimes[i].bytes))
        placed.append(i)
    total = max((p + aligned(life.bytes) for p, life in zip(positions, lifetimes, strict=True)), default=0)
    return positions, total


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _gap(taken: list[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size` between sorted ranges, else the end of the last."""
    best, width, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < width):
            best, width = end, gap
        end = max(end, stop)
    return end if best < 0 else best
