"""y = act(residual + residual_scale * (scale * conv(x, w) + shift)) as an implicit GEMM over NHWC memory.

x [n, h, w, c], a pixel every x_pitch elements; w [taps, c, oc], a row every w_pitch; scale, shift float32 [oc];
y and residual [n, oh, ow, oc] with pitches of their own, so that they may be channel ranges of wider buffers.

Sums are float32, products those of the operands' dtype; float32 operands multiply exactly unless PRECISION is "tf32".
The result is rounded once, at the store. A split sums its parts in a fixed order, so that the bits never vary.

1. A program owns BLOCK_M output pixels and BLOCK_N output columns; neighbours share pixels, which so come from L2.
2. It walks taps, inside them channels, BLOCK_K at a time; what lies on the padding loads as zero.
3. With SPLIT > 1 the walk is shared by SPLIT programs that leave float32 parts; `finish_kernel` adds them.
4. GROUPED: sibling convolutions of one x are one launch: their columns lie side by side in w, scale and shift, and a
   table says where each goes (`tile.scatter_tile`). Where their taps differ (MIXED), another table gives each column
   block its own weights, taps and padding (`tile.FIELDS`).
5. STATS: the plain result, and in part_ptr the statistics of each of its tiles, for batch norm in training (`norm`).
6. CACHED: asynchronous copies of 16 bytes pass L1 by, those of 8 do not, and there a tap finds its neighbours' pixels.
   The compiler is not to know that x lies on 16 bytes, hence a sum with a program's second index, which is zero.
7. EXTRA: columns beside BLOCK_N that share a step's x, so that a tile may have 96, 160 or 192 columns.
"""

import triton
import triton.language as tl

from .norm import store_moments
from .tile import ROW, multiplied, put_tile, store_part, turned


@triton.jit
def conv_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, part_ptr, table_ptr, place_ptr,
    n, h, w, c, oh, ow, oc, blocks, x_pitch, w_pitch, y_pitch, residual_pitch, part_pitch, places, curved,
    residual_scale,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, PADDED: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, GROUPED: tl.constexpr, MIXED: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, STATS: tl.constexpr, CACHED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pointer form. PADDED: taps may fall outside; EVEN_C: c is whole BLOCK_Ks; WIDE: pixels need 64 bits."""
    block, start = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if WIDE:
        start, oh = start.to(tl.int64), tl.cast(oh, tl.int64)  # and with oh every product of sizes
    if MIXED:
        w_offset, w_pitch, kw, taps, pad_top, pad_left, column, columns, curved = fields(table_ptr, block)
    else:
        column = block * (BLOCK_N + EXTRA)
        w_offset, kw, taps, pad_top, pad_left = column.to(tl.int64), KW, KH * KW, PAD_TOP, PAD_LEFT
        columns, curved = oc - column, curved - column
    m = start * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < n * oh * ow
    image, pixel = m // (oh * ow), m % (oh * ow)
    top, left = (pixel // ow) * STRIDE_H - pad_top, (pixel % ow) * STRIDE_W - pad_left
    origin = (image * h + top) * w + left
    lane_ok = (tl.arange(0, BLOCK_N) < columns)[None, :]
    w_tile = w_ptr + w_offset + tl.arange(0, BLOCK_N)[None, :]
    channels, steps, part = tl.cdiv(c, BLOCK_K), taps * tl.cdiv(c, BLOCK_K), tl.program_id(1)
    if CACHED:
        x_ptr += part * 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    more = acc
    if EXTRA:
        more_ok = (tl.arange(0, EXTRA) < columns - BLOCK_N)[None, :]
        more_tile = w_ptr + w_offset + BLOCK_N + tl.arange(0, EXTRA)[None, :]
        more = tl.zeros((BLOCK_M, EXTRA), tl.float32)
    first = steps * part // SPLIT
    r, s, start_k = first // channels // kw, first // channels % kw, first % channels * BLOCK_K
    for _ in range(first, steps * (part + 1) // SPLIT):
        tap, k = r * kw + s, start_k + tl.arange(0, BLOCK_K)
        inside = (top + r >= 0) & (top + r < h) & (left + s >= 0) & (left + s < w)
        x_ok = (m_ok & inside if PADDED else m_ok)[:, None]
        x_tile = x_ptr + ((origin + r * w + s).to(tl.int64) * x_pitch)[:, None] + k[None, :]
        a = tl.load(x_tile, mask=x_ok if EVEN_C else x_ok & (k < c)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = weights(w_tile, lane_ok, tap, k, c, w_pitch, EVEN_C)  # [BLOCK_K, BLOCK_N]
        acc = multiplied(a, b, acc, PRECISION, UPCAST)
        if EXTRA:
            b = weights(more_tile, more_ok, tap, k, c, w_pitch, EVEN_C)
            more = multiplied(a, b, more, PRECISION, UPCAST)
        r, s, start_k = walked(r, s, start_k, kw, c, KH * KW == 1 and not MIXED, BLOCK_K)
    if SPLIT > 1:
        store_part(acc, m, m_ok, n * oh * ow, block, part_ptr, part_pitch, BLOCK_N)
    else:
        if STATS:
            store_moments(acc, m_ok, start, column, columns, part_ptr, part_pitch, y_ptr, BLOCK_N)
        put_tile(
            acc, more, m, m_ok, column, columns, curved, y_pitch, scale_ptr, shift_ptr, residual_ptr, residual_pitch,
            residual_scale, y_ptr, place_ptr, places, RELU, RESIDUAL, GROUPED, ALIGNED, BLOCK_N, EXTRA,
        )  # fmt: skip


@triton.jit
def walked(r, s, k, kw, c, SINGLE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The step behind that of tap (r, s) at channel k, without a division. SINGLE: there is one tap."""
    k += BLOCK_K
    if not SINGLE:
        over = k >= c
        k, s = tl.where(over, 0, k), tl.where(over, s + 1, s)
        over = s == kw
        s, r = tl.where(over, 0, s), tl.where(over, r + 1, r)
    return r, s, k


@triton.jit
def fields(table_ptr, block):
    """A column block's row of the table."""
    field = table_ptr + block * ROW
    w_offset, w_pitch = tl.multiple_of(tl.load(field), 8), tl.multiple_of(tl.load(field + 1), 8)
    kw, taps, pad_top, pad_left = tl.load(field + 2), tl.load(field + 3), tl.load(field + 4), tl.load(field + 5)
    kw, taps, pad_top, pad_left = kw.to(tl.int32), taps.to(tl.int32), pad_top.to(tl.int32), pad_left.to(tl.int32)
    column, columns = tl.multiple_of(tl.load(field + 6), 8), tl.multiple_of(tl.load(field + 7), 8)
    return w_offset, w_pitch, kw, taps, pad_top, pad_left, column, columns, tl.load(field + 8)


@triton.jit
def weights(w_tile, ok, tap, k, c, w_pitch, EVEN_C: tl.constexpr):
    """A tap's rows k of w."""
    rows = w_tile + ((tap * c + k).to(tl.int64) * w_pitch)[:, None]
    return tl.load(rows, mask=ok if EVEN_C else ok & (k < c)[:, None], other=0.0)


@triton.jit
def conv_tma_kernel(
    x_desc, w_desc, more_desc, scale_ptr, shift_ptr, residual_ptr, y_ptr, part_ptr, table_ptr, place_ptr,
    n, c, oh, ow, oc, blocks, y_pitch, residual_pitch, part_pitch, places, curved, residual_scale,
    KH: tl.constexpr, KW: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, GROUPED: tl.constexpr, MIXED: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, TURNED: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The TMA form, stride 1: one descriptor load a step brings a [BOX_N, BOX_H, BOX_W, BLOCK_K] box of x, zeros where
    it hangs over the map, which is the padding. w_desc is [taps, c, oc], so that channels beyond c are zeros as well,
    and more_desc the same in boxes of EXTRA columns. MIXED siblings have as many columns each: [taps of all, c,
    columns of one].

    A box of several rows is a matrix only after a reshape, behind which the compiler for Hopper brings a product's
    first operand to registers. TURNED: x is the second, which stays in shared memory, and the sums are [columns, rows].
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    across, down = tl.cdiv(ow, BOX_W), tl.cdiv(oh, BOX_H)
    image0, y0, x0 = (tile // (across * down)) * BOX_N, (tile // across) % down * BOX_H, tile % across * BOX_W
    if MIXED:
        w_offset, w_pitch, kw, taps, pad_top, pad_left, column, columns, curved = fields(table_ptr, block)
        tap0, w_column = (w_offset // (c * w_pitch)).to(tl.int32), (w_offset % (c * w_pitch)).to(tl.int32)
    else:
        kw, taps, pad_top, pad_left, tap0, column = KW, KH * KW, PAD_TOP, PAD_LEFT, 0, block * (BLOCK_N + EXTRA)
        columns, curved, w_column = oc - column, curved - column, column
    channels, part = tl.cdiv(c, BLOCK_K), tl.program_id(1)
    steps = taps * channels
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), tl.float32)
    more = acc
    if EXTRA:
        more = tl.zeros((EXTRA, BLOCK_M) if TURNED else (BLOCK_M, EXTRA), tl.float32)
    first = steps * part // SPLIT
    r, s, k = first // channels // kw, first // channels % kw, first % channels * BLOCK_K
    for _ in range(first, steps * (part + 1) // SPLIT):
        tap = tap0 + r * kw + s
        a = x_desc.load([image0, y0 + r - pad_top, x0 + s - pad_left, k]).reshape(BLOCK_M, BLOCK_K)
        b = w_desc.load([tap, k, w_column]).reshape(BLOCK_K, BLOCK_N)
        acc = turned(a, b, acc, PRECISION, UPCAST) if TURNED else multiplied(a, b, acc, PRECISION, UPCAST)
        if EXTRA:
            b = more_desc.load([tap, k, w_column + BLOCK_N]).reshape(BLOCK_K, EXTRA)
            more = turned(a, b, more, PRECISION, UPCAST) if TURNED else multiplied(a, b, more, PRECISION, UPCAST)
        r, s, k = walked(r, s, k, kw, c, KH * KW == 1 and not MIXED, BLOCK_K)
    lane = tl.arange(0, BLOCK_M)
    image, y, x = image0 + lane // (BOX_H * BOX_W), y0 + lane // BOX_W % BOX_H, x0 + lane % BOX_W
    m = (image.to(tl.int64) * oh + y) * ow + x
    m_ok = (image < n) & (y < oh) & (x < ow)
    if TURNED:
        acc, more = tl.trans(acc), tl.trans(more)
    if SPLIT > 1:
        store_part(acc, m, m_ok, n * oh * ow, block, part_ptr, part_pitch, BLOCK_N)
    else:
        put_tile(
            acc, more, m, m_ok, column, columns, curved, y_pitch, scale_ptr, shift_ptr, residual_ptr, residual_pitch,
            residual_scale, y_ptr, place_ptr, places, RELU, RESIDUAL, GROUPED, ALIGNED, BLOCK_N, EXTRA,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    part_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, table_ptr, place_ptr,
    rows, oc, blocks, part_pitch, y_pitch, residual_pitch, places, curved, residual_scale,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, GROUPED: tl.constexpr, MIXED: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The end of a split convolution: adds the parts [SPLIT, rows, part_pitch] in order and stores the tile."""
    block, start = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if WIDE:
        start = start.to(tl.int64)
    m = start * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < rows
    part_tile = part_ptr + (m.to(tl.int64) * part_pitch)[:, None] + (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(SPLIT):
        acc += tl.load(part_tile + tl.cast(part, tl.int64) * rows * part_pitch, mask=m_ok[:, None], other=0.0)
    if MIXED:
        field = table_ptr + block * ROW
        column, columns = tl.multiple_of(tl.load(field + 6), 8), tl.multiple_of(tl.load(field + 7), 8)
        curved = tl.load(field + 8)
    else:
        column, columns = block * BLOCK_N, oc - block * BLOCK_N
        curved -= column
    put_tile(
        acc, acc, m, m_ok, column, columns, curved, y_pitch, scale_ptr, shift_ptr, residual_ptr, residual_pitch,
        residual_scale, y_ptr, place_ptr, places, RELU, RESIDUAL, GROUPED, ALIGNED, BLOCK_N, 0,
    )  # fmt: skip
