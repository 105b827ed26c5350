"""Which nodes native steps cover at given sizes, and the specs of those steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..kernels.spec import ConvSpec, PairSpec, PoolSpec
from . import graph as ir

Map = tuple[int, int, int, int]
Reasons = Callable[[ConvSpec | PairSpec | PoolSpec], list[str]]
VIEWS = (ir.Slice, ir.Reshape, ir.Concat)


def pixel_map(shape: ir.Shape) -> Map | None:
    """[n, c, h, w] as (n, h, w, c); a vector in any dress ([n, c], [n, c, 1] ...) as (n, 1, 1, c); else None."""
    if len(shape) == 4:
        n, c, h, w = shape
        return n, h, w, c
    if len(shape) < 2 or sum(d != 1 for d in shape[1:]) > 1:
        return None
    return shape[0], 1, 1, math.prod(shape[1:])


def conv_spec(op: ir.Conv, x: Map, residual: bool = False, dtype: str = "float32") -> ConvSpec:
    n, h, w, c = x
    return ConvSpec(n, h, w, c, op.channels, *op.kernel, op.stride, op.padding, op.groups, op.relu, residual, dtype)


def pool_spec(op: ir.Pool, x: Map, dtype: str = "float32") -> PoolSpec:
    return PoolSpec(*x, *op.kernel, op.stride, op.padding, op.kind, op.count_include_pad, op.overhang, dtype)


def pair_spec(op: ir.Pair, x: Map, dtype: str = "float32") -> PairSpec:
    first = conv_spec(op.first, x, dtype=dtype)
    read = (first.n, first.oh, first.ow, first.oc) if op.kind == "chain" else x
    return PairSpec(first, conv_spec(op.second, read, dtype=dtype), op.kind)


class Native:
    """The coverage of one graph at one set of shapes. `reasons` is the backend's word on a spec.

    The graph is captured in float32; `dtype` is what activations between native steps and weights are kept in.
    """

    def __init__(
        self, graph: ir.Graph, shapes: dict[ir.Node, ir.Shape], reasons: Reasons, dtype: str = "float32"
    ) -> None:
        self.graph, self.shapes, self._backend, self.dtype = graph, shapes, reasons, dtype
        self._reasons: dict[ir.Node, str] = {}
        for node in graph.nodes:
            self._reasons[node] = self._why_not(node)
        for node in graph.nodes:
            if isinstance(node.op, ir.Cast) and self.covers(node) and not self._cast_is_import(node):
                self._reasons[node] = "cast that torch calls read too"
        self._scattered = {node for node in graph.nodes if self._scatters(node)}

    def map(self, node: ir.Node) -> Map:
        found = pixel_map(self.shapes[node])
        assert found is not None
        return found

    def reason(self, node: ir.Node) -> str:
        """Why no native step covers the node; empty when one does."""
        return self._reasons[node]

    def covers(self, node: ir.Node) -> bool:
        return not self._reasons[node]

    def runs_in_torch(self, node: ir.Node) -> bool:
        return not self.covers(node) and not isinstance(node.op, ir.Input)

    def stored(self, node: ir.Node) -> bool:
        """Whether native steps leave the value in a buffer."""
        return self.covers(node) and not isinstance(node.op, ir.Cast)

    def outside(self, node: ir.Node) -> ir.Node:
        """The value that an import step reads in place of `node`."""
        return node.inputs[0] if isinstance(node.op, ir.Cast) and self.covers(node) else node

    def imports(self, node: ir.Node) -> ir.Node | None:
        """The outside value where the node is no more than its import: per-channel arithmetic straight on it."""
        plain = isinstance(node.op, ir.Affine) and len(node.inputs) == 1 and not node.op.relu
        if not plain or self.stored(node.inputs[0]):
            return None
        return self.outside(node.inputs[0])

    def scattered(self, node: ir.Node) -> bool:
        """Whether the columns of a convolution go to their slices' own places, so that the node itself needs none."""
        return node in self._scattered

    def as_conv(self, node: ir.Node) -> ir.Conv:
        """The convolution a node is: a linear layer covers its whole input map with one kernel."""
        if isinstance(node.op, ir.Conv):
            return node.op
        assert isinstance(node.op, ir.Linear)
        op, (_, h, w, c) = node.op, self.map(node.inputs[0])
        weight = op.weight.detach().reshape(-1, c, h, w)
        return ir.Conv(weight, (ir.Column(weight.shape[0], op.relu),), op.scale, op.shift)

    def _scatters(self, node: ir.Node) -> bool:
        if (
            not isinstance(node.op, ir.Conv)
            or len(node.op.columns) < 2
            or len(node.inputs) > 1
            or self.graph.is_output(node)
        ):
            return False
        slices = [u.op for u in node.users if isinstance(u.op, ir.Slice)]
        offsets = [sum(c.channels for c in node.op.columns[:i]) for i in range(len(node.op.columns))]
        wanted = list(zip(offsets, (c.channels for c in node.op.columns), strict=True))
        return (
            self.covers(node)
            and len(slices) == len(node.users)
            and sorted((s.offset, s.channels) for s in slices) == wanted
        )

    def _cast_is_import(self, node: ir.Node) -> bool:
        return not self.graph.is_output(node) and all(self.covers(u) for u in node.users)

    def _importable(self, node: ir.Node) -> bool:
        if self.covers(node):
            return True
        return node.dtype == torch.float32 and node in self.shapes and pixel_map(self.shapes[node]) is not None

    def _why_not(self, node: ir.Node) -> str:
        op = node.op
        if isinstance(op, (ir.Input, ir.Constant)):
            return "made outside"
        if isinstance(op, ir.Torch):
            return op.reason
        if node not in self.shapes:
            return "a shape known only at run time"
        if any(0 in self.shapes.get(value, ()) for value in (node, *node.inputs)):
            return "a tensor without elements"
        if node.dtype != torch.float32:
            return f"dtype {node.dtype}; native steps take the place of float32 ones"
        if pixel_map(self.shapes[node]) is None:
            return f"shape {self.shapes[node]} is neither a map nor a vector"
        if isinstance(op, ir.Cast):
            whole = isinstance(node.inputs[0].op, ir.Input)
            return "" if whole else "cast inside the network; native imports read uint8 inputs"
        for source in node.inputs:
            if not self._importable(source):
                return f"reads {source.name}, which native steps cannot"
        return self._views(node) if isinstance(op, VIEWS) else self._specs(node)

    def _views(self, node: ir.Node) -> str:
        stored = [self.stored(i) for i in node.inputs]
        if not any(stored) or (not all(stored) and not isinstance(node.op, ir.Concat)):
            return "moves values that torch made"
        if isinstance(node.op, ir.Reshape) and self.map(node) != self.map(node.inputs[0]):
            return f"reshapes a map to {self.shapes[node]}"
        return ""

    def _specs(self, node: ir.Node) -> str:
        op, x = node.op, self.map(node.inputs[0])
        if len(node.inputs) > 1 and self.shapes[node.inputs[1]] != self.shapes[node]:
            return "a residual of another shape"
        try:
            if isinstance(op, ir.Pair):
                spec: ConvSpec | PairSpec | PoolSpec = pair_spec(op, x, self.dtype)
            elif isinstance(op, (ir.Conv, ir.Linear)):
                spec = conv_spec(self.as_conv(node), x, len(node.inputs) > 1, self.dtype)
            elif isinstance(op, ir.Pool):
                spec = pool_spec(op, x, self.dtype)
            elif isinstance(op, (ir.Affine, ir.Lrn, ir.Normalize)):
                return ""
            elif isinstance(op, ir.Pad):
                return "padding that no convolution or pool behind it takes in"
            else:
                return f"no native step for {type(op).__name__}"
        except ValueError as error:
            return str(error)
        return "; ".join(self._backend(spec))
