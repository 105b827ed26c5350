"""Gradients of the operations, written in differentiable torch operations so that they can be differentiated again.

Nothing but inputs and y is saved: the ReLU's mask is y > 0, a pair's intermediate is computed again, and the gradient
of scale is the weight's own gradient summed against the weight. Computed in float32 at least, rounded once to the dtype
of each input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ._checks import same_padding

Grads = tuple[Tensor | None, ...]


def differentiable(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of call(*inputs), in torch's operations, that `needs` asks for, to be differentiated again.

    Of views, for one input may depend on another: what a layer reads of its own result does on its weights.
    """
    own = [tensor.view_as(tensor) if needed else tensor for tensor, needed in zip(inputs, needs, strict=True)]
    leaves = [tensor for tensor, needed in zip(own, needs, strict=True) if needed]
    with _unrounded(grad):
        grads = iter(torch.autograd.grad(call(*own), leaves, grad, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


class Attached(Function):
    """`kept` where it lies, for who looks for what was packed of it, with the gradient of `value`, which it equals."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return kept.detach()  # in the very strides, which a view would not keep

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def _unrounded(tensor: Tensor) -> AbstractContextManager[Any]:
    """Out of autocast, which may be on in a backward alone and would round what is computed again there."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class _Conv(NamedTuple):
    """scale * conv(x, weight) + shift, in one dtype."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: list[int]
    padding: tuple[int, int, int, int]

    def symmetric(self) -> tuple[Tensor, list[int]]:
        """The input and the padding torch takes: a lopsided padding goes into the input."""
        top, bottom, left, right = self.padding
        if (top, left) == (bottom, right):
            return self.x, [top, left]
        return F.pad(self.x, (left, right, top, bottom)), [0, 0]

    def forward(self) -> Tensor:
        x, padding = self.symmetric()
        with _unrounded(x):
            y = F.conv2d(x, self.weight, None, self.stride, padding)
        return y * _column(self.scale) + _column(self.shift)

    def backward(self, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of x, weight, scale and shift, those that `needs` asks for, from that of the formula's value."""
        x, padding = self.symmetric()
        dx = dw = dscale = None
        if needs[0]:
            dx = self._convolution_backward(grad * _column(self.scale), x, padding, 0)
            if x is not self.x:
                top, _, left, _ = self.padding
                dx = dx[:, :, top : top + self.x.shape[2], left : left + self.x.shape[3]]
        if needs[1] or needs[2]:
            unscaled = self._convolution_backward(grad, x, padding, 1)
            dw = unscaled * self.scale.reshape(-1, 1, 1, 1)
            dscale = (unscaled * self.weight).sum((1, 2, 3))
        return [dx, dw, dscale, grad.sum((0, 2, 3)) if needs[3] else None]

    def _convolution_backward(self, grad: Tensor, x: Tensor, padding: list[int], which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        backward = torch.ops.aten.convolution_backward
        return backward(grad, x, self.weight, None, self.stride, padding, [1, 1], False, [0, 0], 1, mask)[which]


def _column(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def _widened(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(wide) for tensor in tensors]


def _narrowed(grads: list[Tensor | None], inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Each gradient in the dtype of its input; None where none is asked for."""
    triples = zip(grads, inputs, needs, strict=True)
    return [grad.to(tensor.dtype) if needed and grad is not None else None for grad, tensor, needed in triples]


def _through_relu(grad: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, y, 0)


def conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, residual, ctx.stride, ctx.padding, ctx.relu, residual_scale, *_ = inputs
    ctx.residual_scale = 1.0 if residual is None else residual_scale
    ctx.save_for_backward(x, weight, scale, shift, *((output,) if ctx.relu else ()))


def conv_backward(ctx: Any, grad: Tensor) -> Grads:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad  # asked for once: a checkpoint gives them out once
    inputs = saved[:4]
    outer = _through_relu(grad, saved[4]) if ctx.relu else grad
    x, weight, scale, shift = _widened(inputs)
    inner = outer.to(x.dtype) if ctx.residual_scale == 1.0 else outer.to(x.dtype) * ctx.residual_scale
    grads = _Conv(x, weight, scale, shift, ctx.stride, ctx.padding).backward(inner, needs[:4])
    return (*_narrowed(grads, inputs, needs[:4]), outer if needs[4] else None, *(None,) * 6)


def pair_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], output)


def chain_backward(ctx: Any, grad: Tensor) -> Grads:
    *inputs, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first, second = _pair_convs(tuple(inputs))
    middle = torch.relu(first.forward())
    second = second._replace(x=middle)
    dmiddle, *grads2 = second.backward(_through_relu(grad, y).to(middle.dtype), (any(needs[:4]), *needs[4:7]))
    grads1: list[Tensor | None] = [None] * 4
    if dmiddle is not None:
        grads1 = first.backward(_through_relu(dmiddle, middle), needs[:4])
    return (*_narrowed([*grads1, *grads2], tuple(inputs), needs[:7]), None, None)


def split_backward(ctx: Any, grad: Tensor) -> Grads:
    *inputs, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first, second = _pair_convs(tuple(inputs))
    left, right = _through_relu(grad, y).to(first.x.dtype).split([first.weight.shape[0], second.weight.shape[0]], 1)
    dx1, *grads1 = first.backward(left, needs[:4])
    dx2, *grads2 = second.backward(right, (needs[0], *needs[4:7]))
    dx = None if dx1 is None or dx2 is None else dx1 + dx2
    return (*_narrowed([dx, *grads1, *grads2], tuple(inputs), needs[:7]), None, None)


def _pair_convs(inputs: tuple[Tensor, ...]) -> tuple[_Conv, _Conv]:
    x, w1, scale1, shift1, w2, scale2, shift2 = _widened(inputs)
    first = _Conv(x, w1, scale1, shift1, [1, 1], same_padding(w1.shape))
    return first, _Conv(x, w2, scale2, shift2, [1, 1], same_padding(w2.shape))


def pool_project_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], output)
    kernel, stride, padding, count_include_pad, _ = inputs[4:]
    ctx.pool = (kernel, stride, padding, False, count_include_pad, None)


def pool_project_backward(ctx: Any, grad: Tensor) -> Grads:
    *inputs, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    x, weight, scale, shift = _widened(tuple(inputs))
    pooled = F.avg_pool2d(x, *ctx.pool)
    conv = _Conv(pooled, weight, scale, shift, [1, 1], (0, 0, 0, 0))
    grads = conv.backward(_through_relu(grad, y).to(x.dtype), needs[:4])
    if grads[0] is not None:
        grads[0] = torch.ops.aten.avg_pool2d_backward(grads[0], x, *ctx.pool)
    return (*_narrowed(grads, tuple(inputs), needs[:4]), *(None,) * 5)
