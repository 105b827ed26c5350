"""Forms the two-convolution steps: asymmetric pairs and parallel splits."""

from __future__ import annotations

from .. import graph as ir
from .merge import shared_path


def asymmetric(node: ir.Node) -> tuple[int, int] | None:
    """(height, width) of a plain 1xn or nx1 convolution with n > 1, else None."""
    op = node.op
    if not isinstance(op, ir.Conv) or op.stride != (1, 1) or op.groups != 1 or len(node.inputs) != 1:
        return None
    return op.kernel if 1 in op.kernel and max(op.kernel) > 1 else None


def across(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    """Whether one kernel is 1xn and the other nx1."""
    return a is not None and b is not None and (a[0] == 1) != (b[0] == 1)


def form_chains(graph: ir.Graph) -> int:
    """1xn then nx1, or the other order, where nothing else reads what stands between them."""
    count = 0
    for node in graph:
        first = node.inputs[0] if node.inputs else node
        if not across(asymmetric(first), asymmetric(node)) or not graph.feeds_only(first, node):
            continue
        assert isinstance(first.op, ir.Conv) and isinstance(node.op, ir.Conv)
        path = shared_path([first.path or first.name, node.path or node.name])
        graph.set(node, ir.Pair("chain", first.op, node.op), first.inputs, absorb=[first])
        node.path = path
        graph.remove(first)
        count += 1
    return count


def form_splits(graph: ir.Graph) -> int:
    """1xn beside nx1 on one input, written to neighbouring channels of a concatenation."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Concat):
            continue
        operands = list(node.inputs)
        i = 0
        while i + 1 < len(operands):
            a, b = operands[i], operands[i + 1]
            if _beside(graph, node, a, b):
                operands[i : i + 2] = [_split(graph, a, b)]
                count += 1
            i += 1
        if len(operands) == len(node.inputs):
            continue
        old = [i for i in dict.fromkeys(node.inputs) if i not in operands]
        graph.set(node, node.op, operands)
        for gone in old:
            graph.remove(gone)
        if len(operands) == 1:
            graph.drop(node, "concatenation of one split's halves: they are neighbours already")
    return count


def _beside(graph: ir.Graph, concat: ir.Node, a: ir.Node, b: ir.Node) -> bool:
    one_input = a is not b and bool(a.inputs) and a.inputs == b.inputs
    if not one_input or not across(asymmetric(a), asymmetric(b)) or a.shape is None or b.shape is None:
        return False
    return a.shape[2:] == b.shape[2:] and graph.feeds_only(a, concat) and graph.feeds_only(b, concat)


def _split(graph: ir.Graph, a: ir.Node, b: ir.Node) -> ir.Node:
    assert isinstance(a.op, ir.Conv) and isinstance(b.op, ir.Conv) and a.shape is not None
    op = ir.Pair("split", a.op, b.op)
    place = min(a, b, key=graph.nodes.index)
    pair = ir.Node(f"{a.name}+{b.name}", op, a.inputs, shape=(a.shape[0], op.channels, *a.shape[2:]), dtype=a.dtype)
    pair.sources, pair.path = (*a.sources, *b.sources), shared_path([a.path or a.name, b.path or b.name])
    return graph.insert_before(place, pair)
