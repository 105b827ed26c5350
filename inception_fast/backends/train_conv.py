"""A convolution in training, and the gradient of its x, by the native kernels: maps in channels_last by tiles, bfloat16
ones also by direct sums, whose float32 weights are rounded while they are packed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.cpu.winograd import TILES
from ..kernels.spec import ConvSpec
from .batch_norm import NATIVE
from .pitch import even_pitch

Two = tuple[int, int]
Four = tuple[int, int, int, int]
LARGEST = 2**20  # of a size: the kernels count in 32 bits


class Call(NamedTuple):
    """What a call is but for its pointers; `pitch`: of the pixels of x."""

    spec: ConvSpec
    tile: Two
    pitch: int


def forward(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], every: bool) -> Tensor | None:
    """conv2d(x, weight) in channels_last, or None where no kernel can or pays.

    `every`: in float32 by any tile, not by the exact one alone.
    """
    if weight.dtype is not torch.float32 or not _is_served(x.dtype, weight):
        return None
    call = chosen(x.dtype, x.shape, x.stride(), weight.shape, stride, padding, every)
    return None if call is None else _run(x, call, weight.data_ptr(), weight.stride())


def backward(grad: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], every: bool) -> Tensor | None:
    """The gradient of x of y = conv2d(x, weight): `grad` convolved with the kernel turned round."""
    if weight.dtype is not torch.float32 or not _is_served(grad.dtype, weight) or tuple(stride) != (1, 1):
        return None
    oc, c, kh, kw = weight.shape
    turned = kh - 1 - padding[0], kw - 1 - padding[1]
    call = chosen(grad.dtype, grad.shape, grad.stride(), (c, oc, kh, kw), stride, turned, every)
    if call is None:
        return None
    column, channel, row, tap = weight.stride()
    last = weight.data_ptr() + weight.element_size() * ((kh - 1) * row + (kw - 1) * tap)
    return _run(grad, call, last, (channel, column, -row, -tap))


def _is_served(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether there is any kernel for such a map and a kernel of this size."""
    return dtype is torch.bfloat16 or (dtype is torch.float32 and tuple(weight.shape[2:]) in TILES)


def chosen(
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    every: bool,
) -> Call | None:
    """The call for an x of such a dtype, shape and strides, kept; None where no kernel can or pays."""
    parts = (tuple(shape), tuple(strides), tuple(kernel), tuple(stride), tuple(padding))
    return _chosen(NATIVE[dtype], *parts, every, cpu.default_tier())


@functools.lru_cache(maxsize=4096)
def _chosen(
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: Two,
    padding: tuple[int, ...],
    every: bool,
    tier: str,
) -> Call | None:
    (n, c, h, w), (oc, channels, kh, kw), (top, left) = shape, kernel, padding
    pitch = even_pitch(shape, strides)
    sized = min(n, oc) > 0 and max(n, c, h, w, oc) < LARGEST and min(padding) >= 0
    fits = channels == c and h + 2 * top >= kh and w + 2 * left >= kw
    if pitch is None or not (sized and fits):
        return None
    # Of one channel or one pixel, where channels_last is not to be told from strides, nothing pays.
    spec = ConvSpec(n, h, w, c, oc, kh, kw, stride, (top, top, left, left), dtype=dtype)
    tile = cpu.training_tile(spec, every, tier)
    pays = any(tile) or (dtype == "bfloat16" and cpu.trains_directly(spec, tier))
    return Call(spec, tile, pitch) if pays else None


def _run(x: Tensor, call: Call, weight: int, strides: Sequence[int]) -> Tensor:
    spec = call.spec
    y = torch.empty((spec.n, spec.oc, spec.oh, spec.ow), dtype=x.dtype, memory_format=torch.channels_last, device="cpu")
    column, channel, row, tap = strides
    cpu.convolve_in_training(
        cpu.default_tier(),
        spec.dtype,
        (spec.n, spec.h, spec.w, spec.c, spec.oc, spec.kh, spec.kw, spec.oh, spec.ow),
        spec.stride,
        (spec.padding[0], spec.padding[2]),
        call.tile,
        ((x.data_ptr(), call.pitch), (y.data_ptr(), spec.oc)),
        weight,
        (column, channel, row, tap),
        torch.get_num_threads(),
    )
    return y
