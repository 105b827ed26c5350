"""Convolution, batch norm in training and ReLU as one operator, for GPUs, whose convolution leaves the statistics.

z, the convolution's result, is an output: the backward needs it. Only y has a gradient. That of batch norm and ReLU is
`batch_norm_relu`'s; those of the convolution are torch's, which on a GPU are cuDNN's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _batch_norm
from ._batch_norm import memory_format
from ._checks import check_operands
from ._gradients import differentiable

SCHEMA = (
    "(Tensor x, Tensor kernel, Tensor weight, Tensor bias, int[] stride, int[] padding, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def check(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> None:
    """Raises ValueError or TypeError for a convolution that no backend can serve."""
    check_operands(x, "kernel", kernel)
    c, seen = x.shape[1], tuple(kernel.shape)
    torch._check_value(seen[1] == c, lambda: f"kernel of shape {seen}; allowed: [oc, {c}, kh, kw]")
    fits = len(stride) == len(padding) == 2 and min(stride) >= 1 and min(padding) >= 0
    torch._check_value(fits, lambda: f"stride {stride}, padding {padding}; allowed: two numbers each, >= 1 and >= 0")


def kernel(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], eps: float
) -> Four:
    check(x, kernel, weight, bias, stride, padding)
    native = _batch_norm.native_kernels(x, "conv_batch_norm_relu")
    if hasattr(native, "convolved") and memory_format(x) is torch.channels_last:
        _batch_norm.check(_meta(x, kernel, stride, padding), weight, bias, eps)
        return native.convolved(x, kernel, weight, bias, stride, padding, eps)  # type: ignore[union-attr]
    z = _convolution(x, kernel, stride, padding)
    if memory_format(x) is torch.channels_last:  # torch goes by the stride of a batch of one too
        z = z.contiguous(memory_format=torch.channels_last)
    y, mean, var = _batch_norm.kernel(z, weight, bias, eps)
    return y, z, mean, var


def fake(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], eps: float
) -> Four:
    check(x, kernel, weight, bias, stride, padding)
    z = _convolution(x, kernel, stride, padding)
    if memory_format(x) is torch.channels_last:
        z = torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    return (*_batch_norm.fake(z, weight, bias, eps)[:1], z, torch.empty_like(weight), torch.empty_like(weight))


def setup(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    x, kernel, weight, bias, ctx.stride, ctx.padding, ctx.eps = inputs
    _, z, mean, var = output
    ctx.mark_non_differentiable(z, mean, var)
    ctx.save_for_backward(x, kernel, weight, bias, z, mean, var)


def backward(ctx: Any, grad: Tensor, *of_others: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel, weight, bias, z, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # to be differentiated again

        def layer(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _batch_norm.result(_convolution(x, kernel, ctx.stride, ctx.padding), weight, bias, ctx.eps)

        return (*differentiable(layer, (x, kernel, weight, bias), needs, grad), None, None, None)
    dz, dweight, dbias = torch.ops.inception_fast.batch_norm_relu_backward(grad, z, weight, bias, mean, var, ctx.eps)
    mask = [needs[0], needs[1], False]
    dx, dkernel, _ = torch.ops.aten.convolution_backward(
        dz, x, kernel, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, mask
    )
    return dx, dkernel, dweight, dbias, None, None, None


def _convolution(x: Tensor, kernel: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    return torch.ops.aten.convolution(x, kernel, None, stride, padding, [1, 1], False, [0, 0], 1)


def _meta(x: Tensor, kernel: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The result's shape and dtype without memory."""
    return _convolution(x.to("meta"), kernel.to("meta"), stride, padding)
