"""What the convolution kernels share on the device: the epilogue of a tile and the inner product's one step."""

import triton
import triton.language as tl

# One row for each block of output columns of a launch of mixed taps, int64, in this order.
FIELDS = (
    "w_offset",
    "w_pitch",
    "kw",
    "taps",
    "pad_top",
    "pad_left",
    "column",
    "columns",
    "curved",
)
ROW = tl.constexpr(len(FIELDS))


@triton.jit
def rectified(x):
    """max(x, 0), NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def multiplied(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b with float32 sums. UPCAST: the interpreter multiplies bfloat16 bit patterns, so it gets float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def turned(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + (a @ b).T, with a as the second operand."""
    return multiplied(tl.trans(b), tl.trans(a), acc, PRECISION, UPCAST)


@triton.jit
def put_tile(
    acc, more, m, m_ok, column, columns, curved, y_pitch, scale_ptr, shift_ptr, residual_ptr, residual_pitch,
    residual_scale, y_ptr, place_ptr, places,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, GROUPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile and, behind it, of EXTRA columns `more`: GROUPED ones go to places of their own, others
    side by side to y.
    """
    if GROUPED:
        scatter_tile(
            acc, m, m_ok, column, columns, curved, scale_ptr, shift_ptr, place_ptr, places, y_ptr, ALIGNED, BLOCK_N
        )  # fmt: skip
    else:
        store_tile(
            acc, m, m_ok, column, columns, RELU, column, y_pitch, scale_ptr, shift_ptr,
            residual_ptr, residual_pitch, residual_scale, y_ptr, RESIDUAL, BLOCK_N,
        )  # fmt: skip
    if EXTRA:
        put_tile(
            more, more, m, m_ok, column + BLOCK_N, columns - BLOCK_N, curved - BLOCK_N, y_pitch, scale_ptr, shift_ptr,
            residual_ptr, residual_pitch, residual_scale, y_ptr, place_ptr, places, RELU, RESIDUAL, GROUPED, ALIGNED,
            EXTRA, 0,
        )  # fmt: skip


@triton.jit
def store_tile(
    acc, m, m_ok, column, columns, relu, y_offset, y_pitch,
    scale_ptr, shift_ptr, residual_ptr, residual_pitch, residual_scale, y_ptr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = act(residual + residual_scale * (scale * acc + shift)), rounded once, at the store.

    m [BLOCK_M] are rows of y and the residual; `column` is the tile's first in scale, shift and the residual, of which
    `columns` exist; y_offset and y_pitch place the tile in elements from y_ptr.
    """
    lane = tl.arange(0, BLOCK_N)
    lane_ok = lane < columns
    scale = tl.load(scale_ptr + column + lane, mask=lane_ok, other=0.0)
    shift = tl.load(shift_ptr + column + lane, mask=lane_ok, other=0.0)
    y = acc * scale[None, :] + shift[None, :]
    ok = m_ok[:, None] & lane_ok[None, :]
    row = m.to(tl.int64)
    if RESIDUAL:
        old = tl.load(residual_ptr + (row * residual_pitch)[:, None] + (column + lane)[None, :], mask=ok, other=0.0)
        y = old.to(tl.float32) + residual_scale * y
    y = tl.where(relu, rectified(y), y)
    tl.store(y_ptr + y_offset + (row * y_pitch)[:, None] + lane[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def scatter_tile(
    acc, m, m_ok, column, columns, curved, scale_ptr, shift_ptr, place_ptr, places, y_ptr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = act(scale * acc + shift), rounded once, each column to a place of its own, the first `curved` with a ReLU.

    place_ptr [2, places] int64 says for a column where it begins, in elements from y_ptr, and its pitch (0: there is no
    such column). ALIGNED neighbours lie side by side, from a multiple of ALIGNED on: so they are stored as one. A ReLU
    is no third row: a thread of a tensor core's tile has a quarter of the columns, and would hold them all of these.
    """
    lane = tl.arange(0, BLOCK_N)
    lane_ok = lane < columns
    place = place_ptr + column + lane
    offset = tl.max_contiguous(tl.multiple_of(tl.load(place, mask=lane_ok, other=0), ALIGNED), ALIGNED)
    pitch = tl.max_constancy(tl.multiple_of(tl.load(place + places, mask=lane_ok, other=0), ALIGNED), ALIGNED)
    scale = tl.load(scale_ptr + column + lane, mask=lane_ok, other=0.0)
    shift = tl.load(shift_ptr + column + lane, mask=lane_ok, other=0.0)
    y = acc * scale[None, :] + shift[None, :]
    y = tl.where((lane < curved)[None, :], rectified(y), y)
    ok = m_ok[:, None] & (pitch > 0)[None, :]
    at = offset[None, :] + m.to(tl.int64)[:, None] * pitch[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def store_part(acc, m, m_ok, rows, block, part_ptr, part_pitch, BLOCK_N: tl.constexpr):
    """One split's float32 sums, [split, rows, part_pitch], for `finish_kernel`."""
    row = tl.program_id(1).to(tl.int64) * rows + m
    lane = block * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(part_ptr + (row * part_pitch)[:, None] + lane[None, :], acc, mask=m_ok[:, None])
