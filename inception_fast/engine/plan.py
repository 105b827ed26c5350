"""Lowers a graph at given input sizes to native plans over one arena, with torch calls where no native step exists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..kernels.plan import (
    ALIGNMENT,
    Buffer,
    ConvStep,
    EltwiseStep,
    ImportStep,
    LrnStep,
    NormalizeStep,
    Output,
    PairStep,
    PoolStep,
    Step,
    View,
)
from ..kernels.spec import ITEM_BYTES, ConvSpec, PairSpec
from . import graph as ir
from .interpret import infer_shapes
from .memory import Lifetime, place_by_halves
from .native import VIEWS, Map, Native, Reasons, conv_spec, pool_spec
from .segment import NativeItem, segment

Tile = tuple[int, int]
Tiles = Callable[[ConvSpec], tuple[Tile, str]]
PAGE = 4096  # bytes; lines this far apart share a set of the level 1 cache
EIGHTH = 512  # bytes; of bfloat16, 16 pixels are read at once, and so far apart they share 8 sets


@dataclass(frozen=True)
class Tap:
    """A native value as a tensor: a view of a buffer, and the value's logical shape."""

    view: View
    shape: ir.Shape


@dataclass
class TorchItem:
    """One node run by torch, with why."""

    node: ir.Node
    reason: str


@dataclass
class Program:
    """What runs, in order. `buffers` are those of all native plans; output buffers count in the order of `outputs`.

    `tiles`, of plans that may take Winograd's algorithm: by a step's name and spec, its tile, or why it has none.
    """

    graph: ir.Graph
    buffers: tuple[Buffer, ...]
    items: tuple[NativeItem | TorchItem, ...]
    taps: dict[ir.Node, Tap]
    outputs: tuple[ir.Node | Tap | object, ...]
    arena_bytes: int
    steps: dict[ir.Node, str] = field(default_factory=dict)
    copies: int = 0
    tiles: dict[tuple[str, ConvSpec], tuple[Tile, str]] = field(default_factory=dict)


def strided(value: Tensor) -> np.ndarray:
    """A parameter as float32, its own memory where it already is that."""
    return value.detach().resolve_neg().to("cpu", torch.float32).numpy()


def array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(strided(value))


def vector(value: Tensor | None, length: int, default: float) -> np.ndarray:
    return np.full(length, default, np.float32) if value is None else array(value)


def optional(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else array(value)


def lower(
    graph: ir.Graph,
    inputs: Sequence[Tensor],
    reasons: Reasons,
    dtype: str = "float32",
    fuses: Callable[[PairSpec], bool] = lambda pair: False,
    tiles: Tiles | None = None,
) -> Program:
    """The program for inputs of these shapes and dtypes. `reasons` says what the backend cannot run.

    dtype: "float32" or "bfloat16", of the activations between native steps and of their weights; outputs stay float32.
    fuses: whether the backend runs a pair as one operator, its intermediate in memory of its own.
    tiles: by which tile Winograd's algorithm should run a convolution, (0, 0) for none, and why; None: for none.
    """
    shapes = {n: tuple(v.shape) for n, v in infer_shapes(graph, inputs).items() if isinstance(v, Tensor)}
    return _Lowering(graph, Native(graph, shapes, reasons, dtype), fuses, tiles).run()


def _spread(channels: int, item: int) -> int:
    """Channels between pixels, so that the same channel of a dozen pixels is not in one set of the level 1 cache."""
    size = channels * item
    shared = size % EIGHTH == 0 and size > EIGHTH if item == 2 else size % PAGE == 0
    return channels + ALIGNMENT // item if shared else channels


@dataclass
class _Draft:
    """A buffer before it has a place. `segment`: the run of native steps that writes it."""

    map: tuple[int, int, int, int]
    dtype: str
    output: int | None = None
    segment: int = 0
    local: bool = False
    touched: list[int] = field(default_factory=list)


class _Lowering:
    def __init__(self, graph: ir.Graph, native: Native, fuses: Callable[[PairSpec], bool], tiles: Tiles | None) -> None:
        self.graph, self.native, self.fuses, self.tiles = graph, native, fuses, tiles
        self.chosen: dict[tuple[str, ConvSpec], tuple[Tile, str]] = {}
        self.drafts: list[_Draft] = []
        self.home: dict[ir.Node, View] = {}
        self.imported: dict[ir.Node, View] = {}
        self.copies: dict[ir.Node, list[tuple[ir.Node, View]]] = {}
        self.output_copies: list[tuple[ir.Node, View]] = []
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.segment: dict[ir.Node, int] = {}
        self.steps: list[tuple[Step | ir.Node, ir.Node | None]] = []
        self.sources: list[tuple[ir.Node, Map]] = []
        self.names: dict[ir.Node, str] = {}
        self.taps: dict[ir.Node, Tap] = {}
        self.results: dict[ir.Node, Tap] = {}

    def run(self) -> Program:
        current = 0
        for node in self.graph.nodes:
            current += self.native.runs_in_torch(node)
            by_its_convolution = isinstance(node.op, ir.Slice) and self.native.scattered(node.inputs[0])
            self.segment[node] = self.segment[node.inputs[0]] if by_its_convolution else current
        self._place_outputs()
        self._place_concats()
        self._place_rest()
        for node in self.graph.nodes:
            self._emit(node)
        for node, view in self.output_copies:
            self._copy(node, view, self.segment[self.graph.nodes[-1]])
        return self._finish()

    # Where every native value lives.

    def _new(self, node: ir.Node, output: int | None = None) -> View:
        sizes = self.native.map(node)
        dtype = self.native.dtype if output is None else "float32"
        padded = sizes if output is not None else (*sizes[:3], _spread(sizes[3], ITEM_BYTES[dtype]))
        self.drafts.append(_Draft(padded, dtype, output, self.segment[node]))
        return View(len(self.drafts) - 1, 0, sizes[3])

    def _root(self, node: ir.Node) -> ir.Node:
        """The node whose step writes the value: reshapes are the same memory."""
        while isinstance(node.op, ir.Reshape) and self.native.covers(node):
            node = node.inputs[0]
        return node

    def _writable(self, node: ir.Node) -> bool:
        """Whether the node's value can be written anywhere we like, and has no place yet."""
        if node in self.home or not self.native.covers(node):
            return False
        if isinstance(node.op, ir.Slice):
            return self.native.scattered(node.inputs[0])
        return not isinstance(node.op, ir.Cast) and not self.native.scattered(node)

    def _place_outputs(self) -> None:
        position = 0
        for node in dict.fromkeys(o for o in self.graph.outputs if isinstance(o, ir.Node)):
            if not self.native.covers(node):
                continue
            root, view = self._root(node), None
            alone = not self._read_again(root) and not isinstance(root.op, ir.Slice)
            if self._writable(root) and (self.native.dtype == "float32" or alone):
                view = self.home[root] = self._new(root, position)
            else:
                view = self._new(node, position)
                self.drafts[view.buffer].segment = self.segment[self.graph.nodes[-1]]
                self.output_copies.append((node, view))
            self.results[node] = Tap(view, self.native.shapes[node])
            position += 1

    def _read_again(self, node: ir.Node) -> bool:
        """Whether native steps read the value too, whose operands have the plan's dtype."""
        return any(self.native.covers(u) for n in self._readers(node) for u in (n, *n.users) if u is not node)

    def _place_concats(self) -> None:
        for node in reversed(self.graph.nodes):
            if not isinstance(node.op, ir.Concat) or not self.native.covers(node):
                continue
            if node not in self.home:
                self.home[node] = self._new(node)
            whole, offset = self.home[node], 0
            for operand in node.inputs:
                root = self._root(operand)
                channels = self.native.map(operand)[3]
                part = View(whole.buffer, whole.offset + offset, channels)
                if (
                    self._writable(root)
                    and self.segment[root] == self.segment[node] == self.drafts[whole.buffer].segment
                    and self._fits(root, self.drafts[whole.buffer])
                ):
                    self.home[root] = part
                else:
                    self.copies.setdefault(node, []).append((operand, part))
                offset += channels

    def _fits(self, root: ir.Node, draft: _Draft) -> bool:
        """Whether the value may lie there in its dtype: elsewhere than in an output's float32 native steps read it only
        in the plan's, and a convolution writes all its columns in one.
        """
        read = any(self.native.covers(u) and not isinstance(u.op, VIEWS) for u in self._readers(root) if u is not root)
        return draft.dtype == self.native.dtype or not (read or isinstance(root.op, ir.Slice))

    def _place_rest(self) -> None:
        for node in self.graph.nodes:
            if self._writable(node) and not isinstance(node.op, ir.Reshape):
                self.home[node] = self._in_place(node) or self._new(node)

    def _in_place(self, node: ir.Node) -> View | None:
        """The residual's memory, or an element-wise step's input's, when nothing reads that afterwards."""
        if not isinstance(node.op, (ir.Conv, ir.Affine)) or not node.inputs:
            return None
        if isinstance(node.op, ir.Conv) and len(node.inputs) == 1:
            return None
        old = self._root(node.inputs[-1])
        view = self.home.get(old)
        if view is None or isinstance(old.op, ir.Slice) or self.native.map(node) != self.native.map(old):
            return None
        draft = self.drafts[view.buffer]
        whole = view.offset == 0 and view.channels == draft.map[3] and draft.output is None
        living = [n for n, v in self.home.items() if v.buffer == view.buffer]
        last = max(self.order[u] for n in living for u in self._readers(n))
        others = [i for i in node.inputs[:-1] if self._buffer_of(i) == view.buffer]
        kept = any(self._buffer_of(n) == view.buffer for n, _ in self.output_copies)
        if not whole or kept or last > self.order[node] or others or draft.segment != self.segment[node]:
            return None
        return view

    def _readers(self, node: ir.Node) -> list[ir.Node]:
        """The nodes that read the value's memory, through the views that nodes make of it."""
        found: dict[ir.Node, None] = {node: None}
        aliases = [node]
        while aliases:
            for user in aliases.pop().users:
                if user not in found and isinstance(user.op, VIEWS) and self.native.covers(user):
                    aliases.append(user)
                found[user] = None
        return list(found)

    def _buffer_of(self, node: ir.Node) -> int | None:
        root = self._root(node)
        while root not in self.home and isinstance(root.op, ir.Slice) and self.native.covers(root):
            root = self._root(root.inputs[0])
        return self.home[root].buffer if root in self.home else None

    # The steps.

    def _name(self, node: ir.Node, what: str) -> str:
        name = node.path or node.name
        return name if what == "" else f"{name}:{what}"

    def _add(self, step: Step, node: ir.Node | None, *views: View) -> None:
        for view in views:
            self.drafts[view.buffer].touched.append(len(self.steps))
        self.steps.append((step, node))
        if node is not None:
            self.names[node] = step.name

    def _read(self, node: ir.Node, segment: int) -> View:
        """Where a native step finds the value; brings it in when it was made outside."""
        root = self._root(node)
        if root in self.home:
            return self.home[root]
        if isinstance(root.op, ir.Slice) and self.native.covers(root):
            whole = self._read(root.inputs[0], segment)
            return View(whole.buffer, whole.offset + root.op.offset, root.op.channels)
        source = self.native.outside(root)
        if source not in self.imported:
            view = self._new(root)
            self.drafts[view.buffer].segment = segment
            self.imported[source] = view
            self._import(source, view, segment, None)
        return self.imported[source]

    def _import(self, source: ir.Node, view: View, segment: int, node: ir.Node | None) -> None:
        scale = shift = None
        if node is not None and isinstance(node.op, ir.Affine):
            scale, shift = optional(node.op.scale), optional(node.op.shift)
        self.sources.append((source, (*self.drafts[view.buffer].map[:3], view.channels)))
        name = self._name(source, "import") if node is None else self._name(node, "")
        step = ImportStep(name, len(self.sources) - 1, view, scale, shift)
        self._add(step, node, view)

    def _copy(self, node: ir.Node, view: View, segment: int) -> None:
        root = self._root(node)
        if not self.native.covers(root) or isinstance(root.op, ir.Cast):
            self._import(self.native.outside(root), view, segment, None)
        else:
            x = self._read(node, segment)
            self._add(EltwiseStep(self._name(root, "copy"), x, view), None, x, view)

    def _emit(self, node: ir.Node) -> None:
        segment = self.segment[node]
        if self.native.runs_in_torch(node):
            for source in node.inputs:
                if self.native.covers(source) and not isinstance(source.op, ir.Cast):
                    view = self._read(source, segment)
                    self.taps[source] = Tap(view, self.native.shapes[source])
                    self.drafts[view.buffer].touched.append(len(self.steps))
            self.steps.append((node, None))
        elif isinstance(node.op, ir.Concat) and self.native.covers(node):
            for operand, view in self.copies.get(node, []):
                self._copy(operand, view, segment)
        elif (
            self.native.covers(node)
            and (node in self.home or self.native.scattered(node))
            and not isinstance(node.op, ir.Slice)
        ):
            self._step(node, segment)

    def _step(self, node: ir.Node, segment: int) -> None:
        op = node.op
        source = self.native.imports(node)
        if source is not None:
            self._import(source, self.home[node], segment, node)
            return
        reads = [self._read(i, segment) for i in node.inputs]
        name = self._name(node, "")
        if isinstance(op, ir.Pair):
            self._pair(node, op, reads[0], segment)
        elif isinstance(op, (ir.Conv, ir.Linear)):
            step = self._conv(node, name, reads)
            self._add(step, node, *reads, *(o.view for o in step.outputs))
        else:
            self._add(self._simple(node, name, reads), node, *reads, self.home[node])

    def _conv(self, node: ir.Node, name: str, reads: list[View]) -> ConvStep:
        op = self.native.as_conv(node)
        residual = reads[1] if len(reads) > 1 else None
        spec = conv_spec(op, self.native.map(node.inputs[0]), residual is not None, self.native.dtype)
        return self._conv_step(name, op, spec, reads[0], self._outputs(node, op), residual)

    def _conv_step(
        self, name: str, op: ir.Conv, spec: ConvSpec, x: View, outputs: tuple[Output, ...], residual: View | None = None
    ) -> ConvStep:
        parts = tuple(map(strided, op.parts))
        arrays = (vector(op.scale, op.channels, 1.0), vector(op.shift, op.channels, 0.0))
        weight = parts if len(parts) > 1 else parts[0]
        return ConvStep(name, spec, x, weight, *arrays, outputs, residual, op.residual_scale, self._tile(name, spec))

    def _tile(self, name: str, spec: ConvSpec) -> Tile:
        if self.tiles is None:
            return (0, 0)
        found = self.chosen[name, spec] = self.tiles(spec)
        return found[0]

    def _outputs(self, node: ir.Node, op: ir.Conv) -> tuple[Output, ...]:
        """The column ranges' destinations: the slices' homes, or ranges of the node's own; neighbours alike are one."""
        if self.native.scattered(node):
            homes = {u.op.offset: self.home[u] for u in node.users if isinstance(u.op, ir.Slice)}
        else:
            homes, whole = {}, self.home[node]
        found: list[Output] = []
        offset = 0
        for column in op.columns:
            view = homes[offset] if homes else View(whole.buffer, whole.offset + offset, column.channels)
            last = found[-1] if found else None
            if (
                last
                and last.relu == column.relu
                and last.view.buffer == view.buffer
                and last.view.offset + last.view.channels == view.offset
            ):
                found[-1] = Output(View(view.buffer, last.view.offset, last.view.channels + view.channels), column.relu)
            else:
                found.append(Output(view, column.relu))
            offset += column.channels
        return tuple(found)

    def _pair(self, node: ir.Node, op: ir.Pair, x: View, segment: int) -> None:
        name, home = self._name(node, ""), self.home[node]
        dtype = self.native.dtype
        first = conv_spec(op.first, self.native.map(node.inputs[0]), dtype=dtype)
        if op.kind == "chain":
            second = conv_spec(op.second, (first.n, first.oh, first.ow, first.oc), dtype=dtype)
            plain = self.tiles is None or not any(any(self.tiles(spec)[0]) for spec in (first, second))
            local = plain and self.fuses(PairSpec(first, second, op.kind))
            self.drafts.append(_Draft((first.n, first.oh, first.ow, first.oc), dtype, None, segment, local))
            between = View(len(self.drafts) - 1, 0, first.oc)
            views, y1, y2, x2 = [x, between, home], between, home, between
        else:
            second = conv_spec(op.second, self.native.map(node.inputs[0]), dtype=dtype)
            y1 = View(home.buffer, home.offset, first.oc)
            y2 = View(home.buffer, home.offset + first.oc, second.oc)
            views, x2 = [x, home], x
        a = self._conv_step(f"{name}:first", op.first, first, x, (Output(y1, op.first.relu),))
        b = self._conv_step(f"{name}:second", op.second, second, x2, (Output(y2, op.second.relu),))
        self._add(PairStep(name, op.kind, a, b), node, *views)

    def _simple(self, node: ir.Node, name: str, reads: list[View]) -> Step:
        op, y = node.op, self.home[node]
        if isinstance(op, ir.Pool):
            spec = pool_spec(op, self.native.map(node.inputs[0]), self.native.dtype)
            return PoolStep(name, spec, reads[0], y, optional(op.shift), op.relu)
        if isinstance(op, ir.Affine):
            residual = reads[1] if len(reads) > 1 else None
            return EltwiseStep(
                name, reads[0], y, optional(op.scale), optional(op.shift), op.relu, residual, op.residual_scale
            )
        if isinstance(op, ir.Lrn):
            return LrnStep(name, reads[0], y, op.size, op.alpha, op.beta, op.k)
        if isinstance(op, ir.Normalize):
            return NormalizeStep(name, reads[0], y, op.eps)
        raise TypeError(f"no step for {node}")

    # The buffers' places and the calls.

    def _last(self, draft: _Draft) -> int:
        """The last step to which the buffer belongs. Of a call that reads what an earlier one wrote, the call's last:
        its steps wait for each other where their own buffers meet, and an input is none of them.
        """
        first, last = min(draft.touched), max(draft.touched)
        if any(isinstance(step, ir.Node) for step, _ in self.steps[first:last]):
            ends = (max(last, i - 1) for i in range(last, len(self.steps)) if isinstance(self.steps[i][0], ir.Node))
            last = next(ends, len(self.steps) - 1)
        return last

    def _finish(self) -> Program:
        arena = [i for i, d in enumerate(self.drafts) if d.output is None and d.touched and not d.local]
        drafts = [self.drafts[i] for i in arena]
        lives = [Lifetime(ITEM_BYTES[d.dtype] * math.prod(d.map), min(d.touched), self._last(d)) for d in drafts]
        positions, total = place_by_halves(lives)
        at = dict(zip(arena, positions, strict=True))
        buffers = []
        for i, draft in enumerate(self.drafts):
            kind, position = ("arena", at.get(i, 0)) if draft.output is None else ("output", draft.output)
            if draft.local:
                kind, position = "local", i
            buffers.append(Buffer(*draft.map, kind, position, draft.dtype))
        items: list[NativeItem | TorchItem] = []
        for alone, group in itertools.groupby(self.steps, key=lambda s: isinstance(s[0], ir.Node)):
            if alone:
                items += [TorchItem(node, self.native.reason(node)) for node, _ in group if isinstance(node, ir.Node)]
            else:
                items.append(segment(list(group), buffers, self.sources, total))  # type: ignore[arg-type]
        copies = sum(isinstance(s, EltwiseStep) and n is None for s, n in self.steps)
        outputs = tuple(self.results.get(o, o) if isinstance(o, ir.Node) else o for o in self.graph.outputs)
        return Program(
            self.graph, tuple(buffers), tuple(items), self.taps, outputs, total, self.names, copies, self.chosen
        )
