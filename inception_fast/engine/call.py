"""One captured call, read by the names of its schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from . import graph as ir


class Unsupported(Exception):
    """Why a captured call stays a torch call."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def known(sizes: Iterable[Any]) -> tuple[int, ...] | None:
    """Sizes or strides at the captured size, free ones by their example; None where values decide one of them."""
    hints = [size if isinstance(size, int) else size.node.hint for size in sizes]
    return None if None in hints else tuple(map(int, hints))


def known_shape(value: Any) -> ir.Shape | None:
    """The shape at the captured size; None for no tensor, or where values decide."""
    return known(value.shape) if isinstance(value, Tensor) else None


def hint_shape(value: Tensor) -> ir.Shape:
    """The same of a tensor. Raises Unsupported where values decide it."""
    shape = known_shape(value)
    if shape is None:
        raise Unsupported("a shape that depends on values")
    return shape


def sizes_of(value: Tensor) -> tuple[Any, ...]:
    """The sizes as the program has them: ints, and symbols where they are free."""
    found: list[Any] = list(value.shape)
    return tuple(int(d) if isinstance(d, int) or d.node.expr.is_number else d for d in found)


class Call:
    """One captured call with its arguments resolved, read by schema names.

    `value` is the captured fake result; `sizes` remembers the possibly free sizes of every node made so far. `read`:
    the positions of a tuple of results that anything reads.
    """

    def __init__(
        self,
        graph: ir.Graph,
        sizes: dict[ir.Node, tuple[Any, ...]],
        name: str,
        target: Any,
        arguments: tuple[Sequence[Any], dict[str, Any]],
        value: Any,
        path: str,
        read: frozenset[int] = frozenset(),
    ) -> None:
        self.graph, self.sizes, self.name, self.target, self.path = graph, sizes, name, target, path
        self.args, self.kwargs, self.value, self.read = tuple(arguments[0]), dict(arguments[1]), value, read

    def __getitem__(self, name: str) -> Any:
        for i, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if i < len(self.args):
                    return self.args[i]
                return self.kwargs.get(name, argument.default_value)
        raise KeyError(f"{self.target} has no argument {name!r}")

    def has(self, name: str) -> bool:
        return any(a.name == name for a in self.target._schema.arguments)

    def node(
        self, op: ir.Op, *inputs: ir.Node, name: str = "", like: Any = None, shape: ir.Shape | None = None
    ) -> ir.Node:
        """Appends a node with the shape and dtype of the captured result, or of `like`, or with `shape`."""
        value = self.value if like is None else like
        tensor = isinstance(value, Tensor)
        dtype = value.dtype if tensor else inputs[0].dtype if inputs else None
        made = ir.Node(name or self.name, op, inputs, shape=shape or known_shape(value), dtype=dtype)
        made.sources, made.path = (self.name,), self.path
        if tensor and shape is None:
            self.sizes[made] = sizes_of(value)
        return self.graph.append(made)

    @property
    def shape(self) -> ir.Shape:
        """Shape of the captured result."""
        return hint_shape(self.value)

    def map(self, name: str, *ranks: int) -> ir.Node:
        """The floating argument `name`, of one of the given ranks."""
        x = self[name]
        require(isinstance(x, ir.Node) and x.shape is not None, f"argument {name!r} is not a tensor")
        require(not isinstance(x.op, ir.Constant), f"argument {name!r} is a constant")
        require(x.dtype is not None and x.dtype.is_floating_point, f"dtype {x.dtype}; native steps compute in float32")
        require(len(x.shape) in ranks, f"rank {len(x.shape)}; native steps take rank {' or '.join(map(str, ranks))}")
        return x

    def constant(self, name: str) -> Tensor | None:
        """The argument `name` where it is a parameter or None."""
        x = self[name]
        if x is None:
            return None
        require(isinstance(x, ir.Node) and isinstance(x.op, ir.Constant), f"argument {name!r} is computed at run time")
        return x.op.value

    def numbers(self, name: str, count: int = 2) -> tuple[int, ...]:
        """An int or a list of ints as `count` ints."""
        values = self[name]
        values = [values] if isinstance(values, int) else list(values)
        require(all(isinstance(v, int) for v in values), f"argument {name!r} depends on the input size")
        require(len(values) in (1, count), f"{len(values)} values for {name!r}; allowed: 1 or {count}")
        return tuple(values * (count // len(values)))
