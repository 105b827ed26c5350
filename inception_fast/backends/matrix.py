"""1x1 convolutions of training on maps of few pixels as torch's product of two matrices, faster there than oneDNN's
convolution: it packs the weights in the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of v3's layers at batch 16 and 139x139 those on 3x3 maps, of 1280 to 2048 channels, were measured: CONTRIBUTING.md. On
# 7x7 maps both take as long.
MOST_PIXELS = 256
LEAST_CHANNELS = 128


def serves(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], channels: int = 1) -> bool:
    """Whether a float32 convolution of x by such a weight is to be a product, or where x is the gradient of its result
    that of its input; `channels`: the weight's dimension that x has.
    """
    oc, c, kh, kw = weight.shape
    return (
        kh == kw == 1
        and x.shape[1] == weight.shape[channels]
        and x.dtype is weight.dtype is torch.float32
        and tuple(stride) == (1, 1)
        and not any(padding)
        and min(oc, c) >= LEAST_CHANNELS
        and 0 < x.numel() // x.shape[1] <= MOST_PIXELS
        and torch.backends.mkl.is_available()
        and weight.stride()[:2] == (c, 1)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight) in channels_last."""
    return _product(x, weight.flatten(1).t())


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x."""
    return _product(grad, weight.flatten(1))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.mm(x.permute(0, 2, 3, 1).view(n * h * w, c), matrix)
    return y.view(n, h, w, matrix.shape[1]).permute(0, 3, 1, 2)
