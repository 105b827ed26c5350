"""A network's design along its depth: how much it holds at each point, what it costs, where it squeezes what it knows.

Only shapes are computed with, so that a network of any size takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

SHRINKS, GROWS = 0.5, 2.0  # of a bottleneck: to at most half of what was there, and back to at least twice that


@dataclass(frozen=True)
class Level:
    """A tensor that alone carries everything: whatever the network knows about its input passes through it.

    `shape` is without the batch; `values` counts its elements; `macs` and `params` are those spent since the level
    before, branches included; `depth` counts the operations up to it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: int
    macs: int
    params: int
    depth: int


@dataclass(frozen=True)
class Bottleneck:
    """A level to which the representation shrinks from `before` values and from which it grows again to `after`."""

    name: str
    shape: tuple[int, ...]
    values: int
    before: int
    after: int

    def __str__(self) -> str:
        size = "x".join(map(str, (*self.shape[1:], self.shape[0])))
        return (
            f"{self.name} ({size}): {self.before:,} values shrink to {self.values:,} and grow to {self.after:,} again"
        )


@dataclass(frozen=True)
class Design:
    """Levels from input to output, the bottlenecks among them, and the network's totals for one image."""

    model: str
    levels: tuple[Level, ...]
    bottlenecks: tuple[Bottleneck, ...]
    macs: int
    params: int

    @property
    def narrowest(self) -> int:
        """Values in the smallest level."""
        return min(level.values for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass
class _Node:
    """A tensor that an operation made of what depends on the input. `inputs` are numbers of nodes, `step` that of the
    operation.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    macs: int = 0
    params: int = 0
    path: str = ""
    step: int = 0
    last_use: int = field(default=-1)

    @property
    def values(self) -> int:
        return math.prod(self.shape)


class _Recorder(TorchDispatchMode):
    """Writes down every operation that depends on the inputs, with the module it happens in."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.alive: list[Tensor] = []  # an id means nothing once its tensor is gone
        self.number: dict[int, int] = {}
        self.tracker = ModuleTracker()
        self.steps = len(inputs)
        for step, x in enumerate(inputs):
            self._bind(x, _Node("input", "input", tuple(x.shape[1:]), (), step=step))

    def _bind(self, value: Tensor, node: _Node) -> None:
        self.nodes.append(node)
        self.alive.append(value)
        self.number[id(value)] = len(self.nodes) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        read = tuple(dict.fromkeys(self.number[id(x)] for x in leaves if id(x) in self.number))
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if read and made:
            formula = flop_registry.get(func._overloadpacket)
            macs = formula(*args, **kwargs, out_val=result) // 2 if formula else 0
            path = max((p for p in self.tracker.parents if p != "Global"), key=len, default="")
            kind = str(func._overloadpacket).split(".")[-1].rstrip("_")
            for x in reversed(made):  # the first last, for nobody may read the others
                work = macs if x is made[0] else 0
                self._bind(x, _Node(path, kind, tuple(x.shape[1:]), read, work, path=path, step=self.steps))
            self.steps += 1
        return result


def inspect(module: nn.Module, *inputs: Tensor) -> Design:
    """The design of any module for inputs of these shapes, [n, ...] each; multiply-adds are those of one image.

    A level is a point of the execution at which one tensor alone is still to be used. A bottleneck is a level among
    the maps that is at most half of the widest level before it and that twice as much is made from again: what did not
    fit through it is gone (arXiv:1512.00567, sections 2 and 5). Vectors behind the last map are not judged.

    Raises ValueError without inputs, with an empty batch and where the module reads none of them, and what the module
    raises for shapes it cannot take.
    """
    if not inputs or not all(isinstance(x, Tensor) and x.dim() >= 2 and len(x) for x in inputs):
        raise ValueError(f"inputs {[tuple(getattr(x, 'shape', ())) for x in inputs]}; allowed: [n, ...] with n >= 1")
    batch = len(inputs[0])
    with torch.inference_mode(False), torch.no_grad():  # inference mode shows layers whole, whose work nobody counts
        state = {name: _shape(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        shapes = [_shape(x) for x in inputs]
        with _Recorder(shapes) as recorder, recorder.tracker:
            result = torch.func.functional_call(module, state, tuple(shapes))
    nodes = recorder.nodes
    ends = [recorder.number[id(x)] for x in pytree.tree_leaves(result) if id(x) in recorder.number]
    _use(nodes, ends)
    _own_parameters(nodes, module)
    levels = _levels(nodes, type(module).__name__, batch)
    if not levels:
        raise ValueError(f"{type(module).__name__} makes its result without its input; allowed: a module that reads it")
    params = sum(p.numel() for p in module.parameters())
    return Design(type(module).__name__, levels, _bottlenecks(levels), sum(n.macs for n in nodes) // batch, params)


def _shape(tensor: Tensor) -> Tensor:
    """A new tensor like it without memory; one of inference mode would stay one on its way to "meta"."""
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _use(nodes: list[_Node], ends: Sequence[int]) -> None:
    for position, node in enumerate(nodes):
        for read in node.inputs:
            nodes[read].last_use = position
    for end in ends:
        nodes[end].last_use = len(nodes)


def _own_parameters(nodes: list[_Node], module: nn.Module) -> None:
    """Each module's own parameters belong to the first operation that happened in it."""
    root = type(module).__name__
    first: dict[str, _Node] = {}
    for node in nodes:
        first.setdefault(node.path.removeprefix(root).lstrip("."), node)
    for name, child in module.named_modules():
        owner = next((first[p] for p in first if p == name or p.startswith(f"{name}.")), None)
        if owner is not None:
            owner.params += sum(p.numel() for p in child.parameters(recurse=False))


def _levels(nodes: list[_Node], root: str, batch: int) -> tuple[Level, ...]:
    """The nodes that at some moment are the only ones still to be used; what only renames or rescales joins them."""
    found: list[Level] = []
    live: set[int] = set()
    spent = owned = 0
    for position, node in enumerate(nodes):
        spent, owned = spent + node.macs, owned + node.params
        live = {i for i in live if nodes[i].last_use > position} | ({position} if node.last_use > position else set())
        if len(live) != 1:
            continue
        held = nodes[(carrier := next(iter(live)))]
        name = held.path.removeprefix(root).lstrip(".") or held.kind
        if found and carrier == position and _only_rescales(held, nodes):
            before = found.pop()
            name = _common(before.name, name) or before.name
            level = Level(
                name, before.kind, before.shape, before.values, before.macs + spent // batch, before.params + owned,
                node.step,
            )  # fmt: skip
        elif carrier == position:
            level = Level(name, held.kind, held.shape, held.values, spent // batch, owned, node.step)
        else:
            continue
        found.append(level)
        spent = owned = 0
    return tuple(found)


def _only_rescales(node: _Node, nodes: list[_Node]) -> bool:
    """Normalisations, activations, views: the same values, each with another number."""
    same = len(node.inputs) == 1 and nodes[node.inputs[0]].values == node.values
    return same and not node.macs and "pool" not in node.kind and nodes[node.inputs[0]].kind != "input"


def _common(a: str, b: str) -> str:
    left, right = a.split("."), b.split(".")
    shared = [x for x, y in zip(left, right, strict=False) if x == y]
    return ".".join(shared)


def _bottlenecks(levels: Sequence[Level]) -> tuple[Bottleneck, ...]:
    """Local minima between two peaks, judged as `inspect` says."""
    maps = [i for i, level in enumerate(levels) if len(level.shape) == 3 and math.prod(level.shape[1:]) > 1]
    judged = levels[: maps[-1] + 1] if maps else ()
    found = []
    for i, level in enumerate(judged[:-1]):
        lowest = (i == 0 or judged[i - 1].values > level.values) and judged[i + 1].values >= level.values
        if not lowest or i == 0:
            continue
        before = _peak([x.values for x in judged[i::-1]])
        after = _peak([x.values for x in judged[i:]])
        if level.values <= SHRINKS * before and after >= GROWS * level.values:
            found.append(Bottleneck(level.name, level.shape, level.values, before, after))
    return tuple(found)


def _peak(values: Sequence[int]) -> int:
    """The height reached by going up from the first value, before the way leads down again."""
    height = values[0]
    for value in values[1:]:
        if value < height:
            break
        height = value
    return height
