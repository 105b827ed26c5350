"""A kernel call as data, and the calls of the pointwise kernels.

Maps are NHWC. A `Map` says where a map lies: `data` starts at its first element, `pitch` elements lie between pixels.
Nothing here synchronises, allocates or picks a stream: `Launch.run` uses the current stream of the current device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from ..maps import Map
from ..maps import dense as dense
from ..plan import EltwiseStep, LrnStep, NormalizeStep
from . import pointwise

NARROW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *NARROW)
INT32 = 1 << 31


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**arguments, **options)`. `arguments` keep their tensors alive. `name` is for tables and traces."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Puts the kernel on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.options)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter multiplies the bit patterns of bfloat16; widened to float32 its products are exact."""
    return interpreting() and dtype is torch.bfloat16


def power(value: int, low: int, high: int) -> int:
    """The power of two at or above `value`, within [low, high]."""
    return min(max(1 << (value - 1).bit_length(), low), high)


def wide(*rows: int) -> bool:
    """Whether row numbers, up to one tile beyond the last, need 64 bits."""
    return max(rows) >= INT32 - 4096


def parameters(values: Any, like: Tensor) -> Tensor:
    """float32 on the device of `like`; for an absent parameter a pointer that nobody reads."""
    if values is None:
        return like
    return torch.as_tensor(values, dtype=torch.float32, device=like.device).contiguous()


def _tiles(rows: int, c: int, elements: int = 4096) -> tuple[int, int, int, tuple[int]]:
    """BLOCK_M, BLOCK_N, blocks of columns and the grid of a kernel that is bound by memory."""
    block_n = power(c, 16, 128)
    block_m = power(rows, 1, elements // block_n)
    blocks = triton.cdiv(c, block_n)
    return block_m, block_n, blocks, (triton.cdiv(rows, block_m) * blocks,)


def eltwise(step: EltwiseStep, x: Map, y: Map, residual: Map | None = None) -> list[Launch]:
    """y = act(residual + residual_scale * (scale * x + shift)), each part optional."""
    if y.rows == 0:
        return []
    block_m, block_n, blocks, grid = _tiles(y.rows, y.c)
    arguments = {
        "x_ptr": x.data,
        "scale_ptr": parameters(step.scale, y.data),
        "shift_ptr": parameters(step.shift, y.data),
        "residual_ptr": y.data if residual is None else residual.data,
        "y_ptr": y.data,
        **{"rows": y.rows, "c": y.c, "blocks": blocks, "x_pitch": x.pitch, "y_pitch": y.pitch},
        "residual_pitch": 0 if residual is None else residual.pitch,
        "residual_scale": float(step.residual_scale),
        **{"SCALE": step.scale is not None, "SHIFT": step.shift is not None, "RESIDUAL": residual is not None},
        **{"RELU": step.relu, "WIDE": wide(y.rows), "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    return [Launch("eltwise", pointwise.eltwise_kernel, grid, arguments, {"num_warps": 4})]


def imported(x: Tensor, y: Map, scale: Any = None, shift: Any = None) -> list[Launch]:
    """y = scale * x + shift from a caller's [n, c, h, w] tensor of any strides, uint8 or floating."""
    if y.rows == 0:
        return []
    block_m, block_n, blocks, grid = _tiles(y.rows, y.c, 2048)
    n, c, h, w = x.stride()
    arguments = {
        "x_ptr": x,
        "scale_ptr": parameters(scale, y.data),
        "shift_ptr": parameters(shift, y.data),
        "y_ptr": y.data,
        **{"rows": y.rows, "h": y.h, "w": y.w, "c": y.c, "blocks": blocks},
        **{"stride_n": n, "stride_c": c, "stride_y": h, "stride_x": w, "y_pitch": y.pitch},
        **{"SCALE": scale is not None, "SHIFT": shift is not None, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    return [Launch("import", pointwise.import_kernel, grid, arguments, {"num_warps": 4})]


def lrn(step: LrnStep, x: Map, y: Map) -> list[Launch]:
    """Local response normalisation over the channels."""
    if y.rows == 0:
        return []
    block_m, block_n, blocks, grid = _tiles(y.rows, y.c, 2048)
    arguments = {
        **{"x_ptr": x.data, "y_ptr": y.data, "rows": y.rows, "c": y.c, "blocks": blocks},
        **{"x_pitch": x.pitch, "y_pitch": y.pitch, "alpha": step.alpha, "beta": step.beta, "k0": step.k},
        **{"SIZE": step.size, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    return [Launch("lrn", pointwise.lrn_kernel, grid, arguments, {"num_warps": 4})]


def normalized(step: NormalizeStep, x: Map, y: Map) -> list[Launch]:
    """Unit length over the channels of a pixel."""
    if y.rows == 0:
        return []
    arguments = {
        **{"x_ptr": x.data, "y_ptr": y.data, "c": y.c, "x_pitch": x.pitch, "y_pitch": y.pitch},
        **{"eps": step.eps, "BLOCK_N": power(y.c, 16, 1024)},
    }
    return [Launch("normalize", pointwise.normalize_kernel, (math.prod((y.n, y.h, y.w)),), arguments, {"num_warps": 4})]
