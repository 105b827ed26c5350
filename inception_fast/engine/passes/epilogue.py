"""Moves what follows a convolution into its epilogue: batch norm, scalings, ReLU, the residual sum."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import graph as ir


def compose(
    first: tuple[Tensor | None, Tensor | None], second: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of second(first(x)), in float64; None stands for 1 and 0."""
    (s1, t1), (s2, t2) = first, second
    scale = s1 if s2 is None else s2.double() if s1 is None else s1.double() * s2.double()
    shift = t1
    if t1 is not None and s2 is not None:
        shift = t1.double() * s2.double()
    if t2 is not None:
        shift = t2.double() if shift is None else shift.double() + t2.double()
    return scale, shift


def fits(*values: Tensor | None) -> bool:
    """Whether a folded scale and shift are finite in float32: (x + 1) * inf is not inf * x + inf."""
    return all(value is None or bool(value.float().isfinite().all()) for value in values)


def fold_affine(graph: ir.Graph) -> int:
    """Batch norm and per-channel arithmetic join the scale and shift before them; the weights stay as they are."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Affine) or len(node.inputs) != 1:
            continue
        before = node.inputs[0]
        op = before.op
        if not graph.feeds_only(before, node):
            continue
        if not isinstance(op, (ir.Conv, ir.Linear, ir.Affine)) or len(before.inputs) > 1:
            continue
        if not (op.linear if isinstance(op, ir.Conv) else not op.relu):
            continue
        scale, shift = compose((op.scale, op.shift), (node.op.scale, node.op.shift))
        if not fits(scale, shift):
            continue
        joined = node.op if isinstance(op, ir.Affine) else op
        _join(graph, before, node, replace(joined, scale=scale, shift=shift))
        count += 1
    return count


def fold_relu(graph: ir.Graph) -> int:
    """A ReLU joins the epilogue of the step before it."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Relu):
            continue
        before = node.inputs[0]
        fused = ir.with_relu(before.op) if graph.feeds_only(before, node) else None
        if fused is not None:
            _join(graph, before, node, fused)
            count += 1
    return count


def lone_relu(graph: ir.Graph) -> int:
    """A ReLU that found no epilogue becomes an element-wise step."""
    count = 0
    for node in graph:
        if isinstance(node.op, ir.Relu):
            graph.set(node, ir.Affine(relu=True), node.inputs)
            count += 1
    return count


def fold_residual(graph: ir.Graph) -> int:
    """x + f(y) joins the epilogue of f where f is a convolution or per-channel arithmetic that nothing else reads."""
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Add):
            continue
        for branch in sorted(node.inputs, key=lambda i: not isinstance(i.op, ir.Conv)):
            other = node.inputs[1] if branch is node.inputs[0] else node.inputs[0]
            free = graph.feeds_only(branch, node) and len(branch.inputs) == 1 and other is not branch
            if free and isinstance(branch.op, ir.Conv) and branch.op.linear:
                _join(graph, branch, node, branch.op, other)
            elif free and isinstance(branch.op, ir.Affine) and not branch.op.relu:
                _join(graph, branch, node, branch.op, other)
            else:
                continue
            count += 1
            break
        else:
            graph.set(node, ir.Affine(), node.inputs)
    return count


def _join(graph: ir.Graph, before: ir.Node, node: ir.Node, op: ir.Op, *residual: ir.Node) -> None:
    """`node` becomes `op` over the inputs of `before`, which goes."""
    node.path = before.path or node.path
    graph.set(node, op, (*before.inputs, *residual), absorb=[before])
    graph.remove(before)


def fold_input_affine(graph: ir.Graph) -> int:
    """Per-channel arithmetic on an input joins the convolutions behind: w * (s * x + t) = (w * s) * x + sum(w * t).

    Exact only without padding, whose zeros enter after the arithmetic. Batch norms inside stay out of weights.
    """
    count = 0
    for node in graph:
        if not isinstance(node.op, ir.Affine) or node.op.relu or len(node.inputs) != 1 or graph.is_output(node):
            continue
        source = node.inputs[0]
        if not isinstance((source.inputs[0] if isinstance(source.op, ir.Cast) else source).op, ir.Input):
            continue
        if not node.users or not all(_unpadded(user, node) for user in node.users):
            continue
        for user in list(node.users):
            assert isinstance(user.op, ir.Conv)
            absorbed = _absorb_input(user.op, node.op)
            graph.set(user, absorbed, [source, *user.inputs[1:]], absorb=[node])
        graph.remove(node)
        count += 1
    return count


def _unpadded(user: ir.Node, node: ir.Node) -> bool:
    op = user.op
    return isinstance(op, ir.Conv) and not any(op.padding) and op.groups == 1 and node not in user.inputs[1:]


def _absorb_input(conv: ir.Conv, affine: ir.Affine) -> ir.Conv:
    weight, shift = torch.cat(conv.parts).double(), conv.shift
    if affine.shift is not None:
        extra = torch.einsum("ochw,c->o", weight, affine.shift.double())
        if conv.scale is not None:
            extra = extra * conv.scale.double()
        shift = extra if shift is None else shift.double() + extra
    if affine.scale is not None:
        weight = weight * affine.scale.double().reshape(1, -1, 1, 1)
    return replace(conv, weight=weight, shift=shift)
