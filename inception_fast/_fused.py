"""The fused operators of inference: what a call of each means, its kernel on any backend, its fake, its FLOP count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _batch_norm, dispatch
from ._checks import Conv, Pair, PoolProject, check_residual_scale, like
from .backends import Params, laid_out


def conv_call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    relu: bool = True,
    residual_scale: float = 1.0,
    backend: str | None = None,
    winograd: bool = False,
) -> Conv:
    check_residual_scale(residual, residual_scale)
    params = (like(weight), like(scale), like(shift))
    return Conv(like(x), params, None if residual is None else like(residual), tuple(stride), tuple(padding), relu)


def pair_call(kind: str, x: Tensor, *params: Any) -> Pair:
    w1, scale1, shift1, w2, scale2, shift2 = map(like, params[:6])
    return Pair(kind, like(x), (w1, scale1, shift1), (w2, scale2, shift2))


def pool_project_call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    count_include_pad: bool = False,
    backend: str | None = None,
) -> PoolProject:
    params = (like(weight), like(scale), like(shift))
    return PoolProject(like(x), params, tuple(kernel_size), tuple(stride), tuple(padding), count_include_pad)


def _launch(
    spec: dispatch.Spec,
    x: Tensor,
    params: Params,
    backend: str | None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    winograd: bool = False,
) -> Tensor:
    device = str(x.device) if x.is_cuda else x.device.type
    named = backend if backend is not None else dispatch.current_backend()
    memory_format = _batch_norm.memory_format(x)
    if named is None and device == "cpu" and x.dtype is torch.float16:
        # Its kernels know no float16, and the bits of torch's convolutions depend on the batch: float32, rounded once.
        wide = None if residual is None else residual.float()
        y = _launch(dispatch.with_dtype(spec, "float32"), x.float(), params, None, wide, residual_scale, winograd)
        return laid_out(y.half(), memory_format)
    chosen = dispatch.choose(spec, device, named)
    kernels, tiles = dispatch.adapter(chosen), {"winograd": True} if winograd and chosen == "cpu" else {}
    prepared = kernels.prepare(spec, params, x, residual, residual_scale, **tiles)
    return kernels.run(prepared, x, residual, memory_format)


def conv_kernel(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    relu: bool = True,
    residual_scale: float = 1.0,
    backend: str | None = None,
    winograd: bool = False,
) -> Tensor:
    call = conv_call(x, weight, scale, shift, residual, stride, padding, relu, residual_scale)
    return _launch(call.spec(), x, ((weight, scale, shift),), backend, residual, residual_scale, winograd)


def pair_kernel(kind: str) -> Any:
    def kernel(x: Tensor, *rest: Any) -> Tensor:
        backend, winograd = (*rest[6:], None, False)[:2] if len(rest) < 8 else rest[6:]
        return _launch(pair_call(kind, x, *rest).spec(), x, (rest[:3], rest[3:6]), backend, winograd=winograd)

    return kernel


def pool_project_kernel(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    count_include_pad: bool = False,
    backend: str | None = None,
) -> Tensor:
    call = pool_project_call(x, weight, scale, shift, kernel_size, stride, padding, count_include_pad)
    return _launch(call.spec(), x, ((weight, scale, shift),), backend)


def fake_of(call: Any) -> Any:
    """The shape, dtype and strides of a call's result, from its checks."""

    def fake(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        shape = call(x, *rest, **options).shape()
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_batch_norm.memory_format(x))

    return fake


def conv_flops(x: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    n, _, oh, ow = out_shape
    return 2 * n * oh * ow * torch.Size(weight).numel()


def conv_batch_norm_flops(x: Any, kernel: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    return conv_flops(x, kernel, out_shape=out_shape[0])


def gradient_flops(grad: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    return conv_flops(x, weight, out_shape=grad)


def pair_flops(x: Any, w1: Any, scale1: Any, shift1: Any, w2: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    return conv_flops(x, w1, out_shape=out_shape) + conv_flops(x, w2, out_shape=out_shape)
