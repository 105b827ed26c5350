"""Batch norm in training with its ReLU: the native kernels for float32 and bfloat16 maps in channels_last, and torch.

x and y [n, c, h, w]; weight, bias and the statistics [c], in float32 for all but float64 maps; `var` is divided by the
count. A gradient's channels may lie in a wider map, as those of a branch do behind a concatenation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu
from .pitch import pixel_pitch

NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Statistics = tuple[Tensor, Tensor]
Running = tuple[Tensor, Tensor, Tensor, float]  # mean, var, batches seen, share of the new batch
Three = tuple[Tensor, Tensor, Tensor]


def reasons(x: Tensor) -> list[str]:
    """Why the native kernels cannot take the map x; empty when they can."""
    found = [] if x.dtype in NATIVE else [f"dtype {x.dtype}; the CPU kernels take float32 and bfloat16"]
    if not x.is_contiguous(memory_format=torch.channels_last):
        found.append("a map that is not in channels_last")
    if x.device.type != "cpu":
        found.append(f"a map on {x.device}")
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    memory_format: torch.memory_format,
    running: Running | None = None,
) -> Three:
    """(y, mean, var) with y = relu(weight * (x - mean) / sqrt(var + eps) + bias), by the native kernels, which take the
    batch into dense `running` statistics.
    """
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=memory_format, device="cpu")
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    weight, bias = weight.contiguous(), bias.contiguous()
    pointers = (weight.data_ptr(), bias.data_ptr())
    moved = (0, 0, 0) if running is None else (running[0].data_ptr(), running[1].data_ptr(), running[2].data_ptr())
    cpu.batch_norm_relu(
        cpu.default_tier(),
        NATIVE[x.dtype],
        _shape(x),
        x.data_ptr(),
        pointers,
        eps,
        y.data_ptr(),
        (mean.data_ptr(), var.data_ptr()),
        moved,
        0.0 if running is None else running[3],
        torch.get_num_threads(),
    )
    if running is not None:
        torch.autograd.graph.increment_version(running[:3])  # written behind torch's back
    return y, mean, var


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, eps: float) -> Three:
    """Gradients of x (in channels_last), weight and bias, by the native kernels."""
    x = x.contiguous(memory_format=torch.channels_last)  # hooks on saved tensors may return it in another layout
    pitch = pixel_pitch(grad)
    if pitch is None or grad.dtype is not x.dtype:
        grad, pitch = grad.to(x.dtype).contiguous(memory_format=torch.channels_last), x.shape[1]
    dx = torch.empty_like(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    mean, var = (part.contiguous() for part in statistics)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    cpu.batch_norm_relu_backward(
        cpu.default_tier(),
        NATIVE[x.dtype],
        _shape(x),
        x.data_ptr(),
        (weight.data_ptr(), bias.data_ptr()),
        eps,
        grad.data_ptr(),
        pitch,
        (mean.data_ptr(), var.data_ptr()),
        (dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


def _shape(x: Tensor) -> tuple[int, int]:
    n, c, h, w = x.shape
    return n * h * w, c
