"""Moves explicit padding into the four-sided padding of the convolution or pool behind it, where that says the same."""

from __future__ import annotations

from dataclasses import replace

from .. import graph as ir


def nonnegative(node: ir.Node) -> bool:
    """Whether no element can be below zero."""
    op = node.op
    if isinstance(op, ir.Relu):
        return True
    if isinstance(op, (ir.Conv, ir.Linear, ir.Affine)):
        return op.relu
    if isinstance(op, ir.Pool):
        return op.relu or (op.shift is None and nonnegative(node.inputs[0]))
    if isinstance(op, ir.Pad):
        return op.value >= 0 and nonnegative(node.inputs[0])
    if isinstance(op, (ir.Identity, ir.Concat, ir.Slice, ir.Reshape)):
        return all(nonnegative(i) for i in node.inputs)
    return False


def fold_padding(graph: ir.Graph) -> int:
    """conv(pad(x)) and pool(pad(x)) -> one call. Other readers of the padded map keep it."""
    count = 0
    for node in graph:
        pad = node.inputs[0] if node.inputs else node
        if not isinstance(pad.op, ir.Pad):
            continue
        op = _padded(node.op, pad)
        if op is not None:
            alone = graph.feeds_only(pad, node)
            graph.set(node, op, [pad.inputs[0], *node.inputs[1:]], absorb=[pad])
            if alone:
                graph.remove(pad)
            count += 1
    return count


def _padded(op: ir.Op, pad: ir.Node) -> ir.Op | None:
    assert isinstance(pad.op, ir.Pad)
    if not isinstance(op, (ir.Conv, ir.Pool)):
        return None
    top, bottom, left, right = (a + b for a, b in zip(op.padding, pad.op.padding, strict=True))
    total = (top, bottom, left, right)
    if isinstance(op, ir.Conv):
        return replace(op, padding=total) if pad.op.value == 0 else None
    # A window on nothing but padding would be minus infinity, or zero, and no pool here pads that far.
    if max(total[:2]) >= op.kernel[0] or max(total[2:]) >= op.kernel[1] or any(op.overhang):
        return None
    if op.kind == "max":
        # Zeros never win against values that are not negative; torch's own padding is minus infinity.
        same = pad.op.value == float("-inf") or (pad.op.value == 0 and nonnegative(pad.inputs[0]))
        return replace(op, padding=total) if same else None
    counts = op.count_include_pad or not any(op.padding)
    return replace(op, padding=total, count_include_pad=True) if pad.op.value == 0 and counts else None
