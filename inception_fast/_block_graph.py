"""What the `forward` of a block does, found by a symbolic trace in which every child stays one call."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
SUMS, PRODUCTS, JOINS = (operator.add, torch.add), (operator.mul, torch.mul), (torch.cat, torch.concat)


class Shallow(fx.Tracer):
    """Traces a block's own `forward`; every child stays one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def step(block: nn.Module, node: fx.Node) -> Any:
    """The child that a node calls, "relu" for a function, None for anything else."""
    if node.op == "call_module" and not node.kwargs:
        return operator.attrgetter(str(node.target))(block)
    is_relu = node.target in RELU_FUNCTIONS if node.op == "call_function" else node.target in ("relu", "relu_")
    return "relu" if node.op in ("call_function", "call_method") and is_relu else None


class ResidualForm(NamedTuple):
    """act(x + scale * conv(concat(branches(x)))): names of children. relu: of its module, "" for a function, None for
    the identity.
    """

    branches: tuple[str, ...]
    conv: str
    relu: str | None


def residual_form(block: nn.Module) -> ResidualForm | None:
    """The form of a residual block, in training and in evaluation; its attribute `scale` is the factor."""
    scale = vars(block).get("scale")
    if not isinstance(scale, (int, float)) or not any(type(child) is nn.Conv2d for child in block.children()):
        return None
    was_training, found = block.training, set()
    try:
        for mode in (True, False):
            block.training = mode
            try:
                found.add(_residual(block, Shallow().trace(block), scale))
            except Exception:  # whatever the block's own code raises on a proxy: then it is no such block
                return None
    finally:
        block.training = was_training
    return found.pop() if len(found) == 1 else None


def _residual(block: nn.Module, graph: fx.Graph, scale: float) -> ResidualForm | None:
    nodes = list(graph.nodes)
    x, node, relu = nodes[0], nodes[-1].args[0], None
    if x.op != "placeholder" or not isinstance(node, fx.Node):
        return None
    last = step(block, node)
    if last == "relu" or type(last) is nn.ReLU:
        relu, node = ("" if last == "relu" else str(node.target)), node.args[0]
    parts = [node]
    for functions, other in ((SUMS, x), (PRODUCTS, scale)):
        parts.append(_beside(parts[-1], functions, other))
    *_, conv = parts
    if conv is None or conv.op != "call_module" or type(step(block, conv)) is not nn.Conv2d or len(conv.args) != 1:
        return None
    joined = conv.args[0]
    if not isinstance(joined, fx.Node) or joined.target not in JOINS or not _along_channels(joined):
        return None
    calls: Any = joined.args[0]
    if any(call.op != "call_module" or call.args != (x,) or call.kwargs for call in calls):
        return None
    names = [str(call.target) for call in (*calls, conv)] + ([relu] if relu else [])
    inner = [*calls, joined, conv, *parts[:-1]]
    whole = len(nodes) == 2 + len(inner) + (relu is not None) and all(len(node.users) == 1 for node in inner)
    if not whole or any("." in name for name in names) or len(set(names)) != len(names):
        return None
    return ResidualForm(tuple(names[: len(calls)]), names[len(calls)], relu)


def _beside(node: fx.Node | None, functions: tuple[Any, ...], other: Any) -> fx.Node | None:
    """The node that a sum or product has beside `other`, in either order."""
    if node is None or node.op != "call_function" or node.target not in functions or node.kwargs or len(node.args) != 2:
        return None
    for mine, its in (node.args, node.args[::-1]):
        same = its is other or (type(its) is type(other) and its == other)
        if same and isinstance(mine, fx.Node) and mine is not other:
            return mine
    return None


def _along_channels(node: fx.Node) -> bool:
    rest = node.args[1:] + tuple(node.kwargs.values())
    return rest == (1,) and set(node.kwargs) <= {"dim"} and isinstance(node.args[0], (list, tuple))
