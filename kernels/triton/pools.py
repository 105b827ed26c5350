"""The calls of the pools' kernels: which outputs a program computes, and what holds for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from ..maps import Map
from ..spec import PoolSpec
from . import pool
from .launch import NARROW, Launch, interpreting, parameters, power, wide

# Threads that a machine's latency wants: with fewer an output is worth more than a tap that is loaded once.
ENOUGH = 1 << 15
SHARING = ((2, 2), (2, 1), (1, 2))  # rows and columns of a position, the first that fits
WARPS = 4
VECTOR = 16  # bytes that a thread loads of a tap
# Of blocks of channels over the last one, as a multiple of the channels; beyond it blocks are narrower.
MOST_OVERHANG = 1.2


@dataclass(frozen=True)
class Tile:
    """A program has `pixels` positions of `rows` by `columns` outputs, and `channels` of each. No tile changes a bit
    of the results.
    """

    rows: int
    columns: int
    pixels: int
    channels: int


def channels_of(c: int) -> int:
    """The widest block of channels of which nothing hangs over the last, else the widest of which little does."""
    most = power(c, 16, 128)
    for width in (128, 64, 32):
        if width <= most and c % width == 0:
            return width
    while most > 32 and -(-c // most) * most > MOST_OVERHANG * c:
        most //= 2
    return most


def shared_outputs(spec: PoolSpec, lanes: int) -> tuple[int, int]:
    """Rows and columns of outputs that a thread of `lanes` channels computes from taps that it loads once."""
    for rows, columns in SHARING:
        taps = (spec.kh + (rows - 1) * spec.stride[0]) * (spec.kw + (columns - 1) * spec.stride[1])
        overlap = (rows == 1 or spec.kh > spec.stride[0]) and (columns == 1 or spec.kw > spec.stride[1])
        threads = spec.n * _count(spec.oh, rows) * _count(spec.ow, columns) * _count(spec.c, lanes)
        fits = spec.oh >= rows and spec.ow >= columns and taps <= pool.UNROLLED.value
        if overlap and fits and threads >= ENOUGH:
            return rows, columns
    return 1, 1


def tile_of(spec: PoolSpec, item: int) -> Tile:
    """The tile for elements of `item` bytes."""
    lanes, channels = VECTOR // item, channels_of(spec.c)
    rows, columns = shared_outputs(spec, lanes)
    positions = spec.n * _count(spec.oh, rows) * _count(spec.ow, columns)
    return Tile(rows, columns, power(positions, 1, 32 * WARPS * lanes // channels), channels)


def pooled(spec: PoolSpec, x: Map, y: Map, shift: Any = None, relu: bool = False) -> list[Launch]:
    """y = act(pool(x) + shift); a window that is the whole map becomes one reduction an image."""
    if spec.n == 0:
        return []
    packed = x.data.dtype in NARROW and not interpreting()  # the interpreter knows no PTX
    flags = {"MAX": spec.kind == "max", "SHIFT": shift is not None, "RELU": relu, "PACKED": packed}
    given = {"shift_ptr": parameters(shift, y.data), "C": spec.c, "X_PITCH": x.pitch, "Y_PITCH": y.pitch, **flags}
    if (spec.kh, spec.kw) == (spec.h, spec.w) and not any(spec.padding) and (spec.oh, spec.ow) == (1, 1):
        return [_whole_map(spec, x, y, given)]
    tile = tile_of(spec, x.data.element_size())
    across = _count(spec.ow, tile.columns)
    positions = _count(spec.oh, tile.rows) * across
    sizes = {"n": spec.n, "h": spec.h, "w": spec.w, "oh": spec.oh, "ow": spec.ow}
    counts = {"across": across, "positions": positions}
    arguments = {"x_ptr": x.data, "y_ptr": y.data, **given, **sizes, **counts, **_window(spec, x, y, tile)}
    grid = (_count(spec.n * positions, tile.pixels) * _count(spec.c, tile.channels),)
    return [Launch("pool", pool.pool_kernel, grid, arguments, {"num_warps": WARPS})]


def _whole_map(spec: PoolSpec, x: Map, y: Map, given: dict[str, Any]) -> Launch:
    pixels = spec.h * spec.w
    block_m, block_n = power(pixels, 1, 8), power(spec.c, 16, 128)
    steps = power(_count(pixels, block_m), 1, 8)
    full = pixels % (steps * block_m) == 0
    blocks = {"FULL": full, "STEPS": steps, "BLOCK_M": block_m, "BLOCK_N": block_n}
    arguments = {"x_ptr": x.data, "y_ptr": y.data, "pixels": pixels, **given, **blocks}
    grid = (spec.n, _count(spec.c, block_n))
    return Launch("global_pool", pool.global_pool_kernel, grid, arguments, {"num_warps": WARPS})


def _window(spec: PoolSpec, x: Map, y: Map, tile: Tile) -> dict[str, Any]:
    """The kernel's constants."""
    top, bottom, left, right = spec.padding
    down, step = spec.stride
    high, span = spec.kh + (tile.rows - 1) * down, spec.kw + (tile.columns - 1) * step
    sure = (
        min(max(spec.h + top - (spec.oh - tile.rows) * down, 0), high),
        min(max(spec.w + left - (spec.ow - tile.columns) * step, 0), span),
    )
    # Where the last window ends, from the map's first element.
    ends = (spec.oh - 1) * down - top + spec.kh, (spec.ow - 1) * step - left + spec.kw
    if spec.count_include_pad:
        even = ends[0] <= spec.h + bottom and ends[1] <= spec.w + right
    else:
        even = not top and not left and ends[0] <= spec.h and ends[1] <= spec.w
    return {
        **{"KH": spec.kh, "KW": spec.kw, "STRIDE_H": down, "STRIDE_W": step},
        **{"TOP": top, "BOTTOM": bottom, "LEFT": left, "RIGHT": right, "SURE_H": sure[0], "SURE_W": sure[1]},
        **{"INCLUDE_PAD": spec.count_include_pad, "EVEN": even},
        "WIDE": wide(x.rows, y.rows, (x.h + high) * (x.w + span) * x.pitch, y.h * y.w * y.pitch),
        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK_M": tile.pixels, "BLOCK_N": tile.channels},
    }


def _count(size: int, part: int) -> int:
    return int(triton.cdiv(size, part))
