"""The "torch" backend: PyTorch's own convolutions with the scale and shift in float32, rounded once at the end.

float16 and bfloat16 are convolved in float32: their products are exact there, and a library convolution in the narrow
dtype would round its sums before scale and shift. On CUDA torch's own TF32 switches decide how the float32 convolution
is done; TF32 loses nothing of float16 and bfloat16 operands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import PoolProjectSpec, Spec
from ..kernels.spec import ConvSpec, PairSpec
from . import Params, laid_out
from .truth import Prepared


def reasons(spec: Spec) -> list[str]:
    """PyTorch's convolutions take every shape and dtype."""
    return []


def prepare(spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float) -> Prepared:
    return Prepared(spec, params, residual_scale)


def run(prepared: Prepared, x: Tensor, residual: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    spec, params, residual_scale = prepared
    narrow, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if isinstance(spec, PairSpec):
        y = _activated(x, spec.first, params[0])
        second = _activated(y if spec.kind == "chain" else x, spec.second, params[1])
        y = second if spec.kind == "chain" else torch.cat((y, second), 1)
    elif isinstance(spec, PoolProjectSpec):
        y = _pool_project(x, spec, params[0])
    else:
        assert isinstance(spec, ConvSpec)
        y = _affine(_conv(x, params[0][0], spec), params[0])
        if residual is not None:
            y = torch.add(residual.to(wide), y, alpha=residual_scale)
        y = y.relu_() if spec.relu else y
    return laid_out(y.to(narrow), memory_format)


def _conv(x: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    top, bottom, left, right = spec.padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight.to(x.dtype), None, spec.stride, (top, left), 1, spec.groups)


def _affine(y: Tensor, params: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return y.mul_(params[1].reshape(1, -1, 1, 1)).add_(params[2].reshape(1, -1, 1, 1))


def _activated(x: Tensor, spec: ConvSpec, params: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return _affine(_conv(x, params[0], spec), params).relu_()


def _pool_project(x: Tensor, spec: PoolProjectSpec, params: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    pool = spec.pool

    def average(t: Tensor) -> Tensor:
        padding = (pool.padding[0], pool.padding[2])
        return F.avg_pool2d(t, (pool.kh, pool.kw), pool.stride, padding, False, pool.count_include_pad)

    if spec.conv_first:
        return _affine(average(_conv(x, params[0], spec.conv)), params).relu_()
    return _activated(average(x), spec.conv, params)
