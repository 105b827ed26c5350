"""An asymmetric pair as one launch: a = act1(scale1 * conv(x, w1) + shift1), y = act2(scale2 * conv(a, w2) + shift2).

Stride 1, SAME. x [n, h, w, c], a [n, h, w, mid] in `middle`, y [n, h, w, oc], each with a pitch; weights as
in `conv`.
Numbers are those of two convolutions: the intermediate is rounded to its dtype once, sums are float32.

The second kernel reaches along one axis only, so a program that owns that axis whole needs no other program's results:
it writes the intermediate of STRIP columns (or rows) to memory, which stays in its L2 slice, waits for its own threads
and reads it back. One launch in place of two, at the price of a strip's worth of programs: it can win where batches are
large, and never at batch 1.
"""

import triton
import triton.language as tl

from .tile import multiplied, store_tile


@triton.jit
def strip_conv(
    x_ptr, w_ptr, scale_ptr, shift_ptr, y_ptr, image, first, h, w, c, oc, x_pitch, w_pitch, y_pitch,
    KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One convolution of the pixels in STRIP columns (COLUMNS) or rows from `first` of an image."""
    pixels = (h if COLUMNS else w) * STRIP
    channels = tl.cdiv(c, BLOCK_K)
    blocks = tl.cdiv(oc, BLOCK_N)
    for tile in range(tl.cdiv(pixels, BLOCK_M) * blocks):
        lane = (tile // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = (tile % blocks) * BLOCK_N
        if COLUMNS:
            y, x = lane // STRIP, first + lane % STRIP
        else:
            y, x = first + lane // w, lane % w
        ok = (lane < pixels) & (y < h) & (x < w)
        m = (image * h + y) * w + x
        k_out = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(KH * KW * channels):
            tap, k = step // channels, (step % channels) * BLOCK_K + tl.arange(0, BLOCK_K)
            down, right = tap // KW - KH // 2, tap % KW - KW // 2
            seen = ok & (y + down >= 0) & (y + down < h) & (x + right >= 0) & (x + right < w)
            at = (m + down * w + right).to(tl.int64) * x_pitch
            a = tl.load(x_ptr + at[:, None] + k[None, :], mask=seen[:, None] & (k < c)[None, :], other=0.0)
            rows = (tap * c + k).to(tl.int64) * w_pitch
            b = tl.load(
                w_ptr + rows[:, None] + k_out[None, :], mask=(k < c)[:, None] & (k_out < oc)[None, :], other=0.0
            )
            acc = multiplied(a, b, acc, PRECISION, UPCAST)
        store_tile(
            acc, m, ok, column, oc - column, RELU, column, y_pitch, scale_ptr, shift_ptr,
            y_ptr, 0, 1.0, y_ptr, False, BLOCK_N,
        )  # fmt: skip


@triton.jit
def pair_kernel(
    x_ptr, w1_ptr, scale1_ptr, shift1_ptr, middle_ptr, w2_ptr, scale2_ptr, shift2_ptr, y_ptr,
    h, w, c, mid, oc, strips, x_pitch, w1_pitch, middle_pitch, w2_pitch, y_pitch,
    KH1: tl.constexpr, KW1: tl.constexpr, KH2: tl.constexpr, KW2: tl.constexpr, STRIP: tl.constexpr,
    RELU1: tl.constexpr, RELU2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A strip of an image a program, whole along the axis that the second kernel reaches over."""
    COLUMNS: tl.constexpr = KH2 > 1
    image, first = (tl.program_id(0) // strips).to(tl.int64), (tl.program_id(0) % strips) * STRIP
    strip_conv(
        x_ptr, w1_ptr, scale1_ptr, shift1_ptr, middle_ptr, image, first, h, w, c, mid, x_pitch, w1_pitch, middle_pitch,
        KH1, KW1, COLUMNS, STRIP, RELU1, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()  # this program's stores come before its loads below; no other program's are read
    strip_conv(
        middle_ptr, w2_ptr, scale2_ptr, shift2_ptr, y_ptr, image, first, h, w, mid, oc, middle_pitch, w2_pitch, y_pitch,
        KH2, KW2, COLUMNS, STRIP, RELU2, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
