"""The package's own operators as the engine's ops, so that a network of fused layers is planned like a plain one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import graph as ir
from .call import Call, require


def _parameters(call: Call, suffix: str, weight: str) -> tuple[Tensor, Tensor, Tensor]:
    found = [call.constant(name) for name in (weight, f"scale{suffix}", f"shift{suffix}")]
    assert found[0] is not None and found[1] is not None and found[2] is not None
    return found[0], found[1], found[2]


def _conv(weight: Tensor, scale: Tensor, shift: Tensor, relu: bool, **geometry: object) -> ir.Conv:
    return ir.Conv(weight, (ir.Column(weight.shape[0], relu),), scale, shift, **geometry)  # type: ignore[arg-type]


def _same(weight: Tensor, scale: Tensor, shift: Tensor) -> ir.Conv:
    """Stride 1 and as much padding as keeps the size, for odd kernels."""
    kh, kw = weight.shape[2:]
    return _conv(weight, scale, shift, True, padding=(kh // 2, kh // 2, kw // 2, kw // 2))


def conv_bn_relu(call: Call) -> ir.Node:
    x = call.map("x", 4)
    operands = [x] if call["residual"] is None else [x, call.map("residual", 4)]
    stride, padding = call.numbers("stride"), call.numbers("padding", 4)
    op = _conv(
        *_parameters(call, "", "weight"),
        call["relu"],
        stride=stride,
        padding=padding,
        residual_scale=float(call["residual_scale"]),
    )
    return call.node(op, *operands)


def asymmetric_pair(call: Call) -> ir.Node:
    x = call.map("x", 4)
    first, second = _same(*_parameters(call, "1", "w1")), _same(*_parameters(call, "2", "w2"))
    return call.node(ir.Pair("chain", first, second), x)


def parallel_split(call: Call) -> ir.Node:
    x = call.map("x", 4)
    first, second = _same(*_parameters(call, "1", "w1")), _same(*_parameters(call, "2", "w2"))
    return call.node(ir.Pair("split", first, second), x)


def pool_project(call: Call) -> ir.Node:
    x = call.map("x", 4)
    require(x.shape is not None, "a map of unknown size")
    assert x.shape is not None and isinstance(call.value, Tensor)
    (kh, kw), (sh, sw), (ph, pw) = (call.numbers(name) for name in ("kernel_size", "stride", "padding"))
    pool = ir.Pool("avg", (kh, kw), (sh, sw), (ph, ph, pw, pw), bool(call["count_include_pad"]))
    shape = (x.shape[0], x.channels, *call.shape[2:])
    pooled = call.node(pool, x, name=f"{call.name}_pool", shape=shape)
    return call.node(_conv(*_parameters(call, "", "weight"), True), pooled)


OWN: dict[str, Callable[[Call], ir.Node]] = {
    "conv_bn_relu": conv_bn_relu,
    "asymmetric_pair": asymmetric_pair,
    "parallel_split": parallel_split,
    "pool_project": pool_project,
}
