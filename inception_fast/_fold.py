"""Batch norm with frozen statistics as a scale and a shift, kept until what they come from changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._gradients import Attached
from ._inferred_layer import Memo
from .backends.stamp import Stamp, can_stamp
from .backends.streams import Shared, capturing


def scale_and_shift(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm with its frozen statistics, and the convolution's bias, as [oc] scale and shift; differentiable.

    Computed in float64 and rounded once to float32 (float64 for a float64 layer).
    """
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None and var is not None
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = (var.double() + bn.eps).rsqrt()
    scale = scale if bn.weight is None else bn.weight.double() * scale
    offset = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
    shift = offset * scale if bn.bias is None else bn.bias.double() + offset * scale
    return scale.to(wide), shift.to(wide)


class Fold:
    """`scale_and_shift`, kept until a parameter or statistic changes. A copied or unpickled one starts empty."""

    def __init__(self) -> None:
        self._kept: tuple[float, tuple[Stamp | None, ...], Shared[tuple[Tensor, Tensor]]] | None = None
        self.memo: Memo | None = None  # of the layer's calls

    def __reduce__(self) -> tuple[type[Fold], tuple[()]]:
        return Fold, ()

    def __call__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:  # what comes may be a stand-in
            return scale_and_shift(conv, bn)
        learned, device = (bn.weight, bn.bias, conv.bias), conv.weight.device
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)):
            return self._values(conv, bn, learned, device)
        scale, shift = scale_and_shift(conv, bn)
        if device.type == "cpu":  # for what was packed with the kept ones
            kept = self._values(conv, bn, learned, device)
            scale, shift = Attached.apply(kept[0], scale), Attached.apply(kept[1], shift)
        return scale, shift

    def _values(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, learned: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        sources = (*learned, bn.running_mean, bn.running_var)
        apart = capturing(device)
        kept = None if apart else self._kept
        if kept is not None and kept[0] == bn.eps and kept[2].device == device:
            if all(map(_unchanged, kept[1], sources)):
                kept[2].follow()
                return kept[2].value
        # Ordinary tensors even inside inference mode: a later call outside of it may need them in a graph.
        with torch.inference_mode(False), torch.no_grad():
            values = scale_and_shift(conv, bn)
        if not apart and all(t is None or can_stamp(t) for t in sources):
            stamps = tuple(None if t is None else Stamp(t) for t in sources)
            self._kept = bn.eps, stamps, Shared(values, device)
        return values


def _unchanged(stamp: Stamp | None, tensor: Tensor | None) -> bool:
    if stamp is None or tensor is None:
        return stamp is None and tensor is None
    return stamp.holds(tensor)
