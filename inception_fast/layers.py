"""Trainable drop-in layers. In training, for channels_last maps, the convolution is torch's, on the CPU with a native
gradient of its weight, and batch norm and ReLU behind it are one native operation, on a GPU one with it; in eager
training on the CPU all of a layer is one node of autograd. With frozen statistics each layer is one fused operation;
else it is plain torch.

A layer's children are plain `nn.Conv2d` and `nn.BatchNorm2d`, so its state dict is that of the modules it replaces.
Batch norm becomes a scale and a shift in float32, never folded into the weights; they are computed again only when a
statistic or parameter changed. Where a child is not plain (hooked, parametrised, of another class) it is called as it
is. `torch.export` and `torch.jit.trace` see plain convolutions and batch norms.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _inferred_pool, _trained_pool, ops
from ._checks import check_average, check_channels, check_layer, foreign, not_scripted
from ._conv_bn_relu import check_map, conv_bn_relu, trained
from ._fold import Fold
from ._inferred_layer import pair_asked, remember, serves, takes_tiles
from ._numbers import odd_length, plain
from ._plain import are_pair, fusable, has_hooks
from .backends.window import Window

__all__ = ["AsymmetricPair", "ConvBNReLU", "ParallelSplit", "PoolProject"]

IntPair: TypeAlias = int | tuple[int, int]
ORDERS = ("1xn_nx1", "nx1_1xn")


class ConvBNReLU(nn.Module):
    """y = relu(bn(conv(x))): [n, cin, h, w] -> [n, cout, oh, ow]. Children `conv` (without bias) and `bn`.

    Example:
        layer = ConvBNReLU(16, 32, kernel_size=3, padding=1).eval()
        y = layer(torch.rand(1, 16, 8, 8))
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        eps: float = 1e-3,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        cin, cout, kernel_size, stride, padding = plain((cin, cout, kernel_size, stride, padding))
        eps, momentum = plain((eps, momentum))
        check_layer(cin, cout, kernel_size, stride, padding, eps, momentum)
        self.conv = nn.Conv2d(cin, cout, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=eps, momentum=momentum)
        self._fold = Fold()

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn_relu(x, self.conv, self.bn, self._fold)

    __prepare_scriptable__ = not_scripted

    def fused_arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight, scale and shift of the fused operation."""
        return (self.conv.weight, *self._fold(self.conv, self.bn))


def run_pair(kind: str, x: Tensor, first: nn.Module, second: nn.Module, fold: Fold) -> Tensor | None:
    """Two layers as one operation, in a row ("chain") or side by side ("split"); None where that is not the same.

    Both have to be a ConvBNReLU without hooks, its statistics frozen, with a pair's kernels. `fold` keeps what its
    calls came to.
    """
    if not (type(first) is ConvBNReLU and type(second) is ConvBNReLU):
        return None
    parts = (first.conv, first.bn), (second.conv, second.bn)
    if any(map(has_hooks, (first, second, *parts[0], *parts[1]))):
        return None
    watched = torch.compiler.is_compiling()
    if not watched and (memo := fold.memo) is not None and serves(x):
        known = memo.again(x, parts)
        if known is not None:
            return known
    if foreign(x) or not all(fusable(*part) for part in parts) or not are_pair(first.conv, second.conv):
        return None
    params = *first.fused_arguments(), *second.fused_arguments()
    operator = ops.asymmetric_pair if kind == "chain" else ops.parallel_split
    y = operator(x, *params, winograd=takes_tiles(first.conv, second.conv))
    if not watched:
        fold.memo = remember(fold.memo, x, parts, pair_asked(kind, x, first, second))
    return y


class _Two(nn.Module):
    """Two ConvBNReLU children, `first` and `second`, which one operation may run together."""

    first: ConvBNReLU
    second: ConvBNReLU
    __prepare_scriptable__ = not_scripted

    def __init__(self) -> None:
        super().__init__()
        self._fold = Fold()


class AsymmetricPair(_Two):
    """A 1xn and an nx1 ConvBNReLU in a row, padded SAME: [n, cin, h, w] -> [n, cout, h, w].

    Args:
        mid: channels between the two.
        n: the kernel's length, odd.
        order: "1xn_nx1" or "nx1_1xn".
    """

    def __init__(self, cin: int, mid: int, cout: int, n: int, order: str = "1xn_nx1") -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order {order!r}; allowed: {', '.join(ORDERS)}")
        check_channels(cin=cin, mid=mid, cout=cout)
        n = odd_length(n)
        wide = order == ORDERS[0]
        self.first = _row(cin, mid, n) if wide else _column(cin, mid, n)
        self.second = _column(mid, cout, n) if wide else _row(mid, cout, n)

    def forward(self, x: Tensor) -> Tensor:
        y = run_pair("chain", x, self.first, self.second, self._fold)
        return self.second(self.first(x)) if y is None else y


class ParallelSplit(_Two):
    """A 1xn and an nx1 ConvBNReLU side by side, padded SAME: [n, cin, h, w] -> [n, cout1 + cout2, h, w].

    Args:
        cout1: output channels of the 1xn layer, `first`.
        cout2: those of the nx1 layer, `second`; as many as cout1 by default.
        n: the kernel's length, odd.
    """

    def __init__(self, cin: int, cout1: int, cout2: int | None = None, n: int = 3) -> None:
        super().__init__()
        cout2 = cout1 if cout2 is None else cout2
        check_channels(cin=cin, cout1=cout1, cout2=cout2)
        n = odd_length(n)
        self.first = _row(cin, cout1, n)
        self.second = _column(cin, cout2, n)

    def forward(self, x: Tensor) -> Tensor:
        y = run_pair("split", x, self.first, self.second, self._fold)
        return torch.cat((self.first(x), self.second(x)), 1) if y is None else y


class MaxPool2d(nn.MaxPool2d):
    """torch's, by the native kernels in eager calls on the CPU for maps in channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        y = None
        if self.dilation in (1, (1, 1)) and not (self.ceil_mode or self.return_indices):
            y = _pooled(input, _trained_pool.window_of("max", self.kernel_size, self.stride, self.padding))
        return super().forward(input) if y is None else y


class AvgPool2d(nn.AvgPool2d):
    """torch's, by the native kernels in eager calls on the CPU for maps in channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        y = None
        if not self.ceil_mode and self.divisor_override is None:
            y = _pooled(input, _average(self.kernel_size, self.stride, self.padding, self.count_include_pad))
        return super().forward(input) if y is None else y


class PoolProject(nn.Module):
    """y = relu(bn(conv1x1(avg_pool(x)))): [n, cin, h, w] -> [n, cout, oh, ow]. Children `conv` and `bn`.

    Fused, the convolution goes before the pool where that is less work; the result is the same but for rounding.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel_size: IntPair = 3,
        stride: IntPair = 1,
        padding: IntPair = 1,
        count_include_pad: bool = False,
        eps: float = 1e-3,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        cin, cout, kernel_size, stride, padding = plain((cin, cout, kernel_size, stride, padding))
        eps, momentum, count_include_pad = plain((eps, momentum, count_include_pad))
        check_layer(cin, cout, kernel_size, stride, padding, eps, momentum)
        check_average(kernel_size, padding, count_include_pad)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.count_include_pad = count_include_pad
        self.conv = nn.Conv2d(cin, cout, 1, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=eps, momentum=momentum)
        self._fold = Fold()

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        pool: dict[str, Any] = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding}
        pool["count_include_pad"] = self.count_include_pad
        if foreign(x):
            return F.relu(bn(conv(F.avg_pool2d(x, **pool))))
        if not (fusable(conv, bn) and _is_pointwise(conv)):
            check_map(x, conv)
            pooled = _pooled(x, _average(**pool))
            return trained(F.avg_pool2d(x, **pool) if pooled is None else pooled, conv, bn)
        return ops.pool_project(x, conv.weight, *self._fold(conv, bn), **pool)

    __prepare_scriptable__ = not_scripted

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{window}, count_include_pad={self.count_include_pad}"


def _pooled(x: Tensor, window: Window | None) -> Tensor | None:
    """The pool of x by the native kernels, in training or inference; None where torch's has to run."""
    if window is None or foreign(x):
        return None
    if _trained_pool.serves(x, window):
        return _trained_pool.pool(x, window)
    return _inferred_pool.pool(x, window) if _inferred_pool.serves(x, window) else None


def _average(kernel_size: Any, stride: Any, padding: Any, count_include_pad: bool) -> Window | None:
    return _trained_pool.window_of("mean_with_padding" if count_include_pad else "mean", kernel_size, stride, padding)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _row(cin: int, cout: int, n: int) -> ConvBNReLU:
    return ConvBNReLU(cin, cout, (1, n), padding=(0, n // 2))


def _column(cin: int, cout: int, n: int) -> ConvBNReLU:
    return ConvBNReLU(cin, cout, (n, 1), padding=(n // 2, 0))
