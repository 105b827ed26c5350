"""Operands of a convolution as training leaves them, and the truth in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from conv_shapes import ConvShape

Operands = tuple[Tensor, Tensor, Tensor]


def device_of(backend: str) -> str:
    """Where a backend's tensors live."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def image(shape: ConvShape, batch: int = 1) -> Tensor:
    """[batch, c, h, w], channels_last, behind a ReLU."""
    x = torch.randn(batch, shape.c, shape.h, shape.w, generator=torch.Generator().manual_seed(0)).relu()
    return x.to(memory_format=torch.channels_last)


def operands(shape: ConvShape) -> Operands:
    """weight [oc, c / groups, kh, kw], scale and shift [oc]."""
    generator = torch.Generator().manual_seed(1)
    depth = shape.c // shape.groups * shape.kh * shape.kw
    weight = torch.randn(shape.oc, shape.c // shape.groups, shape.kh, shape.kw, generator=generator) / depth**0.5
    return weight, torch.rand(shape.oc, generator=generator) + 0.5, 0.1 * torch.randn(shape.oc, generator=generator)


def exact(x: Tensor, shape: ConvShape, parts: Operands) -> Tensor:
    """relu(scale * conv(x) + shift) in float64."""
    weight, scale, shift = (part.double() for part in parts)
    top, bottom, left, right = shape.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    y = F.conv2d(padded, weight, stride=shape.stride, groups=shape.groups)
    return torch.relu(y * scale[:, None, None] + shift[:, None, None])


def macs(shape: ConvShape) -> int:
    top, bottom, left, right = shape.padding
    rows = (shape.h + top + bottom - shape.kh) // shape.stride + 1
    columns = (shape.w + left + right - shape.kw) // shape.stride + 1
    return rows * columns * shape.oc * (shape.c // shape.groups) * shape.kh * shape.kw
