"""Pools in training by the native kernels: float32 and bfloat16 maps in channels_last."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu
from .batch_norm import NATIVE
from .pitch import pixel_pitch
from .window import Window


def forward(x: Tensor, window: Window) -> tuple[Tensor, Tensor | None]:
    """(y, for a maximum where it was in its window: uint8 [n, oh, ow, c])."""
    n, c, h, w = x.shape
    oh, ow = window.places(h, w)
    y = torch.empty((n, c, oh, ow), dtype=x.dtype, memory_format=torch.channels_last, device="cpu")
    taps = torch.empty((n, oh, ow, c), dtype=torch.uint8, device="cpu") if window.kind == "max" else None
    pitch = pixel_pitch(x)
    if pitch is None:
        x, pitch = x.contiguous(memory_format=torch.channels_last), c
    _run(x, pitch, y, taps, window, (n, h, w, c, oh, ow), False)
    return y, taps


def backward(grad: Tensor, taps: Tensor | None, window: Window, h: int, w: int) -> Tensor:
    """The gradient of x [n, c, h, w], in channels_last."""
    n, c, oh, ow = grad.shape
    taps = None if taps is None else taps.contiguous()  # hooks on saved tensors may return it in another layout
    dx = torch.empty((n, c, h, w), dtype=grad.dtype, memory_format=torch.channels_last, device="cpu")
    pitch = pixel_pitch(grad)
    if pitch is None:
        grad, pitch = grad.contiguous(memory_format=torch.channels_last), c
    _run(grad, pitch, dx, taps, window, (n, h, w, c, oh, ow), True)
    return dx


def _run(
    x: Tensor, pitch: int, y: Tensor, taps: Tensor | None, window: Window, sizes: tuple[int, ...], back: bool
) -> None:
    n, h, w, c, oh, ow = sizes
    cpu.pool_in_training(
        cpu.default_tier(),
        NATIVE[x.dtype],
        window.kind,
        back,
        (n, h, w, c, oh, ow),
        (*window.kernel, *window.stride, *window.padding),
        (x.data_ptr(), pitch),
        y.data_ptr(),
        0 if taps is None else taps.data_ptr(),
        torch.get_num_threads(),
    )
