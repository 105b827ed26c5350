"""Pools of swapped models in eager inference on the CPU, by the kernels of plans, past the dispatcher.

torch's maximum writes a 64-bit index beside each value, for a gradient that nobody asks for. Whatever watches or
rewrites operations is given torch's pools.
"""

from __future__ import annotations

from torch import Tensor

from . import _batch_norm, _inferred_layer
from .backends.window import Window


def serves(x: Tensor, window: Window) -> bool:
    """Whether `pool` may take x in place of torch's operation."""
    return _inferred_layer.serves(x) and _batch_norm.is_native(x) and min(window.places(*x.shape[2:])) > 0


def pool(x: Tensor, window: Window) -> Tensor:
    """The pool of x, where `serves` says so: [n, c, h, w] -> [n, c, oh, ow], in channels_last."""
    from .backends import native_cpu

    return native_cpu.pool(x, window)
