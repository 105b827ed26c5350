"""Fewer and wider matrix products: average pools commute with the 1x1 behind them, siblings on one input merge."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import graph as ir


def pointwise(node: ir.Node) -> bool:
    """A 1x1 convolution that is a plain matrix product over the pixels of one input."""
    op = node.op
    return (
        isinstance(op, ir.Conv)
        and op.kernel == (1, 1)
        and op.groups == 1
        and not any(op.padding)
        and len(node.inputs) == 1
    )


def commute_average_pool(graph: ir.Graph) -> int:
    """conv1x1(avgpool(x)) -> avgpool(conv1x1(x)), shift and ReLU behind the pool.

    Both are linear and act on different dimensions. The shift stays behind the pool, where padding that counts cannot
    dilute it. Done where the product then joins a sibling's, or where the pool gets fewer channels to read.
    """
    count = 0
    for node in graph:
        pool = node.inputs[0] if node.inputs else node
        op = pool.op
        if not pointwise(node) or not isinstance(op, ir.Pool) or op.kind != "avg" or op.stride != (1, 1):
            continue
        conv = node.op
        assert isinstance(conv, ir.Conv)
        source = pool.inputs[0]
        if conv.stride != (1, 1) or op.relu or op.shift is not None or not graph.feeds_only(pool, node):
            continue
        if pool.shape is None or source.shape is None or pool.shape[2:] != source.shape[2:]:
            continue
        sibling = any(pointwise(u) and u.op.stride == (1, 1) for u in source.users)  # type: ignore[attr-defined]
        if not sibling and conv.channels >= source.channels:
            continue
        if not (conv.relu or conv.linear):
            continue
        product = ir.Node(
            f"{node.name}_product",
            node.op,
            [source],
            shape=(source.shape[0], conv.channels, *source.shape[2:]),
            dtype=node.dtype,
        )
        product.op = replace(conv, shift=None, columns=(ir.Column(conv.channels, False),))
        product.sources, product.path = node.sources, node.path
        graph.insert_before(pool, product)
        graph.set(node, replace(op, shift=conv.shift, relu=conv.relu), [product], absorb=[pool])
        node.path = pool.path or node.path
        graph.remove(pool)
        count += 1
    return count


def merge_siblings(graph: ir.Graph) -> int:
    """1x1 convolutions of one input become one, whose columns their readers slice. Counts the convolutions gone."""
    groups: dict[tuple[int, tuple[int, int]], list[ir.Node]] = {}
    for node in graph:
        if pointwise(node) and isinstance(node.op, ir.Conv) and not graph.is_output(node):
            groups.setdefault((id(node.inputs[0]), node.op.stride), []).append(node)
    count = 0
    for members in groups.values():
        if len(members) > 1:
            _merge(graph, members)
            count += len(members) - 1
    return count


def _merge(graph: ir.Graph, members: list[ir.Node]) -> None:
    ops = [m.op for m in members if isinstance(m.op, ir.Conv)]
    first = members[0]
    assert first.shape is not None
    op = replace(
        ops[0],
        weight=tuple(part.detach() for o in ops for part in o.parts),
        columns=tuple(c for o in ops for c in o.columns),
        scale=_joined([o.scale for o in ops], ops, 1.0),
        shift=_joined([o.shift for o in ops], ops, 0.0),
    )
    name = "+".join(m.name for m in members)
    shape = (first.shape[0], op.channels, *first.shape[2:])
    merged = graph.insert_before(first, ir.Node(name, op, first.inputs, shape=shape, dtype=first.dtype))
    merged.path = shared_path([m.path or m.name for m in members])
    offset = 0
    for member, old in zip(members, ops, strict=True):
        merged.sources += member.sources
        member.sources = ()
        graph.set(member, ir.Slice(offset, old.channels), [merged])
        offset += old.channels


def _joined(parts: list[Tensor | None], ops: list[ir.Conv], default: float) -> Tensor | None:
    if all(p is None for p in parts):
        return None
    full = [
        torch.full((o.channels,), default, device="cpu") if p is None else p for p, o in zip(parts, ops, strict=True)
    ]
    return torch.cat([f.detach().double() for f in full])


def shared_path(paths: list[str]) -> str:
    """a.b.x and a.b.y -> a.b.{x,y}."""
    split = [p.split(".") for p in paths]
    depth = 0
    while all(len(s) > depth + 1 and s[depth] == split[0][depth] for s in split):
        depth += 1
    head = "".join(f"{part}." for part in split[0][:depth])
    return head + "{" + ",".join(".".join(s[depth:]) for s in split) + "}"
