"""What needs no sum over a window: element-wise steps, the entry of a caller's tensor, and the two normalisations.

Each computes in float32 and rounds once, at the store. Maps are [n, h, w, c] with a pitch; parameters are float32 [c].
"""

import triton
import triton.language as tl

from .tile import rectified


@triton.jit
def eltwise_kernel(
    x_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, rows, c, blocks, x_pitch, residual_pitch, y_pitch, residual_scale,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = act(residual + residual_scale * (scale * x + shift)), each part optional."""
    block, start = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, k = start * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (m < rows)[:, None] & (k < c)[None, :]
    y = tl.load(x_ptr + (m * x_pitch)[:, None] + k[None, :], mask=ok, other=0.0).to(tl.float32)
    if SCALE:
        y *= tl.load(scale_ptr + k, mask=k < c, other=0.0)[None, :]
    if SHIFT:
        y += tl.load(shift_ptr + k, mask=k < c, other=0.0)[None, :]
    if RESIDUAL:
        old = tl.load(residual_ptr + (m * residual_pitch)[:, None] + k[None, :], mask=ok, other=0.0)
        y = old.to(tl.float32) + residual_scale * y
    if RELU:
        y = rectified(y)
    tl.store(y_ptr + (m * y_pitch)[:, None] + k[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def import_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, rows, h, w, c, blocks, stride_n, stride_c, stride_y, stride_x, y_pitch,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = scale * x + shift from [n, c, h, w] of any strides, uint8 or floating."""
    block, start = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, k = start * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (m < rows)[:, None] & (k < c)[None, :]
    at = (m // w // h) * stride_n + (m // w % h) * stride_y + (m % w) * stride_x
    y = tl.load(x_ptr + at[:, None] + (k.to(tl.int64) * stride_c)[None, :], mask=ok, other=0).to(tl.float32)
    if SCALE:
        y *= tl.load(scale_ptr + k, mask=k < c, other=0.0)[None, :]
    if SHIFT:
        y += tl.load(shift_ptr + k, mask=k < c, other=0.0)[None, :]
    tl.store(y_ptr + (m * y_pitch)[:, None] + k[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def lrn_kernel(
    x_ptr, y_ptr, rows, c, blocks, x_pitch, y_pitch, alpha, beta, k0,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x / (k0 + alpha / SIZE * sum of x^2 over SIZE channels around each) ** beta."""
    block, start = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, k = start * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = x_ptr + (m * x_pitch)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(SIZE):
        near = k + i - SIZE // 2
        ok = (m < rows)[:, None] & ((near >= 0) & (near < c))[None, :]
        x = tl.load(row + near[None, :], mask=ok, other=0.0).to(tl.float32)
        squares += x * x
    ok = (m < rows)[:, None] & (k < c)[None, :]
    x = tl.load(row + k[None, :], mask=ok, other=0.0).to(tl.float32)
    y = x * tl.exp2(-beta * tl.log2(k0 + (alpha / SIZE) * squares))
    tl.store(y_ptr + (m * y_pitch)[:, None] + k[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def normalize_kernel(x_ptr, y_ptr, c, x_pitch, y_pitch, eps, BLOCK_N: tl.constexpr):
    """y = x / max(||x||_2, eps), the norm over the channels of a pixel; a pixel a program."""
    m = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, c, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + m * x_pitch + k, mask=k < c, other=0.0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 0)), eps, propagate_nan=tl.PropagateNan.ALL)
    for start in range(0, c, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + m * x_pitch + k, mask=k < c, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * y_pitch + k, (x * inverse).to(y_ptr.dtype.element_ty), mask=k < c)
