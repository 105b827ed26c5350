"""TensorFlow's RMSProp over many float32 parameters in one native pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import cpu


def is_dense(t: Tensor) -> bool:
    """Whether the elements of `t` fill one stretch of memory, in whatever order."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    squares: Sequence[Tensor],
    moments: Sequence[Tensor],
    rates: Sequence[float],
) -> None:
    """g = grad + wd p; square = decay square + (1 - decay) g^2; momentum = rate momentum + lr g / sqrt(square + eps);
    p -= momentum. All four of a parameter are dense with the same strides; rates: lr, decay, rate, eps, wd.
    """
    rows = [
        (p.data_ptr(), g.data_ptr(), s.data_ptr(), m.data_ptr(), p.numel())
        for p, g, s, m in zip(params, grads, squares, moments, strict=True)
    ]
    lr, decay, rate, epsilon, weight_decay = rates
    cpu.rmsprop_update(rows, (lr, decay, rate, epsilon, weight_decay), torch.get_num_threads())
    for changed in (*params, *squares, *moments):
        torch.autograd.graph.increment_version(changed)  # written behind torch's back
