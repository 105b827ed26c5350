"""y = act(pool(x) + shift) over NHWC memory, and the pool of a whole map.

x [n, h, w, c] and y [n, oh, ow, c] with pitches of their own; shift float32 [c]. Maxima are those of x; averages are
float32 sums divided once. The padding is minus infinity for a maximum, zero for an average; an average divides by the
elements of the map in the window, with INCLUDE_PAD by those of the padded map. NaN spreads, as in torch.
"""

import triton
import triton.language as tl

from .tile import rectified

UNROLLED = tl.constexpr(32)  # most taps of a loop without branches


@triton.jit
def pool_kernel(
    x_ptr, shift_ptr, y_ptr, n, h, w, c, oh, ow, blocks, x_pitch, y_pitch,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MAX: tl.constexpr, INCLUDE_PAD: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels by BLOCK_N channels a program, a load a tap: the overlap of windows comes from L1. A loop
    over few taps is unrolled, so that their loads are in flight together.
    """
    block, start = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if WIDE:
        start = start.to(tl.int64)
    m = start * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < n * oh * ow
    image, pixel = m // (oh * ow), m % (oh * ow)
    top, left = (pixel // ow) * STRIDE_H - TOP, (pixel % ow) * STRIDE_W - LEFT
    k = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MAX else 0.0, tl.float32)
    if KH * KW <= UNROLLED:
        for tap in tl.static_range(KH * KW):
            acc = tapped(acc, x_ptr, tap, image, top, left, m_ok, k, h, w, c, x_pitch, KW, MAX)
    else:
        for tap in range(KH * KW):
            acc = tapped(acc, x_ptr, tap, image, top, left, m_ok, k, h, w, c, x_pitch, KW, MAX)
    if not MAX:
        if INCLUDE_PAD:
            rows, columns = tl.minimum(top + KH, h + BOTTOM) - top, tl.minimum(left + KW, w + RIGHT) - left
        else:
            rows = tl.minimum(top + KH, h) - tl.maximum(top, 0)
            columns = tl.minimum(left + KW, w) - tl.maximum(left, 0)
        acc = acc / (rows * columns).to(tl.float32)[:, None]
    if SHIFT:
        acc += tl.load(shift_ptr + k, mask=k < c, other=0.0)[None, :]
    if RELU:
        acc = rectified(acc)
    y = y_ptr + (m.to(tl.int64) * y_pitch)[:, None] + k[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & (k < c)[None, :])


@triton.jit
def tapped(acc, x_ptr, tap, image, top, left, m_ok, k, h, w, c, x_pitch, KW: tl.constexpr, MAX: tl.constexpr):
    """`acc` with one tap of each window."""
    iy, ix = top + tap // KW, left + tap % KW
    ok = (m_ok & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w))[:, None] & (k < c)[None, :]
    at = ((image * h + iy) * w + ix).to(tl.int64) * x_pitch
    x = tl.load(x_ptr + at[:, None] + k[None, :], mask=ok, other=float("-inf") if MAX else 0.0).to(tl.float32)
    return tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL) if MAX else acc + x


@triton.jit
def global_pool_kernel(
    x_ptr, shift_ptr, y_ptr, pixels, c, x_pitch, y_pitch,
    MAX: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[n, pixels, c] to [n, c]: an image by BLOCK_N channels a program, BLOCK_M pixels a step, one tree at the end."""
    image = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MAX else 0.0, tl.float32)
    for start in range(0, pixels, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        ok = (pixel < pixels)[:, None] & (k < c)[None, :]
        at = (image * pixels + pixel) * x_pitch
        x = tl.load(x_ptr + at[:, None] + k[None, :], mask=ok, other=float("-inf") if MAX else 0.0).to(tl.float32)
        acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL) if MAX else acc + x
    if MAX:
        y = tl.reduce(acc, 0, larger)
    else:
        y = tl.sum(acc, 0) / pixels
    if SHIFT:
        y += tl.load(shift_ptr + k, mask=k < c, other=0.0)
    if RELU:
        y = rectified(y)
    tl.store(y_ptr + image * y_pitch + k, y.to(y_ptr.dtype.element_ty), mask=k < c)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
