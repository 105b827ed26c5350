"""Removes what inference does not need."""

from __future__ import annotations

from .. import graph as ir


def drop_identity(graph: ir.Graph) -> int:
    """Dropout, clones, casts to the same type and the like."""
    count = 0
    for node in graph:
        if isinstance(node.op, ir.Identity):
            graph.drop(node, f"{node.op.what}: computes nothing in inference, removed")
            count += 1
    return count


def flatten_concats(graph: ir.Graph) -> int:
    """cat([cat([a, b]), c]) -> cat([a, b, c]) where nothing else reads the inner one."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Concat):
            continue
        inner = [i for i in node.inputs if isinstance(i.op, ir.Concat) and graph.feeds_only(i, node)]
        if inner:
            operands = [j for i in node.inputs for j in (i.inputs if i in inner else (i,))]
            graph.set(node, node.op, operands, absorb=inner)
            for old in inner:
                graph.remove(old)
            count += len(inner)
    return count


def fold_flatten(graph: ir.Graph) -> int:
    """linear(reshape(x)) -> linear(x): a linear layer flattens its input itself."""
    count = 0
    for node in graph:
        if isinstance(node.op, ir.Linear) and isinstance(node.inputs[0].op, ir.Reshape):
            reshape = node.inputs[0]
            source = reshape.inputs[0]
            if source.shape is None or len(source.shape) not in (2, 4) or len(reshape.op.tail) != 1:  # type: ignore[attr-defined]
                continue
            alone = graph.feeds_only(reshape, node)
            graph.set(node, node.op, [source], absorb=[reshape])
            if alone:
                graph.remove(reshape)
            count += 1
    return count
