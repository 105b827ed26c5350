"""Pools in eager training on the CPU as one node of autograd each, by native kernels.

A maximum keeps a byte for each result, the place in the window, in the place of torch's x and 64-bit indices. Whatever
watches or rewrites operations is given torch's pools, and so is the second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _batch_norm, _trained_layer
from ._numbers import plain
from .backends.window import Window


def window_of(kind: str, kernel_size: Any, stride: Any, padding: Any) -> Window | None:
    """The window of a torch pool, or None for one that the kernels do not take; `stride` None is `kernel_size`."""
    sizes = [_pair(size) for size in (kernel_size, kernel_size if stride is None else stride, padding)]
    window = Window(kind, *sizes)
    return window if window.serves() else None


def _pair(size: Any) -> tuple[int, int]:
    size = plain(size)
    return (size, size) if isinstance(size, int) else tuple(size * 2)[:2]  # torch takes a list of one too


def serves(x: Tensor, window: Window) -> bool:
    """Whether `pool` may take x in place of torch's operation."""
    return (
        _trained_layer.direct()
        and torch.is_grad_enabled()
        and x.requires_grad
        and _trained_layer.is_plain(x)
        and _batch_norm.is_native(x)
        and min(window.places(*x.shape[2:])) > 0
    )


def pool(x: Tensor, window: Window) -> Tensor:
    """The pool of x, where `serves` says so."""
    y: Tensor = _TrainedPool.apply(x, window)
    return y


class _TrainedPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:  # type: ignore[override]
        from .backends import train_pool

        y, taps = train_pool.forward(x, window)
        ctx.window, ctx.size = window, x.shape[2:]
        ctx.save_for_backward(*(() if taps is None else (taps,)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (taps,) = ctx.saved_tensors or (None,)  # asked for once: a checkpoint gives them out once
        if torch.is_grad_enabled() or not (_trained_layer.is_plain_gradient(grad) and _trained_layer.direct()):
            return _in_torch(grad, taps, ctx.window, ctx.size), None
        from .backends import train_pool

        return train_pool.backward(grad, taps, ctx.window, *ctx.size), None


def _in_torch(grad: Tensor, taps: Tensor | None, window: Window, size: torch.Size) -> Tensor:
    """The gradient in torch's operations, which can be differentiated again. They read of x its shape alone."""
    n, c, oh, ow = grad.shape
    x = torch.empty((n, c, *size), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    kernel, stride, padding = (list(part) for part in window[1:])
    if taps is None:
        include = window.kind == "mean_with_padding"
        return torch.ops.aten.avg_pool2d_backward(grad, x, kernel, stride, padding, False, include, None)
    place = taps.permute(0, 3, 1, 2).long()
    row = torch.arange(oh, device=place.device).view(-1, 1) * stride[0] - padding[0] + place // kernel[1]
    column = torch.arange(ow, device=place.device) * stride[1] - padding[1] + place % kernel[1]
    indices = (row * size[1] + column).contiguous(memory_format=torch.channels_last)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    return backward(grad, x, kernel, stride, padding, [1, 1], False, indices)
