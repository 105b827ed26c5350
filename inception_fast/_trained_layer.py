"""A layer in eager training on the CPU as one node of autograd: convolution, batch norm, ReLU, running statistics.

The kernels are those of the operators `convolution` and `batch_norm_relu`, called past the dispatcher from one
`autograd.Function`. Through two operators, with torch's own updates of the statistics, a layer took 290 us forward
whatever its map, and a step has 94 of them. Whatever watches or rewrites operations (compilers, exports, dispatch
modes, transforms) is given the operators, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

from . import _batch_norm, _convolution, dispatch
from ._checks import PLAIN, pair_of
from ._gradients import differentiable

Parts = tuple[Any, ...]  # kernel, weight, bias, running mean, running variance, batches seen


def parts_of(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Parts:
    """The tensors of both, each read once: that takes a call of Python's."""
    return conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked


def serves(x: Tensor, parts: Parts) -> bool:
    """Whether `train` may take relu(bn(conv(x))) of two modules that train plainly; `x` as autocast leaves it."""
    kernel, *columns, batches = parts
    if not (direct() and is_plain(x) and is_plain(kernel) and is_plain(batches) and _batch_norm.is_native(x)):
        return False
    size = kernel.shape[:1]
    return batches.dtype is torch.int64 and all([_is_column(each, size) for each in columns])


def is_plain(values: Any) -> bool:
    """Whether the CPU's memory holds the tensor's values; that of a view that only notes a sign does not."""
    return type(values) in PLAIN and values.is_cpu and not values.is_neg()


def is_plain_gradient(grad: Tensor) -> bool:
    """`is_plain` of one, which may be a batch of them (`is_grads_batched`), of which `transformed` does not know."""
    return is_plain(grad) and not torch._C._functorch.is_legacy_batchedtensor(grad)


def _is_column(values: Any, size: torch.Size) -> bool:
    """Whether the kernels may read and write these [c] floats where they lie."""
    return is_plain(values) and values.shape == size and values.dtype is torch.float32 and values.is_contiguous()


def direct() -> bool:
    """Whether native kernels may be called here past the dispatcher."""
    if _watched() or dispatch.current_backend() not in (None, "cpu"):
        return False
    return dispatch.runs_on_cpu()


def _watched() -> bool:
    """Whether something looks at operators as they run."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
    )


def transformed() -> bool:
    """Whether torch.func or forward-mode gradients look on, whose rules torch's own operations have and ours do not."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def asked_while_traced(question: Callable[[], bool]) -> Callable[[], bool]:
    """torch.compiler.assume_constant_result, which would import Dynamo, and with it Triton."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


def autocast(x: Tensor) -> Tensor:
    """`x` as autocast gives it to a convolution."""
    if not torch.is_autocast_enabled("cpu") or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


def train(x: Tensor, parts: Parts, conv: nn.Conv2d, bn: nn.BatchNorm2d, winograd: bool) -> Tensor:
    """relu(bn(conv(x))) where `serves` says so; moves the running statistics."""
    share = 1.0 / (int(parts[5]) + 1) if bn.momentum is None else bn.momentum
    stride: Any = conv.stride
    padding: Any = conv.padding
    if not type(stride) is type(padding) is tuple:  # who sets them may set a number, which torch takes too
        stride, padding = pair_of(stride, "stride"), pair_of(padding, "padding")
    call = stride, padding, winograd, bn.eps
    y: Tensor = _TrainedLayer.apply(x, *parts[:3], call, (*parts[3:], share))
    return y


class _TrainedLayer(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, call: Any, running: Any
    ) -> Tensor:
        from .backends import batch_norm

        stride, padding, winograd, eps = call
        z = _convolution.kernel(x, kernel, stride, padding, winograd)
        if not z.is_contiguous(memory_format=torch.channels_last):
            z = z.contiguous(memory_format=torch.channels_last)
        if z.numel() <= z.shape[1]:
            _batch_norm.check(z, weight, bias, eps)
        y, mean, var = batch_norm.forward(z, weight, bias, eps, _batch_norm.memory_format(z), running)
        ctx.call = call
        ctx.save_for_backward(x, kernel, weight, bias, z, mean, var)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, kernel, weight, bias, z, mean, var = ctx.saved_tensors
        stride, padding, winograd, eps = ctx.call
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def layer(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                z = F.conv2d(x, kernel.to(x.dtype), None, stride, padding)
                return _batch_norm.result(z, weight, bias, eps)

            return (*differentiable(layer, (x, kernel, weight, bias), needs, grad), None, None)
        if is_plain_gradient(grad) and direct():
            from .backends import batch_norm

            of_x, of_kernel = _convolution.input_gradient_kernel, _convolution.gradient_kernel
            dz, dweight, dbias = batch_norm.backward(grad, z, weight, bias, (mean, var), eps)
        else:
            ours: Any = torch.ops.inception_fast
            of_x, of_kernel = ours.conv_input_gradient, ours.conv_weight_gradient
            dz, dweight, dbias = ours.batch_norm_relu_backward(grad, z, weight, bias, mean, var, eps)
        dx = of_x(dz, x, kernel, stride, padding, winograd) if needs[0] else None
        dkernel = of_kernel(dz, x, kernel, stride, padding, winograd)
        return dx, dkernel, dweight, dbias, None, None
