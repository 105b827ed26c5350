"""What a pool is but for its map: plain data, for who may not load the kernels."""

from __future__ import annotations

from typing import NamedTuple

MOST_TAPS = 256  # of a window: a place in it is kept in a byte


class Window(NamedTuple):
    """A pool but for the map: `kind` is "max", "mean" or "mean_with_padding"; padding is the same on both sides."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def serves(self) -> bool:
        """Whether the kernels take such a window."""
        positive = min(*self.kernel, *self.stride) > 0 and min(self.padding) >= 0
        fits = all(2 * pad <= size for pad, size in zip(self.padding, self.kernel, strict=True))
        return positive and fits and self.kernel[0] * self.kernel[1] <= MOST_TAPS

    def places(self, h: int, w: int) -> tuple[int, int]:
        """The size of the result; below 1 where there is none."""
        steps = zip((h, w), self.kernel, self.stride, self.padding, strict=True)
        oh, ow = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in steps)
        return oh, ow
