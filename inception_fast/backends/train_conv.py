"""A convolution in training, and the gradient of its x, by the native kernels' tiles: float32 maps in channels_last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.spec import ConvSpec
from .pitch import pixel_pitch

Tile = tuple[int, int]
LARGEST = 2**20  # of a size: the kernels count in 32 bits


def reasons(x: Tensor, weight: Tensor) -> list[str]:
    """Why the native kernels cannot take a map and a weight; empty when they can."""
    found = [
        f"{name} of dtype {t.dtype}; the tiles are for float32"
        for name, t in (("x", x), ("weight", weight))
        if t.dtype is not torch.float32
    ]
    n, c, h, w = x.shape
    # With one channel or one pixel a layout is not to be told from strides.
    if c == 1 or h * w == 1 or pixel_pitch(x) is None:
        found.append("x of another layout than channels_last")
    if not 0 < max(n, c, h, w, weight.shape[0]) < LARGEST or n == 0:
        found.append(f"x of shape {tuple(x.shape)}; the kernels take sizes from 1 to {LARGEST - 1}")
    return found


def forward_tile(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], every: bool) -> Tile:
    """The tile that pays for conv2d(x, weight), or (0, 0)."""
    n, c, h, w = x.shape
    oc, _, kh, kw = weight.shape
    return _tile((n, h, w, c, oc, kh, kw), stride, padding, every)


def gradient_tile(grad: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], every: bool) -> Tile:
    """The tile that pays for the gradient of x, or (0, 0)."""
    n, oc, oh, ow = grad.shape
    _, c, kh, kw = weight.shape
    return _tile((n, oh, ow, oc, c, kh, kw), stride, _turned(padding, kh, kw), every)


def _tile(sizes: tuple[int, ...], stride: Sequence[int], padding: Sequence[int], every: bool) -> Tile:
    if tuple(stride) != (1, 1) or min(padding) < 0:
        return cpu.DIRECT
    top, left = padding
    return cpu.training_tile(ConvSpec(*sizes, padding=(top, top, left, left)), every)


def _turned(padding: Sequence[int], kh: int, kw: int) -> tuple[int, int]:
    return kh - 1 - padding[0], kw - 1 - padding[1]


def convolve(x: Tensor, weight: Tensor, padding: Sequence[int], tile: Tile) -> Tensor:
    """conv2d(x, weight) at stride 1, in channels_last."""
    column, channel, row, tap = weight.stride()
    return _run(x, weight.shape, padding, tile, weight.data_ptr(), (column, channel, row, tap))


def input_gradient(grad: Tensor, weight: Tensor, padding: Sequence[int], tile: Tile) -> Tensor:
    """The gradient of x of y = conv2d(x, weight) at stride 1: grad with the kernel turned round."""
    oc, c, kh, kw = weight.shape
    column, channel, row, tap = weight.stride()
    last = weight.data_ptr() + weight.element_size() * ((kh - 1) * row + (kw - 1) * tap)
    return _run(grad, (c, oc, kh, kw), _turned(padding, kh, kw), tile, last, (channel, column, -row, -tap))


def _run(
    x: Tensor,
    kernel: Sequence[int],
    padding: Sequence[int],
    tile: Tile,
    weight: int,
    strides: tuple[int, int, int, int],
) -> Tensor:
    n, c, h, w = x.shape
    oc, _, kh, kw = kernel
    top, left = padding
    oh, ow = h + 2 * top - kh + 1, w + 2 * left - kw + 1
    pitch = pixel_pitch(x)
    assert pitch is not None
    y = torch.empty((n, oc, oh, ow), dtype=torch.float32, memory_format=torch.channels_last)
    cpu.convolve_in_training(
        cpu.default_tier(),
        (n, h, w, c, oc, kh, kw, oh, ow),
        (top, left),
        tile,
        ((x.data_ptr(), pitch), (y.data_ptr(), oc)),
        weight,
        strides,
        torch.get_num_threads(),
    )
    return y
