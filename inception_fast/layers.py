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
from torch.nn.modules import module as every

from . import _batch_norm, _inferred_pool, _trained_layer, _trained_pool, ops
from ._checks import check_average, check_channels, check_layer, check_learning, foreign, is_strided, not_scripted
from ._gradients import Attached
from ._inferred_layer import Memo, conv_asked, pair_asked, remember, serves, takes_tiles
from ._numbers import odd_length, plain
from .backends.stamp import Stamp, can_stamp
from .backends.streams import Shared, capturing
from .backends.window import Window

__all__ = ["AsymmetricPair", "ConvBNReLU", "ParallelSplit", "PoolProject"]

IntPair: TypeAlias = int | tuple[int, int]
ORDERS = ("1xn_nx1", "nx1_1xn")


def conv_problem(conv: nn.Module) -> str | None:
    """Why the fused operations cannot take a convolution's place; None when they can."""
    if type(conv) is not nn.Conv2d:
        return f"convolution of class {type(conv).__name__}; allowed: torch.nn.Conv2d"
    if conv.groups != 1:
        return f"groups {conv.groups}; allowed: 1"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}; allowed: (1, 1)"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}; allowed: numbers, 'zeros'"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def _by_torch() -> bool:
    """Whether all has to be torch's own operations: they are exported, traced, or transformed."""
    if _exported() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return _in_function_transform() if torch.compiler.is_compiling() else _trained_layer.transformed()


@_trained_layer.asked_while_traced
def _exported() -> bool:
    """Not only compiled, which torch 2.11 calls exported too where Dynamo reads this."""
    return torch.compiler.is_exporting()


@_trained_layer.asked_while_traced
def _in_function_transform() -> bool:
    """Whether torch.func looks on, for compiled code: asked while it is traced, once for each of the places."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def fusable(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether conv and bn may run as scale * conv + shift: both plain, statistics frozen."""
    return (
        type(bn) is nn.BatchNorm2d
        and not bn.training
        and bn.running_mean is not None
        and conv_problem(conv) is None
        and not (has_hooks(conv) or has_hooks(bn))
        and not foreign(conv.weight)
        and not _by_torch()
    )


def scale_and_shift(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm with its frozen statistics, and the convolution's bias, as [oc] scale and shift; differentiable.

    Computed in float64 and rounded once to float32 (float64 for a float64 layer).
    """
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None and var is not None
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = (var.double() + bn.eps).rsqrt()
    scale = scale if bn.weight is None else bn.weight.double() * scale
    offset = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
    shift = offset * scale if bn.bias is None else bn.bias.double() + offset * scale
    return scale.to(wide), shift.to(wide)


class Fold:
    """`scale_and_shift`, kept until a parameter or statistic changes. A copied or unpickled one starts empty."""

    def __init__(self) -> None:
        self._kept: tuple[float, tuple[Stamp | None, ...], Shared[tuple[Tensor, Tensor]]] | None = None
        self.memo: Memo | None = None  # of the layer's calls

    def __reduce__(self) -> tuple[type[Fold], tuple[()]]:
        return Fold, ()

    def __call__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:  # what comes may be a stand-in
            return scale_and_shift(conv, bn)
        learned, device = (bn.weight, bn.bias, conv.bias), conv.weight.device
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)):
            return self._values(conv, bn, learned, device)
        scale, shift = scale_and_shift(conv, bn)
        if device.type == "cpu":  # for what was packed with the kept ones
            kept = self._values(conv, bn, learned, device)
            scale, shift = Attached.apply(kept[0], scale), Attached.apply(kept[1], shift)
        return scale, shift

    def _values(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, learned: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        sources = (*learned, bn.running_mean, bn.running_var)
        apart = capturing(device)
        kept = None if apart else self._kept
        if kept is not None and kept[0] == bn.eps and kept[2].device == device:
            if all(map(_unchanged, kept[1], sources)):
                kept[2].follow()
                return kept[2].value
        # Ordinary tensors even inside inference mode: a later call outside of it may need them in a graph.
        with torch.inference_mode(False), torch.no_grad():
            values = scale_and_shift(conv, bn)
        if not apart and all(t is None or can_stamp(t) for t in sources):
            stamps = tuple(None if t is None else Stamp(t) for t in sources)
            self._kept = bn.eps, stamps, Shared(values, device)
        return values


def _unchanged(stamp: Stamp | None, tensor: Tensor | None) -> bool:
    if stamp is None or tensor is None:
        return stamp is None and tensor is None
    return stamp.holds(tensor)


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


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, fold: Fold) -> Tensor:
    """relu(bn(conv(x))), fused where that is the same."""
    watched = torch.compiler.is_compiling()
    if not watched and (memo := fold.memo) is not None and serves(x) and not (has_hooks(conv) or has_hooks(bn)):
        known = memo.again(x, ((conv, bn),))
        if known is not None:
            return known
    if foreign(x):
        return F.relu(bn(conv(x)))
    if not fusable(conv, bn):
        _check_learning(x, conv)
        if not (_trains_on_gpu(x, conv) and _plainly_trains(bn)):
            return trained(x, conv, bn)
        window: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding}
        y, mean, var = ops.conv_batch_norm_relu(x, conv.weight, bn.weight, bn.bias, **window, eps=bn.eps)
        _take_in(bn, mean, var, y.numel() // y.shape[1])
        return y
    window = {"stride": conv.stride, "padding": conv.padding, "winograd": takes_tiles(conv)}
    y = ops.conv_bn_relu(x, conv.weight, *fold(conv, bn), **window)
    if not watched:
        fold.memo = remember(fold.memo, x, ((conv, bn),), conv_asked(x, conv, bn, fold))
    return y


def _check_learning(x: Tensor, conv: nn.Module) -> None:
    """Raises as the fused operations do for what is no map [n, c, h, w] for the convolution."""
    if type(conv) is nn.Conv2d and not torch.compiler.is_compiling() and not _by_torch():
        weight = conv.weight  # whoever sets another seldom sets in_channels
        channels = weight.shape[1] * conv.groups if weight.dim() == 4 else conv.in_channels
        if type(x) is Tensor and is_strided(x) and x.dtype is weight.dtype and x.dim() == 4 and 0 not in x.shape:
            if x.shape[1] == channels:
                return
        check_learning(x, weight, channels)


def trained(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """relu(bn(conv(x))) in training, as one node of autograd where both are plain."""
    if x.device.type == "cpu" and _plainly_learns(conv) and _plainly_trains(bn):
        cast = _trained_layer.autocast(x)
        parts = _trained_layer.parts_of(conv, bn)
        if _trained_layer.serves(cast, parts):
            return _trained_layer.train(cast, parts, conv, bn, takes_tiles(conv))
    return batch_norm_relu(convolve(x, conv), bn)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x), with native gradients where that is what training of a plain convolution needs."""
    if not (_plainly_learns(conv) and _batch_norm.is_native(x)):
        return conv(x)
    padding: Any = conv.padding
    return ops.convolution(x, conv.weight, stride=conv.stride, padding=padding, winograd=takes_tiles(conv))


def _plainly_learns(conv: nn.Conv2d) -> bool:
    return (
        torch.is_grad_enabled()
        and conv_problem(conv) is None
        and conv.bias is None
        and (weight := conv.weight).requires_grad
        and weight.dtype is torch.float32
        and not (foreign(weight) or has_hooks(conv))
        and not torch.compiler.is_compiling()
        and not _by_torch()
    )


def batch_norm_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """relu(bn(x)), in one native operation where that is what training of a plain batch norm needs."""
    if not (_plainly_trains(bn) and _batch_norm.is_native(x)):
        # In place of what nobody else holds: a hook or another class may keep or return what it was given.
        return F.relu(bn(x), inplace=type(bn) is nn.BatchNorm2d and not has_hooks(bn))
    y, mean, var = ops.batch_norm_relu(x, bn.weight, bn.bias, eps=bn.eps)
    _take_in(bn, mean, var, x.numel() // x.shape[1])
    return y


def _trains_on_gpu(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether convolution and batch norm are one operation there: both plain, x in channels_last."""
    return (
        _on_gpu(x)
        and _batch_norm.is_native(x)
        and conv_problem(conv) is None
        and conv.bias is None
        and not has_hooks(conv)
    )


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _take_in(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics as torch does, var made unbiased."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
        share = 1.0 / bn.num_batches_tracked.float() if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean, share)
        bn.running_var.lerp_(var * (count / (count - 1)), share)


def _plainly_trains(bn: nn.Module) -> bool:
    return (
        type(bn) is nn.BatchNorm2d
        and bn.training
        and bn.track_running_stats
        and bn.weight is not None
        and bn.bias is not None
        and (mean := bn.running_mean) is not None
        and bn.num_batches_tracked is not None
        and bn.weight.dtype is torch.float32
        and mean.dtype is torch.float32
        and not has_hooks(bn)
        and not _by_torch()
    )


def are_pair(a: nn.Conv2d, b: nn.Conv2d) -> bool:
    """Whether they are 1xn and nx1 in either order, n odd, stride 1, padded SAME, as they stand."""
    kernel = tuple(a.kernel_size)
    if 1 not in kernel or kernel != tuple(b.kernel_size)[::-1] or max(kernel) % 2 == 0:
        return False
    return all(conv.stride == (1, 1) and conv.padding == tuple(k // 2 for k in conv.kernel_size) for conv in (a, b))


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


def _pooled(x: Tensor, window: Window | None) -> Tensor | None:
    """The pool of x by the native kernels, in training or inference; None where torch's has to run."""
    if window is None or foreign(x):
        return None
    if _trained_pool.serves(x, window):
        return _trained_pool.pool(x, window)
    return _inferred_pool.pool(x, window) if _inferred_pool.serves(x, window) else None


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


def _average(kernel_size: Any, stride: Any, padding: Any, count_include_pad: bool) -> Window | None:
    return _trained_pool.window_of("mean_with_padding" if count_include_pad else "mean", kernel_size, stride, padding)


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
            _check_learning(x, conv)
            pooled = _pooled(x, _average(**pool))
            return trained(F.avg_pool2d(x, **pool) if pooled is None else pooled, conv, bn)
        return ops.pool_project(x, conv.weight, *self._fold(conv, bn), **pool)

    __prepare_scriptable__ = not_scripted

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{window}, count_include_pad={self.count_include_pad}"


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _row(cin: int, cout: int, n: int) -> ConvBNReLU:
    return ConvBNReLU(cin, cout, (1, n), padding=(0, n // 2))


def _column(cin: int, cout: int, n: int) -> ConvBNReLU:
    return ConvBNReLU(cin, cout, (n, 1), padding=(n // 2, 0))
