"""Captured calls whose result depends on how their operands lie in memory.

A program is captured with operands in one layout. When torch runs one of its calls, a native step may have left the
operand in channels_last, or a caller may have passed another layout than the example's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import known

Order = tuple[int, ...]
"""The dimensions of a dense tensor, from the largest stride to the smallest."""

aten = torch.ops.aten
AS_RESHAPE = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""What gives the same elements for any layout."""
LAYOUT_BOUND = {
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten.resize.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten._native_multi_head_attention.default,  # these make views of their operands inside
    aten._transformer_encoder_layer_fwd.default,
    aten.linalg_matrix_exp.default,
    aten.matrix_exp.default,
}
KNOWN = ("aten", "prims", "inception_fast")


def is_layout_bound(target: Any) -> bool:
    """Whether the call has to see its operands as they lay at capture: other libraries' operators may well have to."""
    return isinstance(target, torch._ops.OpOverload) and (target in LAYOUT_BOUND or target.namespace not in KNOWN)


def strides_order(value: Tensor) -> Order | None:
    """The dimensions from the largest stride to the smallest, those of one element first; None where values decide."""
    sizes, strides = known(value.shape), known(value.stride())
    if sizes is None or strides is None:
        return None
    return tuple(sorted(range(len(sizes)), key=lambda d: (sizes[d] != 1, -strides[d], d)))


def order_of(value: Tensor) -> Order | None:
    """The order of a captured operand's dimensions; None where it has gaps or overlaps."""
    sizes, strides, order = known(value.shape), known(value.stride()), strides_order(value)
    if sizes is None or strides is None or order is None:
        return None
    dense = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != dense:
            return None
        dense *= sizes[d]
    return order


def laid_out(value: Any, order: Order | None) -> Any:
    """The value, copied where its dimensions lie in another order; None: contiguous."""
    if not isinstance(value, Tensor):
        return value
    order = tuple(range(value.dim())) if order is None else order
    back = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def all_laid_out(values: Sequence[Any], orders: Sequence[Order | None]) -> list[Any]:
    return [laid_out(value, order) for value, order in zip(values, orders, strict=True)]
