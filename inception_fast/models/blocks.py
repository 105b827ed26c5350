"""Blocks that every family shares: convolutions, paddings and pools of both conventions, branches, heads.

Convention "tf" pads a strided SAME operation by what the input size asks for, the odd pixel after the map, and leaves
padding out of average pools. Convention "torch" pads by (k - 1) // 2 on each side, rounds pool sizes up and counts
padding in averages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ConvBlock = Callable[..., nn.Module]
"""conv_block(cin, cout, kernel_size, stride=1, padding=0) -> module, with `eps` and `momentum` of its BN bound."""

IntPair = int | tuple[int, int]


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU: [n, cin, h, w] -> [n, cout, oh, ow]."""

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
        self.conv = nn.Conv2d(cin, cout, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=eps, momentum=momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class BiasConv2d(nn.Module):
    """Convolution with bias, ReLU: the layer of the networks before batch norm. `conv` is named as in `BasicConv2d`."""

    def __init__(self, cin: int, cout: int, kernel_size: IntPair, stride: IntPair = 1, padding: IntPair = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel_size, stride, padding)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after) of one axis: the output has ceil(size / stride) elements."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


fx.wrap("same_padding")  # one call in a symbolic trace, where sizes are not known


def map_size(x: Tensor) -> tuple[int, int]:
    """[h, w] of a map. In a trace, which is then of one image size, they are constants: exporters of traces refuse a
    pool whose padding is computed.
    """
    h, w = x.shape[2:]
    return (int(h), int(w)) if torch.jit.is_tracing() else (h, w)


class SamePad2d(nn.Module):
    """Zero padding on four sides that makes the unpadded convolution behind it a TensorFlow SAME one."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h, w = map_size(x)
        top, bottom = same_padding(h, self.kernel_size, self.stride)
        left, right = same_padding(w, self.kernel_size, self.stride)
        return F.pad(x, (left, right, top, bottom))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class SameMaxPool2d(nn.Module):
    """TensorFlow's SAME max pool as one torch pool.

    The surplus pixel after the map is what `ceil_mode` reaches beyond it, so minus infinity never has to be padded.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h, w = map_size(x)
        top, _ = same_padding(h, self.kernel_size, self.stride)
        left, _ = same_padding(w, self.kernel_size, self.stride)
        return F.max_pool2d(x, self.kernel_size, self.stride, (top, left), ceil_mode=True)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


def strided_max_pool(convention: str, kernel_size: int = 3) -> nn.Module:
    """Max pool of stride 2 whose output has ceil(size / 2) elements, or nearly so ("torch" drops one at odd sizes)."""
    if convention == "tf":
        return SameMaxPool2d(kernel_size, 2)
    return nn.MaxPool2d(kernel_size, 2, ceil_mode=True)


def branch_avg_pool(convention: str) -> nn.Module:
    """3x3 average pool of stride 1 that keeps the map's size."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=convention == "torch")


def branch_max_pool() -> nn.Module:
    """3x3 max pool of stride 1 that keeps the map's size, the same in both conventions."""
    return nn.MaxPool2d(3, 1, 1)


def strided_conv(conv: ConvBlock, cin: int, cout: int, kernel_size: int, convention: str) -> list[nn.Module]:
    """A convolution of stride 2 that halves the map, rounding up: one module, in convention "tf" a pad before it."""
    if convention == "tf":
        return [SamePad2d(kernel_size, 2), conv(cin, cout, kernel_size, stride=2)]
    return [conv(cin, cout, kernel_size, stride=2, padding=(kernel_size - 1) // 2)]


def chain(*modules: nn.Module) -> nn.Sequential:
    """`nn.Sequential` whose SAME pads take no number, so that names of weights do not depend on the convention."""
    named: OrderedDict[str, nn.Module] = OrderedDict()
    pads = 0
    for module in modules:
        if isinstance(module, SamePad2d):
            named[f"pad{pads}"] = module
            pads += 1
        else:
            named[str(len(named) - pads)] = module
    return nn.Sequential(named)


class Branches(nn.Module):
    """Runs every child on the same input and concatenates the results along the channels, in order of registration."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([child(x) for child in self.children()], 1)


def _check_auxiliary_map(x: Any) -> None:
    if not isinstance(x, fx.Proxy) and min(x.shape[2:]) < 17:  # a symbolic trace knows no sizes
        raise ValueError(
            f"the auxiliary head got a {x.shape[2]}x{x.shape[3]} map; allowed: 17x17 or larger, an image of "
            "at least 299x299 (train on smaller ones with aux_logits=False)"
        )


class AuxHead(nn.Module):
    """Auxiliary classifier of v3, v4 and Inception-ResNet-v2: [n, cin, 17, 17] -> [n, num_classes]."""

    def __init__(self, cin: int, num_classes: int, conv: ConvBlock) -> None:
        super().__init__()
        self.conv0 = conv(cin, 128, 1)
        self.conv1 = conv(128, 768, 5)
        self.fc = linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        _check_auxiliary_map(x)
        x = F.avg_pool2d(x, 5, 3)  # [n, cin, 5, 5]
        x = self.conv1(self.conv0(x))  # [n, 768, 1, 1]
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        like = next(self.parameters())
        self.fc = linear(768, num_classes).to(like.device, like.dtype)


def linear(cin: int, num_classes: int) -> nn.Module:
    """The classifier of `num_classes` classes; the identity for none."""
    return nn.Linear(cin, num_classes) if num_classes else nn.Identity()


GLOBAL_POOLS = ("avg", "max", "")


def global_pool(x: Tensor, kind: str) -> Tensor:
    """[n, c, h, w] -> [n, c] by "avg" or "max"; "" leaves the map as it is."""
    if kind == "avg":
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
    if kind == "max":
        return x.amax((2, 3))
    return x
