"""y = act(scale * conv(a, w) + shift) with a = before_scale * x + before_shift, for an x of a few channels.

x is [n, c, h, w] of any strides, uint8 or floating: images as they come, so that reading, normalising and the first
convolution are one pass. w [kh * kw * c, oc], a row every w_pitch; y [n, oh, ow, oc], a pixel every y_pitch.

a is computed in float32 and rounded once to w's dtype, as a tensor of normalised images would be; the padding is zero
after the normalisation. Sums are float32, rounded once at the store.

Taps and channels are one axis here: three channels alone would leave a tensor core nine tenths idle.

1. A program owns BOX_H rows of BOX_W output pixels of an image, and BLOCK_N columns.
2. It loads a with pixels on the axis PIXELS, from which the compiler takes lanes where neither axis is contiguous, so
   that a warp's lanes are neighbours in an image's row: the other way round they would be taps, each in a line of its
   own. Of [BLOCK_K, pixels] the product turns a.
3. An address is one sum of a pixel's and a tap's; taps are only tested against the map where there is padding. With
   the walk UNROLLED taps are constants.
"""

import triton
import triton.language as tl

from .tile import multiplied, store_tile


@triton.jit
def stem_kernel(
    x_ptr, before_scale_ptr, before_shift_ptr, w_ptr, scale_ptr, shift_ptr, y_ptr,
    h, w, oh, ow, oc, blocks, stride_n, stride_c, stride_y, stride_x, w_pitch, y_pitch,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, PADDED: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    UNROLLED: tl.constexpr, PIXELS: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """PADDED: taps may fall outside."""
    BLOCK_M: tl.constexpr = BOX_H * BOX_W
    TAPS: tl.constexpr = 1 - PIXELS
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    across, down = tl.cdiv(ow, BOX_W), tl.cdiv(oh, BOX_H)
    image = (tile // (across * down)).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    y, x = (tile // across) % down * BOX_H + lane // BOX_W, tile % across * BOX_W + lane % BOX_W
    m_ok = (y < oh) & (x < ow)
    top, left = y * STRIDE_H - PAD_TOP, x * STRIDE_W - PAD_LEFT
    x_ptr += image * stride_n
    pixel = top.to(tl.int64) * stride_y + left.to(tl.int64) * stride_x
    column = block * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.cdiv(KH * KW * C, BLOCK_K), loop_unroll_factor=UNROLLED):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap, channel = k // C, k % C
        r, s, k_ok = tap // KW, tap % KW, k < KH * KW * C
        # [BLOCK_K, BLOCK_M], or turned: taps spread along PIXELS, pixels along TAPS.
        ok = tl.expand_dims(k_ok, PIXELS) & tl.expand_dims(m_ok, TAPS)
        if PADDED:
            rows = tl.expand_dims(r, PIXELS) + tl.expand_dims(top, TAPS)
            across_row = tl.expand_dims(s, PIXELS) + tl.expand_dims(left, TAPS)
            ok = ok & (rows >= 0) & (rows < h) & (across_row >= 0) & (across_row < w)
        at = channel.to(tl.int64) * stride_c + r.to(tl.int64) * stride_y + s.to(tl.int64) * stride_x
        offset = tl.expand_dims(at, PIXELS) + tl.expand_dims(pixel, TAPS)
        a = tl.load(x_ptr + offset, mask=ok, other=0).to(tl.float32)
        if AFFINE:
            before_scale = tl.load(before_scale_ptr + channel, mask=k_ok, other=0.0)
            before_shift = tl.load(before_shift_ptr + channel, mask=k_ok, other=0.0)
            a = a * tl.expand_dims(before_scale, PIXELS) + tl.expand_dims(before_shift, PIXELS)
            if PADDED:
                a = tl.where(ok, a, 0.0)
        w_ok = k_ok[:, None] & (column + columns < oc)[None, :]
        b = tl.load(w_ptr + (k * w_pitch)[:, None] + (column + columns)[None, :], mask=w_ok, other=0.0)
        a = a.to(w_ptr.dtype.element_ty)
        acc = multiplied(tl.trans(a) if PIXELS else a, b, acc, PRECISION, UPCAST)
    m = (image * oh + y) * ow + x
    store_tile(
        acc, m, m_ok, column, oc - column, RELU, column, y_pitch, scale_ptr, shift_ptr,
        y_ptr, 0, 1.0, y_ptr, False, BLOCK_N,
    )  # fmt: skip
