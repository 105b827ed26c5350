"""y = act(pool(x) + shift) over NHWC memory, and the pool of a whole map.

x [n, h, w, c] and y [n, oh, ow, c] with pitches of their own; shift float32 [c]. Maxima are those of x. An average sums
each row of its window from left to right, then the rows from the top, in float32, and scales the sum once, by the
float32 reciprocal of its count, whatever the tile. The padding is minus infinity for a maximum, zero for an average; an
average divides by the elements of the map in the window, with INCLUDE_PAD by those of the padded map. NaN spreads, as
in torch.
"""

import triton
import triton.language as tl

from .tile import rectified

UNROLLED = tl.constexpr(32)  # most taps of a loop without branches


@triton.jit
def pool_kernel(
    x_ptr, shift_ptr, y_ptr, n, h, w, oh, ow, across, positions,
    C: tl.constexpr, X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SURE_H: tl.constexpr,
    SURE_W: tl.constexpr, MAX: tl.constexpr, INCLUDE_PAD: tl.constexpr, EVEN: tl.constexpr, SHIFT: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions by BLOCK_N channels a program. A position is ROWS by COLUMNS outputs,
    whose taps are loaded once for all of them; there are `across` in a row, `positions` in an image. The last ones of
    an axis are moved back onto the map, so that two write the same values where ROWS or COLUMNS do not divide it.

    The first SURE_H rows and SURE_W columns of a position's taps never lie beyond the map's end, EVEN windows all count
    the same, WIDE maps need 64 bits for a position or inside an image. Channels and pitches, which are the layer's
    and not the map's, are constants: so a tap's column is no arithmetic, but part of its load.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    WHOLE: tl.constexpr = C % BLOCK_N == 0
    block, start = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    x_line, y_line = w * X_PITCH, ow * Y_PITCH
    if WIDE:
        start = start.to(tl.int64)
        x_line, y_line = tl.cast(w, tl.int64) * X_PITCH, tl.cast(ow, tl.int64) * Y_PITCH
    m = start * BLOCK_M + tl.arange(0, BLOCK_M)
    image, position = m // positions, m % positions
    m_ok = image < n
    image = tl.minimum(image, n - 1).to(tl.int64)
    oy = tl.minimum(position // across * ROWS, oh - ROWS)
    ox = tl.minimum(position % across * COLUMNS, ow - COLUMNS)
    top, left = oy * STRIDE_H - TOP, ox * STRIDE_W - LEFT
    k = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < C
    corner = x_ptr + (((image * h + top) * x_line + left * X_PITCH)[:, None] + k[None, :])
    if SHIFT:
        shift = tl.load(shift_ptr + k, mask=k_ok, other=0.0)[None, :]
    if (KH + (ROWS - 1) * STRIDE_H) * (KW + (COLUMNS - 1) * STRIDE_W) <= UNROLLED:
        taps = ()
        for r in tl.static_range(KH + (ROWS - 1) * STRIDE_H):
            for s in tl.static_range(KW + (COLUMNS - 1) * STRIDE_W):
                ok = there(there(m_ok, top, h, r, TOP, SURE_H), left, w, s, LEFT, SURE_W)
                sure = ((r >= TOP) & (r < SURE_H)) & ((s >= LEFT) & (s < SURE_W))
                taps += (tap(corner + r * x_line + s * X_PITCH, ok, k_ok, sure, WHOLE, MAX),)
        found = windows(taps, KH, KW, STRIDE_H, STRIDE_W, ROWS, COLUMNS, MAX, PACKED)
    else:
        tl.static_assert(ROWS == 1 and COLUMNS == 1, "taps of several outputs are unrolled")
        found = (walked(corner, top, left, m_ok, k_ok, h, w, x_line, X_PITCH, KH, KW, MAX, WHOLE, PACKED),)
    first = y_ptr + (((image * oh + oy) * y_line + ox * Y_PITCH)[:, None] + k[None, :])
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            acc = found[i * COLUMNS + j]
            if not MAX:
                up, before = top + i * STRIDE_H, left + j * STRIDE_W
                acc *= share(up, before, h, w, KH, KW, BOTTOM, RIGHT, INCLUDE_PAD, EVEN)
            if SHIFT:
                acc = acc.to(tl.float32) + shift
            if RELU:
                acc = rectified(acc)
            put(first + i * y_line + j * Y_PITCH, acc, m_ok, k_ok, WHOLE)


@triton.jit
def there(ok, first, size, tap, BEFORE: tl.constexpr, SURE: tl.constexpr):
    """`ok` where the tap, counted from `first`, lies on an axis of that size; only what may fail is asked."""
    if tap < BEFORE:
        ok = ok & (first + tap >= 0)
    if tap >= SURE:
        ok = ok & (first + tap < size)
    return ok


@triton.jit
def tap(at, ok, k_ok, SURE: tl.constexpr, WHOLE: tl.constexpr, MAX: tl.constexpr):
    """A tap of each position. Past the last position lie others of the last image, so a SURE tap is one."""
    if SURE and WHOLE:
        return tl.load(at)
    else:
        mask = ok[:, None] if WHOLE else ok[:, None] & k_ok[None, :]
        return tl.load(at, mask=mask, other=float("-inf") if MAX else 0.0)


@triton.jit
def walked(
    corner, top, left, m_ok, k_ok, h, w, x_line, X_PITCH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, MAX: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The windows of many taps, one output a position, tap by tap."""
    fill = tl.full((m_ok.shape[0], k_ok.shape[0]), float("-inf") if MAX else 0.0, tl.float32)
    acc = fill
    for r in range(KH):
        row = fill
        for s in range(KW):
            ok = m_ok & (top + r >= 0) & (top + r < h) & (left + s >= 0) & (left + s < w)
            x = widened(tap(corner + r * x_line + s * X_PITCH, ok, k_ok, False, WHOLE, MAX), PACKED)
            row = joined(row, x, MAX, False)
        acc = joined(acc, row, MAX, False)
    return acc


@triton.jit
def windows(
    taps, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sums or maxima of ROWS by COLUMNS windows: a row of taps is joined for a column of windows once."""
    SPAN: tl.constexpr = KW + (COLUMNS - 1) * STRIDE_W
    found = (0.0,) * (ROWS * COLUMNS)
    for r in tl.static_range(KH + (ROWS - 1) * STRIDE_H):
        line, rows, now = (), (), ()
        for s in tl.static_range(SPAN):
            line += ((taps[r * SPAN + s] if MAX else widened(taps[r * SPAN + s], PACKED)),)
        for j in tl.static_range(COLUMNS):
            row = line[j * STRIDE_W]
            for s in tl.static_range(1, KW):
                row = joined(row, line[j * STRIDE_W + s], MAX, PACKED)
            rows += (row,)
        for i in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS):
                one = found[i * COLUMNS + j]
                if r == i * STRIDE_H:
                    one = rows[j]
                elif r > i * STRIDE_H and r < i * STRIDE_H + KH:
                    one = joined(one, rows[j], MAX, PACKED)
                now += (one,)
        found = now
    return found


@triton.jit
def share(
    up, before, h, w, KH: tl.constexpr, KW: tl.constexpr, BOTTOM: tl.constexpr, RIGHT: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One over what counts in each window, [BLOCK_M, 1], or in all."""
    if EVEN:
        return 1.0 / (KH * KW)
    else:
        if INCLUDE_PAD:
            rows, columns = tl.minimum(up + KH, h + BOTTOM) - up, tl.minimum(before + KW, w + RIGHT) - before
        else:
            rows = tl.minimum(up + KH, h) - tl.maximum(up, 0)
            columns = tl.minimum(before + KW, w) - tl.maximum(before, 0)
        return (1.0 / (rows * columns).to(tl.float32))[:, None]


@triton.jit
def put(at, acc, m_ok, k_ok, WHOLE: tl.constexpr):
    mask = m_ok[:, None] if WHOLE else m_ok[:, None] & k_ok[None, :]
    tl.store(at, acc.to(at.dtype.element_ty), mask=mask)


@triton.jit
def widened(x, PACKED: tl.constexpr):
    """float32 of x. PACKED pairs of bfloat16 take an instruction each; as single numbers the upper ones take two."""
    if PACKED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def joined(a, b, MAX: tl.constexpr, PACKED: tl.constexpr):
    """Their sums or maxima; NaN wins. Maxima of PACKED pairs stay in their 16 bits, where they are exact."""
    if not MAX:
        return a + b
    elif PACKED and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PACKED and a.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return larger(a, b)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def global_pool_kernel(
    x_ptr, shift_ptr, y_ptr, pixels, C: tl.constexpr, X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr,
    MAX: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[n, pixels, c] to [n, c]: an image by BLOCK_N channels a program, BLOCK_M pixels a step, the loads of STEPS steps
    together, FULL where that many always are left; one tree at the end.
    """
    image = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < C
    WHOLE: tl.constexpr = C % BLOCK_N == 0
    lane = tl.arange(0, BLOCK_M)
    first = x_ptr + image * pixels * X_PITCH + ((lane * X_PITCH)[:, None] + k[None, :])
    acc = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MAX else 0.0, tl.float32)
    for start in range(0, pixels, BLOCK_M * STEPS):
        taps = ()
        for i in tl.static_range(STEPS):
            ok = start + i * BLOCK_M + lane < pixels
            taps += (tap(first + i * BLOCK_M * X_PITCH, ok, k_ok, FULL, WHOLE, MAX),)
        for i in tl.static_range(STEPS):
            acc = joined(acc, widened(taps[i], PACKED), MAX, False)
        first += STEPS * BLOCK_M * X_PITCH
    y = tl.reduce(acc, 0, larger) if MAX else tl.sum(acc, 0) / pixels
    if SHIFT:
        y += tl.load(shift_ptr + k, mask=k_ok, other=0.0)
    if RELU:
        y = rectified(y)
    tl.store(y_ptr + image * Y_PITCH + k, y.to(y_ptr.dtype.element_ty), mask=k_ok)
