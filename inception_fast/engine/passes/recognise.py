"""Finds the composites that torch writes out as chains of small calls."""

from __future__ import annotations

from typing import Any

import torch

from .. import graph as ir
from .epilogue import fits


def gather_channels(graph: ir.Graph) -> int:
    """cat of arithmetic on single channels of one map -> that arithmetic on the map (torchvision's transform_input)."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Concat):
            continue
        parts = [_sliced(i) for i in node.inputs]
        found = [p for p in parts if p is not None]
        whole = found[0][0] if found else None
        if whole is None or len(found) != len(parts) or any(p[0] is not whole for p in found) or whole.shape is None:
            continue
        ends = [0]
        for _, piece, _, _ in found:
            if piece.offset == ends[-1]:
                ends.append(piece.offset + piece.channels)
        if len(ends) != len(found) + 1 or ends[-1] != whole.channels:
            continue
        absorbed = [c for _, _, _, chain in found for c in chain]
        scale = torch.cat([s.expand(p.channels) for _, p, (s, _), _ in found])
        shift = torch.cat([t.expand(p.channels) for _, p, (_, t), _ in found])
        graph.set(node, ir.Affine(scale, shift), [whole], absorb=absorbed)
        count += 1
    ir.prune(graph)
    return count


def _sliced(node: ir.Node) -> tuple[ir.Node, ir.Slice, tuple[torch.Tensor, torch.Tensor], list[ir.Node]] | None:
    """affine(...(slice(whole))) as (whole, slice, (scale, shift), the nodes of the chain)."""
    scale, shift = (torch.full((1,), value, dtype=torch.float64, device="cpu") for value in (1.0, 0.0))
    chain = []
    while isinstance(node.op, ir.Affine) and len(node.inputs) == 1 and not node.op.relu:
        chain.append(node)
        if node.op.shift is not None:
            shift = shift + scale * node.op.shift
        if node.op.scale is not None:
            scale = scale * node.op.scale
        node = node.inputs[0]
    if not isinstance(node.op, ir.Slice) or not fits(scale, shift):
        return None
    return node.inputs[0], node.op, (scale, shift), [*chain, node]


def call(node: ir.Node, *names: str) -> tuple[Any, ...] | None:
    """The arguments of a captured call of one of `names`, nodes in place, else None."""
    if not isinstance(node.op, ir.Torch) or str(node.op.target) not in [f"aten.{n}" for n in names]:
        return None
    return tuple(node.inputs[a.index] if isinstance(a, ir.Ref) else a for a in node.op.args)


def find_normalize(graph: ir.Graph) -> int:
    """x / max(norm(x, 2, dim=1), eps), as functional.normalize writes it."""
    count = 0
    for node in graph:
        division = call(node, "div.Tensor")
        if division is None or node.op.kwargs or node.shape is None or len(node.shape) not in (2, 4):  # type: ignore[attr-defined]
            continue
        x, wide = division
        expand = call(wide, "expand_as.default", "expand.default") if isinstance(wide, ir.Node) else None
        clamp = call(expand[0], "clamp_min.default") if expand else None
        norm = call(clamp[0], "linalg_vector_norm.default") if clamp else None
        if expand is None or clamp is None or norm is None or norm[0] is not x:
            continue
        if norm[1:2] != (2,) or norm[3:] != (True,) or [d % len(node.shape) for d in norm[2] or ()] != [1]:
            continue
        if x.shape != node.shape or x.dtype != wide.dtype:
            continue
        if not isinstance(clamp[1], (int, float)):
            continue
        graph.set(node, ir.Normalize(float(clamp[1])), [x], absorb=[wide, expand[0], clamp[0]])
        count += 1
    ir.prune(graph)
    return count


def find_lrn(graph: ir.Graph) -> int:
    """x / (k + alpha * mean of its neighbours' squares) ** beta, as functional.local_response_norm writes it."""
    count = 0
    for node in graph:
        division = call(node, "div.Tensor")
        power = call(division[1], "pow.Tensor_Scalar") if division and isinstance(division[1], ir.Node) else None
        if division is None or power is None or node.shape is None or len(node.shape) != 4:
            continue
        found = _lrn(node.shape, division[0], power[0])
        if found is not None:
            size, alpha, k, chain = found
            graph.set(node, ir.Lrn(size, alpha, float(power[1]), k), [division[0]], absorb=[division[1], *chain])
            count += 1
    ir.prune(graph)
    return count


def _lrn(shape: ir.Shape, x: ir.Node, node: ir.Node) -> tuple[int, float, float, list[ir.Node]] | None:
    """(size, alpha, k, the nodes of the chain) of k + alpha * avg_pool3d(pad(x * x))."""
    alpha, k, chain = 1.0, 0.0, []
    while isinstance(node.op, (ir.Affine, ir.Reshape)) and len(node.inputs) == 1:
        chain.append(node)
        if isinstance(node.op, ir.Affine):
            k += alpha * (0.0 if node.op.shift is None else _uniform(node.op.shift))
            alpha *= 1.0 if node.op.scale is None else _uniform(node.op.scale)
        node = node.inputs[0]
    pool = call(node, "avg_pool3d.default")
    pad = call(pool[0], "pad.default", "constant_pad_nd.default") if pool else None
    if pool is None or pad is None or alpha != alpha or k != k:
        return None
    size = next(iter(pool[1]))
    view = pad[0]
    if list(pool[1]) != [size, 1, 1] or len(pool) != 3 or set(pool[2]) != {1}:
        return None
    if [*pad[1]] != [0, 0, 0, 0, size // 2, (size - 1) // 2] or any(a not in ("constant", 0, None) for a in pad[2:]):
        return None
    if not isinstance(view.op, ir.Reshape) or view.op.tail != (1, *shape[1:]):
        return None
    square = view.inputs[0]
    product = call(square, "mul.Tensor")
    if product is None or product[0] is not x or product[1] is not x:
        return None
    return size, alpha, k, [*chain, node, pool[0], view, square]


def _uniform(values: torch.Tensor) -> float:
    """The one value of a vector, NaN where it has several."""
    first = float(values[0])
    return first if bool((values == first).all()) else float("nan")
