"""y = act(scale * conv(a, w) + shift) with a = before_scale * x + before_shift, for an x of a few channels.

x is [n, c, h, w] of any strides, uint8 or floating: images as they come, so that reading, normalising and the first
convolution are one pass. w [kh * kw * c, oc], a row every w_pitch; y [n, oh, ow, oc], a pixel every y_pitch.

a is computed in float32 and rounded once to w's dtype, as a tensor of normalised images would be; the padding is zero
after the normalisation. Sums are float32, rounded once at the store.

Taps and channels are one axis here: three channels alone would leave a tensor core nine tenths idle.
"""

import triton
import triton.language as tl

from .tile import multiplied, store_tile


@triton.jit
def stem_kernel(
    x_ptr, before_scale_ptr, before_shift_ptr, w_ptr, scale_ptr, shift_ptr, y_ptr,
    n, h, w, oh, ow, oc, blocks, stride_n, stride_c, stride_y, stride_x, w_pitch, y_pitch,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels by BLOCK_N columns a program."""
    block, start = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if WIDE:
        start = start.to(tl.int64)
    m = start * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < n * oh * ow
    image, pixel = (m // (oh * ow)).to(tl.int64), m % (oh * ow)
    top, left = (pixel // ow) * STRIDE_H - PAD_TOP, (pixel % ow) * STRIDE_W - PAD_LEFT
    column = block * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    dtype = w_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(KH * KW * C, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap, channel = k // C, k % C
        iy, ix = top[:, None] + (tap // KW)[None, :], left[:, None] + (tap % KW)[None, :]  # [BLOCK_M, BLOCK_K]
        ok = m_ok[:, None] & (k < KH * KW * C)[None, :] & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
        at = (image * stride_n)[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
        a = tl.load(x_ptr + at + iy.to(tl.int64) * stride_y + ix.to(tl.int64) * stride_x, mask=ok, other=0)
        a = a.to(tl.float32)
        if AFFINE:
            before_scale, before_shift = tl.load(before_scale_ptr + channel), tl.load(before_shift_ptr + channel)
            a = tl.where(ok, a * before_scale[None, :] + before_shift[None, :], 0.0)
        w_ok = (k < KH * KW * C)[:, None] & (column + lane < oc)[None, :]
        b = tl.load(w_ptr + (k * w_pitch)[:, None] + (column + lane)[None, :], mask=w_ok, other=0.0)
        acc = multiplied(a.to(dtype), b, acc, PRECISION, UPCAST)
    store_tile(
        acc, m, m_ok, column, oc - column, RELU, column, y_pitch, scale_ptr, shift_ptr,
        y_ptr, 0, 1.0, y_ptr, False, BLOCK_N,
    )  # fmt: skip
