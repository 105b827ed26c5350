"""How far apart the pixels of a map lie, for kernels that read channels out of wider pixels."""

from __future__ import annotations

import functools

from torch import Tensor


def pixel_pitch(x: Tensor) -> int | None:
    """Elements between the pixels of x [n, c, h, w] where these follow each other evenly, channels side by side; else
    None.
    """
    return even_pitch(tuple(x.shape), x.stride())


@functools.lru_cache(maxsize=4096)
def even_pitch(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """`pixel_pitch` of a map of such a shape and such strides."""
    n, c, h, w = shape
    steps = [(1, c), (w, 1), (h, w), (n, h * w)]  # (size, pixels to its next element), of c, w, h, n
    apart = [strides[axis] for axis in (1, 3, 2, 0)]
    if c > 1 and apart[0] != 1:
        return None
    found = [stride // pixels for (size, pixels), stride in zip(steps[1:], apart[1:], strict=True) if size > 1]
    pitch = found[0] if found else c
    even = all(size == 1 or s == p * pitch for (size, p), s in zip(steps[1:], apart[1:], strict=True))
    return pitch if even and pitch >= c else None
