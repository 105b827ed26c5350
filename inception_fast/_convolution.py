"""A convolution in training whose weight gradient is a native operation: checks, choice, gradients.

In float32 at stride 1 all three products may be native by Winograd's algorithm where a tile pays, by default the tile
whose error is like that of torch's sums, with `winograd` any; in bfloat16 forward and the gradient of x, by any tile or
by direct sums, where they are faster than torch's. The weight may be float32 beside a bfloat16 x, as autocast makes it;
its gradient is then summed and kept in float32. What the native kernels cannot take runs in torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from ._batch_norm import memory_format
from ._checks import check_operands
from ._gradients import differentiable

NHWC = torch.channels_last
SCHEMA = "(Tensor x, Tensor weight, int[] stride, int[] padding, bool winograd=False) -> Tensor"
INPUT_GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, bool winograd=False) -> Tensor"
)
GRADIENT_SCHEMA = INPUT_GRADIENT_SCHEMA
_BACKWARD = torch.ops.aten.convolution_backward.default


def kernel(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False) -> Tensor:
    check_operands(x, "weight", weight, torch.float32)
    if _is_ours(x):
        from .backends import matrix, train_conv

        if matrix.serves(x, weight, stride, padding):
            return matrix.forward(x, weight)
        y = train_conv.forward(x, weight, stride, padding, winograd)
        if y is not None:
            return y
    y = F.conv2d(x, weight.to(x.dtype), None, stride, padding)
    # torch goes by the stride of the batch too, which in a batch of one may be anything.
    return y.contiguous(memory_format=NHWC) if memory_format(x) is NHWC else y


def input_gradient_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False
) -> Tensor:
    """The gradient of `x`, in its layout."""
    dx = None
    if _is_ours(x):
        from .backends import train_conv

        dx = train_conv.backward(grad, weight, stride, padding, winograd)
    if dx is None:
        dx = _convolution_backward(grad, x, weight, stride, padding, 0)
    # The fake promises the strides of torch.empty_like(x).
    if dx.stride() == x.stride() or dx.stride() == torch.empty_like(x, device="meta").stride():
        return dx
    return torch.empty_like(x).copy_(dx)


def gradient_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False
) -> Tensor:
    """The gradient of `weight`, in its dtype."""
    # A named backend that has no such gradient leaves it to torch: forward and the gradient of x are torch's anyway.
    if weight.dtype is torch.float32 and _is_ours(x):
        from .backends import weight_gradient

        dw = weight_gradient.where_it_pays(grad, x, list(weight.shape[2:]), stride, padding, winograd)
        if dw is not None:
            return _laid_out_as(weight, dw)
    dw = _convolution_backward(grad, x, weight, stride, padding, 1).to(weight.dtype)
    return torch.empty_like(weight).copy_(dw)


def _laid_out_as(weight: Tensor, dw: Tensor) -> Tensor:
    """`dw`, in channels_last, with the weight's strides."""
    if dw.stride() == weight.stride():
        return dw
    _, c, kh, kw = weight.shape
    if kh * kw == 1 and weight.stride()[:2] == (c, 1):  # the same memory: strides of single elements mean nothing
        return dw.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(dw)


def _is_ours(x: Tensor) -> bool:
    """Whether the native CPU kernels are there and nothing else is asked for."""
    named = dispatch.current_backend()
    if named not in (None, "cpu") or x.device.type != "cpu":
        return False
    return dispatch.runs_on_cpu()


def fake(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False) -> Tensor:
    check_operands(x, "weight", weight, torch.float32)
    y = F.conv2d(x, weight.to(x.dtype), None, stride, padding)
    return y.contiguous(memory_format=NHWC) if memory_format(x) is NHWC else y


def input_gradient_fake(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False
) -> Tensor:
    return torch.empty_like(x)


def gradient_fake(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], winograd: bool = False
) -> Tensor:
    return torch.empty_like(weight)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.padding, ctx.winograd = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again, in torch's operations

        def convolved(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(x, weight.to(x.dtype), None, ctx.stride, ctx.padding)

        return (*differentiable(convolved, (x, weight), ctx.needs_input_grad[:2], grad), None, None, None)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.inception_fast.conv_input_gradient(grad, x, weight, ctx.stride, ctx.padding, ctx.winograd)
    if ctx.needs_input_grad[1]:
        dw = torch.ops.inception_fast.conv_weight_gradient(grad, x, weight, ctx.stride, ctx.padding, ctx.winograd)
    return dx, dw, None, None, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], which: int
) -> Tensor:
    mask = [which == 0, which == 1, False]
    narrow = weight.to(x.dtype)
    return _BACKWARD(grad, x, narrow, None, stride, padding, [1, 1], False, [0, 0], 1, mask)[which]  # type: ignore[no-any-return]
