"""The "reference" backend: the slow float64 truth, rounded once to the tensor's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import PoolProjectSpec, Spec
from ..kernels import reference
from ..kernels.spec import ConvSpec, PairSpec
from . import Params, laid_out


class Prepared(NamedTuple):
    spec: Spec
    params: Params
    residual_scale: float


def reasons(spec: Spec) -> list[str]:
    """It runs everything that a spec can say."""
    return []


def prepare(spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float) -> Prepared:
    return Prepared(spec, params, residual_scale)


def run(prepared: Prepared, x: Tensor, residual: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    spec, params, residual_scale = prepared
    arguments: dict[str, Any]
    if isinstance(spec, PairSpec):
        paddings = (spec.first.padding, spec.second.padding)
        y = reference.pair(x, *params[0], *params[1], kind=spec.kind, paddings=paddings)
    elif isinstance(spec, PoolProjectSpec):
        pool = spec.pool
        arguments = {"kernel": (pool.kh, pool.kw), "stride": pool.stride, "padding": pool.padding}
        y = reference.pool_project(x, *params[0], **arguments, count_include_pad=pool.count_include_pad)
    else:
        assert isinstance(spec, ConvSpec)
        arguments = {"stride": spec.stride, "padding": spec.padding, "groups": spec.groups, "relu": spec.relu}
        y = reference.conv(x, *params[0], **arguments, residual=residual, residual_scale=residual_scale)
    return laid_out(y, memory_format)
