"""The weight gradient of a convolution by the native kernels, for float32 and bfloat16 maps in channels_last.

A direct sum, or at stride 1 Winograd's tiles where these pay.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.spec import ConvSpec
from .batch_norm import NATIVE
from .pitch import pixel_pitch

LEAST_CHANNELS = 16  # of x: with fewer, most of a vector would be padding
# Of all images: on larger maps torch's kernels are as fast or faster.
MOST_PIXELS = {torch.float32: 4096, torch.bfloat16: 20_000}


def reasons(grad: Tensor, x: Tensor) -> list[str]:
    """Why the native kernels cannot take these maps; empty when they can."""
    found = [] if x.dtype in NATIVE else [f"dtype {x.dtype}; the CPU kernels take float32 and bfloat16"]
    found += [] if grad.dtype is x.dtype else [f"a gradient of dtype {grad.dtype} for a map of {x.dtype}"]
    found += [
        f"{name} of another layout than channels_last" for name, t in (("x", x), ("grad", grad)) if not pixel_pitch(t)
    ]
    if grad.numel() == 0:
        found.append("an empty map")
    if x.shape[1] < LEAST_CHANNELS:
        found.append(f"{x.shape[1]} channels; the kernels are for {LEAST_CHANNELS} or more")
    return found


def pays(grad: Tensor) -> bool:
    """Whether the direct native kernels are faster than torch's: on small maps."""
    return grad.numel() // grad.shape[1] <= MOST_PIXELS[grad.dtype]


def where_it_pays(
    grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], every: bool
) -> Tensor | None:
    """`weight_gradient`, or None where torch's is as fast; `every`: in float32 by any tile, not the exact one alone."""
    if reasons(grad, x):
        return None
    tile = cpu.DIRECT
    if tuple(stride) == (1, 1):
        sizes = tuple(x.shape), grad.shape[1], tuple(kernel), tuple(padding)
        tile = _tile(NATIVE[x.dtype], *sizes, every, cpu.default_tier())
    if tile == cpu.DIRECT and not pays(grad):
        return None
    return weight_gradient(grad, x, kernel, stride, padding, tile)


@functools.lru_cache(maxsize=4096)
def _tile(
    dtype: str,
    shape: tuple[int, ...],
    oc: int,
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    every: bool,
    tier: str,
) -> tuple[int, int]:
    (n, c, h, w), (kh, kw), (top, left) = shape, kernel, padding
    spec = ConvSpec(n, h, w, c, oc, kh, kw, padding=(top, top, left, left), dtype=dtype)
    return cpu.gradient_tile(spec, every, tier)


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    tile: tuple[int, int] = cpu.DIRECT,
) -> Tensor:
    """float32 [oc, c, kh, kw] in channels_last, of y = conv2d(x, weight, None, stride, padding); by a tile if named."""
    n, c, h, w = x.shape
    _, oc, oh, ow = grad.shape
    kh, kw = kernel
    x_pitch, grad_pitch = pixel_pitch(x), pixel_pitch(grad)
    assert x_pitch is not None and grad_pitch is not None
    dw = torch.empty((oc, c, kh, kw), dtype=torch.float32, memory_format=torch.channels_last, device="cpu")
    cpu.conv_weight_gradient(
        cpu.default_tier(),
        NATIVE[x.dtype],
        (n, h, w, c, oc, kh, kw, oh, ow),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        tile,
        ((x.data_ptr(), x_pitch), (grad.data_ptr(), grad_pitch)),
        dw.data_ptr(),
        torch.get_num_threads(),
    )
    return dw
