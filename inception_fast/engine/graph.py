"""The engine's own graph: nodes with explicit inputs and shapes, small enough to read and to rewrite.

Values are logically NCHW. Parameters keep the tensors of the captured module; folded scales and shifts are float64, so
that every pass is exact and rounding happens once, when a plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Op:
    """What a node computes from its inputs. Frozen: passes make new ones."""


@dataclass(frozen=True, eq=False)
class Input(Op):
    """Argument number `index` of the module, counted over its tensor leaves."""

    index: int


@dataclass(frozen=True, eq=False)
class Constant(Op):
    """A parameter, a buffer, or what was computed from them alone; `dtype` is what torch calls see of it."""

    value: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Identity(Op):
    """Computes nothing in inference; `what` says what it was (dropout, clone ...)."""

    what: str


@dataclass(frozen=True)
class Column:
    """A range of output channels of a convolution, and whether it passes a ReLU."""

    channels: int
    relu: bool


@dataclass(frozen=True, eq=False)
class Conv(Op):
    """`ConvSpec`'s formula over inputs (x) or (x, residual).

    weight is [oc, c / groups, kh, kw], or several such that follow each other along oc: merged siblings keep their
    parameters, not a copy. None means scale 1, shift 0.
    """

    weight: Tensor | tuple[Tensor, ...]
    columns: tuple[Column, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    residual_scale: float = 1.0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    @property
    def kernel(self) -> tuple[int, int]:
        return self.parts[0].shape[2], self.parts[0].shape[3]

    @property
    def channels(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def relu(self) -> bool:
        """Whether all columns pass a ReLU."""
        return all(c.relu for c in self.columns)

    @property
    def linear(self) -> bool:
        """Whether no column passes a ReLU."""
        return not any(c.relu for c in self.columns)


@dataclass(frozen=True, eq=False)
class Linear(Op):
    """y = act(scale * (x @ weight.T) + shift); x is [n, f], or [n, c, h, w] that it flattens."""

    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Pair(Op):
    """Two convolutions as one call. "chain": second reads first. "split": both read x, the result joins them."""

    kind: str
    first: Conv
    second: Conv

    @property
    def channels(self) -> int:
        return self.second.channels + (self.first.channels if self.kind == "split" else 0)


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """y = act(pool(x) + shift), with the fields of `PoolSpec`."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = False
    overhang: tuple[int, int] = (0, 0)
    shift: Tensor | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """y = act(residual + residual_scale * (scale * x + shift)) per channel; inputs (x) or (x, residual)."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Relu(Op):
    """y = max(x, 0)."""


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Sum of two values of equal shape."""


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """Concatenation along the channels."""


@dataclass(frozen=True, eq=False)
class Slice(Op):
    """Channels [offset, offset + channels)."""

    offset: int
    channels: int


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """Constant padding (top, bottom, left, right) of a map, each at least 0."""

    padding: tuple[int, int, int, int]
    value: float


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """The same elements in the same order as [n, *tail]."""

    tail: Shape


@dataclass(frozen=True, eq=False)
class Cast(Op):
    """To `dtype`, rounding to nearest."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Lrn(Op):
    """Local response normalisation across channels, torch's formula."""

    size: int
    alpha: float
    beta: float
    k: float


@dataclass(frozen=True, eq=False)
class Normalize(Op):
    """x / max(||x||_2, eps), the norm over dimension 1."""

    eps: float


@dataclass(frozen=True)
class Ref:
    """Stands for input number `index` of a node inside a captured call's arguments."""

    index: int


@dataclass(frozen=True, eq=False)
class Torch(Op):
    """A captured call that no native step covers; `reason` says why.

    orders: of a call that has to see its inputs as they lay at capture, the order of each input's dimensions.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reason: str
    orders: tuple[tuple[int, ...] | None, ...] | None = None


class Node:
    """One value. `sources` are the captured calls it stands for; `users` has one entry for each use by a node."""

    def __init__(
        self, name: str, op: Op, inputs: Iterable[Node] = (), *, shape: Shape | None, dtype: torch.dtype | None
    ) -> None:
        self.name = name
        self.op = op
        self.inputs: tuple[Node, ...] = tuple(inputs)
        self.shape = shape
        self.dtype = dtype
        self.sources: tuple[str, ...] = ()
        self.path = ""
        self.users: list[Node] = []
        for source in self.inputs:
            source.users.append(self)

    def __repr__(self) -> str:
        return f"{self.name} = {type(self.op).__name__}({', '.join(i.name for i in self.inputs)}) -> {self.shape}"

    @property
    def channels(self) -> int:
        assert self.shape is not None
        return self.shape[1]


@dataclass(frozen=True)
class Captured:
    """One call of the captured program: its name, operator, module path and output shape at the captured size."""

    name: str
    target: str
    path: str
    shape: Shape | None


@dataclass
class Graph:
    """Nodes in execution order. `outputs` holds nodes and literals, in the flattened order of the module's result.

    dynamic: whether it serves other batches than the captured one: those for which the symbolic `guards` hold.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    captured: dict[str, Captured] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dynamic: bool = False
    guards: tuple[Any, ...] = ()

    def serves(self, batch: int) -> bool:
        """Whether the module, asked what it asked at capture, would give the same answers for this batch."""
        return all(_holds(guard, batch) for guard in self.guards)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self.nodes))

    def is_output(self, node: Node) -> bool:
        return any(o is node for o in self.outputs)

    def feeds_only(self, node: Node, user: Node) -> bool:
        """Whether `user` is the one and only use of `node`."""
        return len(node.users) == 1 and node.users[0] is user and not self.is_output(node)

    def append(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def insert_before(self, place: Node, node: Node) -> Node:
        self.nodes.insert(self.nodes.index(place), node)
        return node

    def insert_after(self, place: Node, node: Node) -> Node:
        self.nodes.insert(self.nodes.index(place) + 1, node)
        return node

    def set(self, node: Node, op: Op, inputs: Iterable[Node], absorb: Iterable[Node] = ()) -> None:
        """Gives `node` a new op and inputs; it takes over the sources of `absorb`."""
        for source in node.inputs:
            source.users.remove(node)
        node.op, node.inputs = op, tuple(inputs)
        for source in node.inputs:
            source.users.append(node)
        for other in absorb:
            node.sources = tuple(dict.fromkeys(other.sources + node.sources))

    def replace(self, old: Node, new: Node) -> None:
        """Every use of `old`, as an output too, becomes a use of `new` (but not `new`'s own)."""
        for user in {id(u): u for u in old.users}.values():
            if user is not new:
                self.set(user, user.op, (new if i is old else i for i in user.inputs))
        self.outputs = [new if o is old else o for o in self.outputs]

    def drop(self, node: Node, note: str) -> None:
        """Removes a one-input node that computes nothing; its users read its input."""
        self.replace(node, node.inputs[0])
        for source in node.sources:
            self.notes.setdefault(source, note)
        self.remove(node)

    def remove(self, node: Node) -> None:
        if node.users or self.is_output(node):
            raise ValueError(f"{node} is still used")
        for source in node.inputs:
            source.users.remove(node)
        self.nodes.remove(node)

    def copy(self) -> Graph:
        """A graph that can be rewritten without touching this one; ops and tensors are shared."""
        new: dict[int, Node] = {}
        result = Graph(captured=self.captured, notes=dict(self.notes), dynamic=self.dynamic, guards=self.guards)
        for node in self.nodes:
            twin = Node(node.name, node.op, (new[id(i)] for i in node.inputs), shape=node.shape, dtype=node.dtype)
            twin.sources, twin.path = node.sources, node.path
            new[id(node)] = result.append(twin)
        result.inputs = [new[id(i)] for i in self.inputs]
        result.outputs = [new[id(o)] if isinstance(o, Node) else o for o in self.outputs]
        return result


def _holds(guard: Any, batch: int) -> bool:
    try:
        return bool(guard.subs(dict.fromkeys(guard.free_symbols, batch)))
    except (TypeError, ZeroDivisionError):  # no answer for this batch
        return False


def prune(graph: Graph) -> int:
    """Removes the nodes that no output needs; inputs stay. Returns how many went."""
    removed = 0
    for node in reversed(graph.nodes[:]):
        if not node.users and not graph.is_output(node) and not isinstance(node.op, Input):
            graph.remove(node)
            removed += 1
    return removed


def same(a: Graph, b: Graph) -> bool:
    """Whether two graphs compute the same from the same parameters, whatever their shapes."""
    if len(a.nodes) != len(b.nodes) or len(a.outputs) != len(b.outputs):
        return False
    pairs = list(zip(a.nodes, b.nodes, strict=True))
    twin = {id(x): y for x, y in pairs}

    def matches(x: Any, y: Any) -> bool:
        return twin[id(x)] is y if isinstance(x, Node) else _equal(x, y)

    return all(
        _equal(x.op, y.op) and len(x.inputs) == len(y.inputs) and all(map(matches, x.inputs, y.inputs))
        for x, y in pairs
    ) and all(map(matches, a.outputs, b.outputs))


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)
    if isinstance(a, Op):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b)


def with_leaves(op: Op, kinds: type | tuple[type, ...], change: Callable[[Any], Any]) -> Op:
    """The op with `change` of each of the given kinds among its fields, tensors and constants of a call included."""
    twin = object.__new__(type(op))
    twin.__dict__.update({name: pytree.tree_map_only(kinds, change, value) for name, value in vars(op).items()})
    return twin


def tensors_of(op: Op) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(vars(op).values())) if isinstance(leaf, Tensor)]


def convolutions(graph: Graph) -> int:
    """Convolutions that the graph runs, each part of a pair counted, linear layers not."""
    return sum(2 if isinstance(n.op, Pair) else 1 for n in graph.nodes if isinstance(n.op, (Conv, Pair)))


def with_relu(op: Op) -> Op | None:
    """`op` with a ReLU at its end, or None where its epilogue has no room for one."""
    if isinstance(op, Conv) and op.linear:
        return replace(op, columns=tuple(replace(c, relu=True) for c in op.columns))
    if isinstance(op, (Linear, Pool, Affine)) and not op.relu:
        return replace(op, relu=True)
    return None
