"""One module per backend, each with `reasons(spec)`, `prepare(spec, params, x, residual, residual_scale)` and
`run(prepared, x, residual, memory_format)`. `params` are (weight, scale, shift) triples, one per convolution of the
spec.
"""

from __future__ import annotations

import torch
from torch import Tensor

Params = tuple[tuple[Tensor, Tensor, Tensor], ...]


def laid_out(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`y` with exactly the strides that `torch.empty` gives, those of single-element dimensions included."""
    _, c, h, w = y.shape
    nhwc = memory_format is torch.channels_last
    if y.stride() == ((c * h * w, 1, c * w, c) if nhwc else (c * h * w, h * w, w, 1)):
        return y
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format).copy_(y)
