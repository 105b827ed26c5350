"""Batch norm in training with its ReLU, as an operator: checks, choice of the backend, gradients.

The statistics are results beside y, so that nothing is written in place; they have no gradient of their own. The
backward keeps x and the statistics and computes the ReLU's mask again, so y lives only as long as others need it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from ._checks import DTYPES, foreign
from ._gradients import differentiable
from .backends import laid_out

SCHEMA = "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)

ADAPTERS = {"cpu": "batch_norm", "cuda": "batch_norm_gpu", "triton": "batch_norm_gpu"}
# The CUDA kernels are convolutions of inference: a training step on "cuda" takes Triton's, which have to run here too.
NEEDS = {"cuda": ("cuda", "triton")}

Three = tuple[Tensor, Tensor, Tensor]


def is_native(x: Tensor) -> bool:
    """Whether x is what the native kernels are for, as far as a fake tensor can tell; at 1x1 and with one channel any
    layout is.
    """
    fits = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() and not foreign(x)
    if x.device.type == "cuda":
        # The machine is not probed in traced code; CUDA builds of torch bring Triton.
        able = torch.compiler.is_compiling() or bool(dispatch.backend_status()["triton"])
        return fits and able and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raises ValueError or TypeError for a call that no backend can serve."""
    torch._check_value(x.dim() == 4, lambda: f"x of {x.dim()} dimensions; allowed: 4, [n, c, h, w]")
    torch._check_type(x.dtype in DTYPES, lambda: f"x of dtype {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    n, c, h, w = x.shape
    torch._check_value(
        n * h * w > 1,
        lambda: f"batch norm of {n} x {h} x {w} values a channel; allowed in training: more than one, for a variance",
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, values in (("weight", weight), ("bias", bias)):
        _check_parameter(name, values, c, wide)


def _check_parameter(name: str, values: Tensor, c: Any, wide: torch.dtype) -> None:
    shape = tuple(values.shape)
    torch._check_value(shape == (c,), lambda: f"{name} of shape {shape}; allowed: [{c}]")
    torch._check_type(values.dtype is wide, lambda: f"{name} of dtype {values.dtype}; allowed: {wide}")


def native_kernels(x: Tensor, operation: str = "batch_norm_relu") -> ModuleType | None:
    """The backend's module that runs a call on x, or None; RuntimeError where one was named and cannot."""
    named = dispatch.current_backend()
    name = named or ("cpu" if x.device.type == "cpu" else "triton")
    if name not in ADAPTERS:
        return None
    found = dispatch.backend_status()
    statuses = {needed: found[needed] for needed in NEEDS.get(name, (name,))}
    why = [status.reason for status in statuses.values() if isinstance(status, dispatch.Unavailable)]
    if not why:
        module = importlib.import_module(f".backends.{ADAPTERS[name]}", __package__)
        why = module.reasons(x)
        if not why:
            return module
    if named:
        raise RuntimeError(f"backend {named!r} cannot run {operation}: {'; '.join(why)}")
    return None


def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Three:
    check(x, weight, bias, eps)
    native = native_kernels(x)
    if native is not None:
        return native.forward(x, weight, bias, eps, memory_format(x))
    wide_x, wide_weight, wide_bias = widened(x, weight, bias)
    y, mean, var = formula(wide_x, wide_weight, wide_bias, eps)
    return laid_out(y.to(x.dtype), memory_format(x)), mean.to(weight.dtype), var.to(weight.dtype)


def backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Three:
    native = native_kernels(x)
    if native is not None:
        return native.backward(grad, x, weight, bias, (mean, var), eps)
    wide_x, wide_grad, wide_weight, wide_bias, mean, var = widened(x, grad, weight, bias, mean, var)
    rstd, deviation = torch.rsqrt(var + eps), wide_x - _column(mean)
    scale, count = wide_weight * rstd, x.numel() // x.shape[1]
    open_ = deviation * _column(scale) + _column(wide_bias) > 0
    g = torch.where(open_, wide_grad, 0.0)
    dbias, dweight = g.sum((0, 2, 3)), (g * deviation).sum((0, 2, 3)) * rstd
    dx = (g - _column(dbias / count) - deviation * _column(rstd * dweight / count)) * _column(scale)
    return torch.empty_like(x).copy_(dx), dweight.to(weight.dtype), dbias.to(bias.dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Three:
    check(x, weight, bias, eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, torch.empty_like(weight), torch.empty_like(weight)


def backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Three:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, weight, bias, ctx.eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def backward(ctx: Any, grad: Tensor, *of_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again: the statistics as functions of x, in torch's operations

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return result(x, weight, bias, ctx.eps)

        return (*differentiable(layer, (x, weight, bias), ctx.needs_input_grad[:3], grad), None)
    return (*torch.ops.inception_fast.batch_norm_relu_backward(grad, x, weight, bias, mean, var, ctx.eps), None)


def formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Three:
    """(y, mean, var) in differentiable torch operations."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = weight * torch.rsqrt(var + eps)
    return torch.relu((x - _column(mean)) * _column(scale) + _column(bias)), mean, var


def result(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y of `formula`, computed as wide as it has to be, in the dtype of x."""
    wide_x, wide_weight, wide_bias = widened(x, weight, bias)
    return formula(wide_x, wide_weight, wide_bias, eps)[0].to(x.dtype)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least; in float64 for the backend "reference"."""
    least = torch.float64 if dispatch.current_backend() == "reference" else torch.float32
    return tuple(tensor.to(torch.promote_types(tensor.dtype, least)) for tensor in tensors)


def _column(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def memory_format(x: Tensor) -> torch.memory_format:
    """Strides of single-element dimensions mean nothing: a map that is contiguous both ways gives a contiguous y."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format
