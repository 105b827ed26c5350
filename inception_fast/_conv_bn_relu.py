"""relu(bn(conv(x))) of two plain modules: fused where statistics are frozen, with native parts where they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _batch_norm, _trained_layer, ops
from ._checks import check_learning, foreign, is_strided
from ._fold import Fold
from ._inferred_layer import conv_asked, remember, serves, takes_tiles
from ._plain import by_torch, conv_problem, fusable, has_hooks, plainly_learns, plainly_trains


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
        check_map(x, conv)
        if not (_trains_on_gpu(x, conv) and plainly_trains(bn)):
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


def trained(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """relu(bn(conv(x))) in training, as one node of autograd where both are plain."""
    if x.device.type == "cpu" and plainly_learns(conv) and plainly_trains(bn):
        cast = _trained_layer.autocast(x)
        parts = _trained_layer.parts_of(conv, bn)
        if _trained_layer.serves(cast, parts):
            return _trained_layer.train(cast, parts, conv, bn, takes_tiles(conv))
    return batch_norm_relu(convolve(x, conv), bn)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x), with native gradients where that is what training of a plain convolution needs."""
    if not (plainly_learns(conv) and _batch_norm.is_native(x)):
        return conv(x)
    padding: Any = conv.padding
    return ops.convolution(x, conv.weight, stride=conv.stride, padding=padding, winograd=takes_tiles(conv))


def batch_norm_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """relu(bn(x)), in one native operation where that is what training of a plain batch norm needs."""
    if not (plainly_trains(bn) and _batch_norm.is_native(x)):
        # In place of what nobody else holds: a hook or another class may keep or return what it was given.
        return F.relu(bn(x), inplace=type(bn) is nn.BatchNorm2d and not has_hooks(bn))
    y, mean, var = ops.batch_norm_relu(x, bn.weight, bn.bias, eps=bn.eps)
    _take_in(bn, mean, var, x.numel() // x.shape[1])
    return y


def check_map(x: Tensor, conv: nn.Module) -> None:
    """Raises as the fused operations do for what is no map [n, c, h, w] for the convolution."""
    if type(conv) is nn.Conv2d and not torch.compiler.is_compiling() and not by_torch():
        weight = conv.weight  # whoever sets another seldom sets in_channels
        channels = weight.shape[1] * conv.groups if weight.dim() == 4 else conv.in_channels
        if type(x) is Tensor and is_strided(x) and x.dtype is weight.dtype and x.dim() == 4 and 0 not in x.shape:
            if x.shape[1] == channels:
                return
        check_learning(x, weight, channels)


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
