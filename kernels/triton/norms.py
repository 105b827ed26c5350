"""The host side of batch norm in training: its launches for given maps, and those of a convolution that leaves the
statistics of its result behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..spec import ConvSpec
from . import convolve, norm
from .configs import Config
from .convolve import Packed
from .launch import Launch, Map, power

GROUP = 128  # parts that become one in a level
ROWS = 128  # of a tile of a map; 32 columns
LANES = 32
WIDEST = 128  # columns of a convolution's tile that leaves statistics


class Norm(NamedTuple):
    """weight, bias, mean and var, float32 [c], contiguous."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def pointers(self) -> dict[str, Tensor]:
        return {f"{name}_ptr": value for name, value in self._asdict().items()}


class Parts(NamedTuple):
    """float32 [tiles, 2, c], a tile of `span` rows each."""

    data: Tensor
    span: int

    @property
    def tiles(self) -> int:
        return self.data.shape[0]


def parts_of(rows: int, c: int, span: int, like: Tensor) -> Parts:
    """Memory for the parts of a map, on the device of `like`."""
    sizes = (triton.cdiv(rows, span), 2, c)
    return Parts(torch.empty(sizes, dtype=torch.float32, device=like.device), span)


def conv_with_statistics(
    name: str, spec: ConvSpec, x: Map, packed: Packed, y: Map, config: Config
) -> tuple[list[Launch], Parts]:
    """A convolution, and the parts that it leaves of the statistics of y as stored; one launch, through pointers.

    `packed` has one group. Raises ValueError for a residual or several groups.
    """
    if spec.residual or len(packed.groups) != 1:
        raise ValueError(
            f"residual {spec.residual}, {len(packed.groups)} groups; statistics are of one convolution's result"
        )
    # Wider tiles with statistics spill; parts of a split have no epilogue.
    config = dataclasses.replace(config, form="pointer", split=1, block_n=min(config.widths[0], WIDEST))
    (one,) = convolve.convolution(name, spec, x, packed, [y], config)
    parts = parts_of(y.rows, spec.oc, config.block_m, y.data)
    arguments = {**one.arguments, "STATS": True, "part_ptr": parts.data, "part_pitch": spec.oc}
    return [dataclasses.replace(one, arguments=arguments)], parts


def statistics(x: Map) -> tuple[list[Launch], Parts]:
    """The parts of a map's statistics."""
    parts = parts_of(x.rows, x.c, ROWS, x.data)
    return [_tiled("moments", norm.moments_kernel, x.rows, x.c, x_ptr=x.data, x_pitch=x.pitch, **_into(parts))], parts


def merged(parts: Parts, rows: int, *, moments: bool) -> tuple[list[Launch], Tensor]:
    """Launches that make one part of all, and where it will be: float32 [2, c], mean and var with `moments`."""
    launches, c = [], parts.data.shape[2]
    while True:
        tiles = triton.cdiv(parts.tiles, GROUP)
        target = torch.empty((tiles, 2, c), dtype=torch.float32, device=parts.data.device)
        blocks = triton.cdiv(c, LANES)
        arguments: dict[str, Any] = {
            **{"part_ptr": parts.data, "merged_ptr": target, "tiles": parts.tiles, "rows": rows, "span": parts.span},
            **{"c": c, "blocks": blocks, "part_pitch": c, "divisor": float(rows if moments and tiles == 1 else 1)},
            **{"MOMENTS": moments, "GROUP": power(parts.tiles, 1, GROUP), "BLOCK_N": LANES},
        }
        launches.append(Launch("merge", norm.merge_kernel, (tiles * blocks,), arguments, {"num_warps": 4}))
        parts = Parts(target, parts.span * GROUP)
        if tiles == 1:
            return launches, target[0]


def forward(x: Map, y: Map, of: Norm, eps: float) -> list[Launch]:
    """y = relu(weight * (x - mean) / sqrt(var + eps) + bias)."""
    pitches = {"x_pitch": x.pitch, "y_pitch": y.pitch}
    pointers = {**of.pointers(), "x_ptr": x.data, "y_ptr": y.data}
    return [_tiled("batch_norm", norm.batch_norm_kernel, x.rows, x.c, **pointers, **pitches, eps=eps)]


def backward(grad: Map, x: Map, of: Norm, eps: float, dx: Map, dweight: Tensor, dbias: Tensor) -> list[Launch]:
    """The gradients of x, weight and bias. x and grad are read twice: the sums come before what needs them."""
    both: dict[str, Any] = {**of.pointers(), "grad_ptr": grad.data, "x_ptr": x.data, "eps": eps}
    both |= {"grad_pitch": grad.pitch, "x_pitch": x.pitch}
    parts = parts_of(x.rows, x.c, ROWS, x.data)
    first = _tiled("gradient_sums", norm.gradient_sums_kernel, x.rows, x.c, **both, **_into(parts))
    merges, sums = merged(parts, x.rows, moments=False)
    results = {"dx_ptr": dx.data, "dx_pitch": dx.pitch, "dweight_ptr": dweight, "dbias_ptr": dbias}
    last = _tiled("gradient", norm.gradient_kernel, x.rows, x.c, **both, **results, sums_ptr=sums, sums_pitch=x.c)
    return [first, *merges, last]


def _into(parts: Parts) -> dict[str, Any]:
    return {"part_ptr": parts.data, "part_pitch": parts.data.shape[2]}


def _tiled(name: str, kernel: Callable[..., Any], rows: int, c: int, **arguments: Any) -> Launch:
    """A kernel over tiles of ROWS by LANES."""
    blocks = triton.cdiv(c, LANES)
    given = {**arguments, "rows": rows, "c": c, "blocks": blocks, "BLOCK_M": ROWS, "BLOCK_N": LANES}
    return Launch(name, kernel, (triton.cdiv(rows, ROWS) * blocks,), given, {"num_warps": 4})
