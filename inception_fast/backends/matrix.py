"""1x1 convolutions of training on maps of few pixels as torch's product of two matrices: faster there than oneDNN's
convolution, and nearer to the exact sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Measured are those of v3's layers at batch 16 and 139x139 on 3x3 maps, of 1280 to 2048 channels: CONTRIBUTING.md. On
# 7x7 maps both take as long, and so do gradients of x.
MOST_PIXELS = 256
LEAST_CHANNELS = 128
# Others, as of torch.set_float32_matmul_precision, let products round what they read, and leave convolutions alone.
EXACT = ("none", "ieee")


def serves(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether conv2d(x, weight) is to be a product."""
    oc, c, kh, kw = weight.shape
    return (
        kh == kw == 1
        and x.dtype is weight.dtype is torch.float32
        and tuple(stride) == (1, 1)
        and not any(padding)
        and x.shape[1] == c
        and min(oc, c) >= LEAST_CHANNELS
        and 0 < x.numel() // c <= MOST_PIXELS
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.matmul.fp32_precision in EXACT  # type: ignore[attr-defined]
        and weight.stride()[:2] == (c, 1)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight) in channels_last."""
    n, c, h, w = x.shape
    y = torch.mm(x.permute(0, 2, 3, 1).view(n * h * w, c), weight.flatten(1).t())
    return y.view(n, h, w, weight.shape[0]).permute(0, 3, 1, 2)
