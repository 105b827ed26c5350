"""Runs a graph through simple torch calls at any floating dtype: the passes' oracle, two backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from . import graph as ir
from .operands import AS_RESHAPE, all_laid_out

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32, torch.float64)


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """`parameter` with the dtype and device of `x`."""
    return parameter.detach().to(device=x.device, dtype=x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Halves as float32, as torch has them inside of a call: their sums overflow, and numbers are not made halves."""
    return x.float() if x.dtype in _HALVES else x


def _per_channel(x: Tensor, parameter: Tensor) -> Tensor:
    return like(x, parameter).reshape(1, -1, *(1,) * (x.dim() - 2))


def _epilogue(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None and shift is None:
        return y
    wide = _wide(y)
    if scale is not None:
        wide = wide * _per_channel(wide, scale)
    if shift is not None:
        wide = wide + _per_channel(wide, shift)
    return wide.to(y.dtype)


def _pad(x: Tensor, padding: Sequence[int], value: float) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), value=value) if any(padding) else x


def _conv(op: ir.Conv, x: Tensor, residual: Tensor | None = None) -> Tensor:
    parts = [like(x, part) for part in op.parts]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    y = F.conv2d(_pad(x, op.padding, 0.0), weight, None, op.stride, 0, 1, op.groups)
    y = _epilogue(y, op.scale, op.shift)
    if residual is not None:
        y = residual + op.residual_scale * y
    if op.relu:
        return y.relu()
    if op.linear:
        return y
    parts = y.split([c.channels for c in op.columns], 1)
    return torch.cat([p.relu() if c.relu else p for p, c in zip(parts, op.columns, strict=True)], 1)


def _linear(op: ir.Linear, x: Tensor) -> Tensor:
    y = _epilogue(F.linear(x.flatten(1), like(x, op.weight)), op.scale, op.shift)
    return y.relu() if op.relu else y


def _pair(op: ir.Pair, x: Tensor) -> Tensor:
    first = _conv(op.first, x)
    return _conv(op.second, first) if op.kind == "chain" else torch.cat([first, _conv(op.second, x)], 1)


def _pool(op: ir.Pool, x: Tensor) -> Tensor:
    top, bottom, left, right = op.padding
    reach = (top, bottom + op.overhang[0], left, right + op.overhang[1])
    if op.kind == "max":
        y = F.max_pool2d(_pad(x, reach, float("-inf")), op.kernel, op.stride)
    else:
        wide = _wide(x)
        ones = torch.ones_like(wide[:1, :1])
        counted = _pad(_pad(ones, op.padding, float(op.count_include_pad)), (0, op.overhang[0], 0, op.overhang[1]), 0.0)
        total = F.avg_pool2d(_pad(wide, reach, 0.0), op.kernel, op.stride, divisor_override=1)
        y = (total / F.avg_pool2d(counted, op.kernel, op.stride, divisor_override=1)).to(x.dtype)
    y = _epilogue(y, None, op.shift)
    return y.relu() if op.relu else y


def _affine(op: ir.Affine, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = _epilogue(x, op.scale, op.shift)
    if residual is not None:
        y = residual + op.residual_scale * y
    return y.relu() if op.relu else y


def _lrn(op: ir.Lrn, x: Tensor) -> Tensor:
    shape = x.shape
    squares = F.pad((x * x).reshape(shape[0], 1, shape[1], -1), (0, 0, op.size // 2, (op.size - 1) // 2))
    mean = F.avg_pool2d(squares, (op.size, 1), 1).reshape(shape)
    return x / (op.k + op.alpha * mean) ** op.beta


def _normalize(op: ir.Normalize, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, 2, 1, keepdim=True).clamp_min(op.eps)


def _constant(op: ir.Constant, dtype: torch.dtype | None) -> Tensor:
    return op.value.detach().to(dtype if dtype is not None and op.value.is_floating_point() else op.dtype)


def _cast(op: ir.Cast, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype if dtype is not None and op.dtype.is_floating_point else op.dtype)


def _torch(op: ir.Torch, inputs: Sequence[Any], dtype: torch.dtype | None) -> Any:
    def fill(leaf: Any) -> Any:
        if isinstance(leaf, ir.Ref):
            return inputs[leaf.index]
        return dtype if dtype is not None and leaf in _FLOATS and isinstance(leaf, torch.dtype) else leaf

    inputs = inputs if op.orders is None else all_laid_out(inputs, op.orders)
    args, kwargs = pytree.tree_map_only((ir.Ref, torch.dtype), fill, (op.args, op.kwargs))
    return AS_RESHAPE.get(op.target, op.target)(*args, **kwargs)


_RUN: dict[type[ir.Op], Callable[..., Tensor]] = {
    ir.Identity: lambda op, x: x,
    ir.Conv: _conv,
    ir.Linear: _linear,
    ir.Pair: _pair,
    ir.Pool: _pool,
    ir.Affine: _affine,
    ir.Relu: lambda op, x: x.relu(),
    ir.Add: lambda op, x, y: x + y,
    ir.Concat: lambda op, *xs: torch.cat(xs, 1),
    ir.Slice: lambda op, x: x[:, op.offset : op.offset + op.channels],
    ir.Pad: lambda op, x: _pad(x, op.padding, op.value),
    ir.Reshape: lambda op, x: x.reshape(x.shape[0], *op.tail),
    ir.Lrn: _lrn,
    ir.Normalize: _normalize,
}


def evaluate(op: ir.Op, inputs: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
    """The value of one node. With `dtype`, constants and casts to any floating type become that type."""
    if isinstance(op, ir.Torch):
        return _torch(op, inputs, dtype)
    if isinstance(op, ir.Constant):
        return _constant(op, dtype)
    if isinstance(op, ir.Cast):
        return _cast(op, inputs[0], dtype)
    return _RUN[type(op)](op, *inputs)


def run(graph: ir.Graph, inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Any]:
    """The graph's flattened outputs. With `dtype`, everything floating runs in it, inputs and parameters too."""
    values: dict[ir.Node, Any] = {}
    remaining = {node: len(node.users) for node in graph.nodes}
    kept = {o for o in graph.outputs if isinstance(o, ir.Node)}
    for node in graph.nodes:
        if isinstance(node.op, ir.Input):
            x = inputs[node.op.index]
            values[node] = x.to(dtype) if dtype is not None and x.is_floating_point() else x
        else:
            values[node] = evaluate(node.op, [values[i] for i in node.inputs], dtype)
        for source in node.inputs:
            remaining[source] -= 1
            if not remaining[source] and source not in kept:
                del values[source]
    return [values[o] if isinstance(o, ir.Node) else o for o in graph.outputs]


def infer_shapes(graph: ir.Graph, inputs: Sequence[Tensor]) -> dict[ir.Node, Any]:
    """Every value on the "meta" device: shapes and dtypes without arithmetic; nothing for what the device cannot tell.

    `inputs` may live anywhere. What the module makes of sizes alone (zeros, ranges) keeps its values while nothing on
    the device joins it.
    """
    values: dict[ir.Node, Any] = {}
    for node in graph.nodes:
        if isinstance(node.op, ir.Input):
            values[node] = inputs[node.op.index].to("meta")
        elif all(i in values for i in node.inputs):
            values.update(_infer(node, [values[i] for i in node.inputs]))
    return values


def _infer(node: ir.Node, inputs: list[Any]) -> dict[ir.Node, Any]:
    if isinstance(node.op, ir.Constant):
        return {node: node.op.value.detach().to("meta")}
    joined = any(isinstance(x, Tensor) and x.is_meta for x in pytree.tree_leaves(inputs))
    if joined or not isinstance(node.op, ir.Torch):
        inputs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    try:
        return {node: evaluate(node.op, inputs)}
    except (NotImplementedError, RuntimeError):
        if isinstance(node.op, ir.Torch):
            return {}
        raise
