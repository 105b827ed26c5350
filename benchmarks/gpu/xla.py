"""JAX's XLA as a peer: a convolution, and a whole network from the steps of a plan, jitted, NHWC.

Batch norm is folded into the weights, which are rounded to the format; the shift is a bias in that format. Weights are
arguments, not constants, or XLA would try to fold them. JAX is imported when it is first asked for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from inception_fast.kernels.plan import (
    ConvStep,
    EltwiseStep,
    ImportStep,
    LrnStep,
    NormalizeStep,
    PairStep,
    Plan,
    PoolStep,
    Step,
    View,
)
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from torch import Tensor

Forward = Callable[..., tuple[Any, ...]]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def imported() -> Any:
    """jax, which else takes most of a GPU's memory at its start. Raises ImportError where it is not installed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax


def given(x: Tensor) -> Any:
    """A tensor as JAX's array, in the same memory."""
    return imported().dlpack.from_dlpack(x.detach().contiguous())


def layer(spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    """relu(conv(x, weight) + bias), [n, oh, ow, oc]."""
    compiled = imported().jit(lambda a, w, b: _conv(spec, a, w, b, True))
    arrays = [given(t) for t in (x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)]
    return lambda: compiled(*arrays)


def network(plan: Plan, inputs: Sequence[Tensor], dtype: str) -> Callable[[], Any]:
    """The plan's first output, float32, as its module has it: [n, oh, ow, oc], or [n, oc] of a single pixel. inputs
    [n, c, h, w], of which JAX gets copies in NHWC, on the device that they are on.
    """
    jax = imported()
    forward, weights = network_forward(plan, dtype)
    arrays = [given(x.permute(0, 2, 3, 1)) for x in inputs]
    weights = jax.device_put(weights, next(iter(arrays[0].devices())))
    compiled = jax.jit(forward)

    def call() -> Any:
        y = compiled(weights, *arrays)[0]
        return y.reshape(y.shape[0], -1) if y.shape[1:3] == (1, 1) else y

    return call


def network_forward(plan: Plan, dtype: str) -> tuple[Forward, list[Any]]:
    """A function of weights and inputs [n, h, w, c] to the outputs, and these weights."""
    jnp = imported().numpy
    weights: list[Any] = []
    calls: list[tuple[Step, Any]] = []
    for step in plan.steps:
        both = (step.first, step.second) if isinstance(step, PairStep) else (step,)
        for one in both:
            calls.append((one, None))
            if isinstance(one, ConvStep):
                folded = np.transpose(one.whole * one.scale[:, None, None, None], (2, 3, 1, 0))
                calls[-1] = (one, len(weights))
                weights += [jnp.asarray(folded, dtype), jnp.asarray(one.shift, dtype)]

    def forward(weights: Sequence[Any], *inputs: Any) -> tuple[Any, ...]:
        maps = _Maps(plan)
        for step, at in calls:
            _run(step, maps, inputs, dtype, None if at is None else weights[at : at + 2])
        found = sorted((b.position, i) for i, b in enumerate(plan.buffers) if b.kind == "output")
        return tuple(maps.read(View(i, 0, plan.buffers[i].c)).astype("float32") for _, i in found)

    return forward, weights


class _Maps:
    """What lies in the buffers, as arrays by the channel at which they begin."""

    def __init__(self, plan: Plan) -> None:
        self.parts: list[dict[int, Any]] = [{} for _ in plan.buffers]

    def write(self, view: View, value: Any) -> None:
        parts, end = self.parts[view.buffer], view.offset + view.channels
        for at, old in list(parts.items()):
            if at < end and at + old.shape[3] > view.offset:
                if at < view.offset or at + old.shape[3] > end:
                    raise ValueError(f"{view} overwrites part of channels {at} to {at + old.shape[3]}")
                del parts[at]
        parts[view.offset] = value

    def read(self, view: View) -> Any:
        jnp = imported().numpy
        found, at, end = [], view.offset, view.offset + view.channels
        for begin, value in sorted(self.parts[view.buffer].items()):
            if begin <= at < min(begin + value.shape[3], end):
                part = value[..., at - begin : end - begin]
                found.append(part)
                at += part.shape[3]
        if at != end:
            raise ValueError(f"{view}: nobody wrote channel {at}")
        return found[0] if len(found) == 1 else jnp.concatenate(found, 3)


@functools.singledispatch
def _run(step: Any, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    raise TypeError(f"{type(step).__name__}: no form in JAX")


@_run.register
def _(step: ImportStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    x = inputs[step.source].astype("float32")
    maps.write(step.y, _affine(x, step.scale, step.shift).astype(dtype))


@_run.register
def _(step: ConvStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    jax = imported()
    y = _conv(step.spec, maps.read(step.x), *weights, False)
    if step.residual is not None:
        y = maps.read(step.residual) + step.residual_scale * y
    at = 0
    for output in step.outputs:
        part = y[..., at : at + output.view.channels]
        at += output.view.channels
        maps.write(output.view, (jax.nn.relu(part) if output.relu else part).astype(dtype))


@_run.register
def _(step: PoolStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    y = _affine(_pool(step.spec, maps.read(step.x)), None, step.shift)
    maps.write(step.y, (imported().nn.relu(y) if step.relu else y).astype(dtype))


@_run.register
def _(step: EltwiseStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    y = _affine(maps.read(step.x).astype("float32"), step.scale, step.shift)
    if step.residual is not None:
        y = maps.read(step.residual).astype("float32") + step.residual_scale * y
    maps.write(step.y, (imported().nn.relu(y) if step.relu else y).astype(dtype))


@_run.register
def _(step: LrnStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    x = maps.read(step.x).astype("float32")
    around = ((0, 0), (0, 0), (0, 0), (step.size // 2, step.size - 1 - step.size // 2))
    squares = imported().lax.reduce_window(x * x, 0.0, imported().lax.add, (1, 1, 1, step.size), (1, 1, 1, 1), around)
    maps.write(step.y, (x / (step.k + step.alpha / step.size * squares) ** step.beta).astype(dtype))


@_run.register
def _(step: NormalizeStep, maps: _Maps, inputs: Sequence[Any], dtype: str, weights: Any) -> None:
    jnp = imported().numpy
    x = maps.read(step.x).astype("float32")
    maps.write(step.y, (x / jnp.maximum(jnp.sqrt((x * x).sum(3, keepdims=True)), step.eps)).astype(dtype))


def _affine(x: Any, scale: Any, shift: Any) -> Any:
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def _conv(spec: ConvSpec, x: Any, weight: Any, bias: Any, relu: bool) -> Any:
    jax = imported()
    top, bottom, left, right = spec.padding
    y = jax.lax.conv_general_dilated(
        x, weight, spec.stride, ((top, bottom), (left, right)), dimension_numbers=LAYOUT,
        feature_group_count=spec.groups,
    )  # fmt: skip
    y = y + bias
    return jax.nn.relu(y) if relu else y


def _pool(spec: PoolSpec, x: Any) -> Any:
    """In float32; an average divides by the elements of the map in its window, or of the padded map."""
    jax = imported()
    top, bottom, left, right = spec.padding
    (below, beside), none = spec.overhang, (0, 0)
    window, strides = (1, spec.kh, spec.kw, 1), (1, *spec.stride, 1)
    reach = (none, (top, bottom + below), (left, right + beside), none)
    if spec.kind == "max":
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, strides, reach).astype("float32")
    total = jax.lax.reduce_window(x.astype("float32"), 0.0, jax.lax.add, window, strides, reach)
    ones = np.ones((1, spec.h, spec.w, 1), np.float32)
    counted = np.pad(ones, (none, (top, bottom), (left, right), none), constant_values=float(spec.count_include_pad))
    counted = np.pad(counted, (none, (0, below), (0, beside), none))
    return total / jax.lax.reduce_window(counted, 0.0, jax.lax.add, window, strides, (none,) * 4)
