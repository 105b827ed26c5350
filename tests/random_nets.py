"""Small random networks: native steps, torch calls, views and writes in place in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[..., Tensor]  # of the network and its operands


class RandomNet(nn.Module):
    """`length` calls on maps made so far, the same for a seed; returns the last maps, as they are and as logits.

    It is built by running it once on the example, so that each call fits what there is.
    """

    def __init__(self, seed: int, example: Tensor, length: int = 12) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.layers = nn.ModuleList()
        self.calls: list[tuple[str, Call, tuple[int, ...]]] = []
        values = [example]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            while len(self.calls) < length:
                made = self._draw(values)
                if made is not None:
                    self.calls.append(made)
                    values.append(made[1](self, *(values[i] for i in made[2])))
            self.head = nn.Linear(values[-1].shape[1], 7)
            for layer in self.layers:
                if isinstance(layer, nn.BatchNorm2d):
                    for value in (layer.weight, layer.running_var):
                        value.uniform_(0.5, 1.5)
                    for value in (layer.bias, layer.running_mean):
                        value.normal_()
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Any]:
        values = [x]
        for _, call, operands in self.calls:
            values.append(call(self, *(values[i] for i in operands)))
        return {"maps": tuple(values[-3:]), "logits": self.head(values[-1].mean((2, 3)))}

    def extra_repr(self) -> str:
        return "; ".join(f"{i + 1} = {name}{operands}" for i, (name, _, operands) in enumerate(self.calls))

    def _draw(self, values: list[Tensor]) -> tuple[str, Call, tuple[int, ...]] | None:
        """A call and its operands, mostly of the newest maps; None where the one drawn does not fit."""
        name = self.random.choice(list(MAKERS))
        at = len(values) - 1 if self.random.random() < 0.6 else self.random.randrange(len(values))
        kind = MAKERS[name]
        if kind in (_sum, _concat):
            fits = (lambda v: v.shape) if kind is _sum else (lambda v: v.shape[2:])
            others = [i for i, v in enumerate(values) if fits(v) == fits(values[at])]
            operands = (at, *self.random.choices(others, k=1 if kind is _sum else self.random.randint(1, 2)))
            if kind is _concat and sum(values[i].shape[1] for i in operands) > 48:
                return None
            return name, kind(self), operands
        call = kind(self, values[at])
        return None if call is None else (name, call, (at,))

    def layer(self, made: nn.Module) -> Call:
        """A call of a new layer, by its place, so that a copy of the network calls its own."""
        self.layers.append(made.eval())
        place = len(self.layers) - 1
        return lambda net, v: net.layers[place](v)


def plain(function: Callable[..., Tensor]) -> Call:
    """A call of what needs no layer."""
    return lambda net, *v: function(*v)


def _conv(net: RandomNet, x: Tensor) -> Call | None:
    draw, (_, c, h, w) = net.random, x.shape
    kernel, dilation = (draw.randint(1, 5), draw.randint(1, 5)), draw.choice((1, 1, 1, 1, 2))
    padding: Any = "same" if draw.random() < 0.1 else (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2))
    stride = 1 if padding == "same" else draw.choice((1, 1, 1, 2))
    if padding != "same" and min(h - dilation * (kernel[0] - 1), w - dilation * (kernel[1] - 1)) < 1:
        return None
    groups = draw.choice([g for g in (1, 1, 1, 2, c) if c % g == 0])
    out = groups * draw.randint(1, max(1, 20 // groups))
    options = {"dilation": dilation, "groups": groups, "bias": draw.random() < 0.5}
    return net.layer(nn.Conv2d(c, out, kernel, stride, padding, **options))


def _norm(net: RandomNet, x: Tensor) -> Call:
    norm, after = net.layer(nn.BatchNorm2d(x.shape[1])), net.random.choice((F.relu, F.relu, lambda y: y))
    return lambda net, v: after(norm(net, v))


def _by_size(net: RandomNet, x: Tensor) -> Call:
    """A norm that amplifies no rounding, as those that divide by a deviation do."""
    dims = net.random.choice((1, (2, 3), (1, 2, 3)))
    return plain(lambda v: v / (1 + v.abs().mean(dims, keepdim=True)))


def _activation(net: RandomNet, x: Tensor) -> Call:
    return plain(net.random.choice((F.relu, F.silu, torch.sigmoid, F.relu6, lambda v: v.clamp_min(0), F.leaky_relu)))


def _in_place(net: RandomNet, x: Tensor) -> Call:
    conv = net.layer(nn.Conv2d(x.shape[1], 8, 1))
    return lambda net, v: conv(net, v).mul_(0.5).add_(1).relu_()


def _arithmetic(net: RandomNet, x: Tensor) -> Call:
    a, b = net.random.uniform(0.5, 1.5), net.random.uniform(-1, 1)
    return plain(net.random.choice((lambda v: v * a + b, lambda v: b - v / a, lambda v: v + v, lambda v: v - b)))


def _sum(net: RandomNet) -> Call:
    scale = net.random.choice((1.0, 0.3))
    return plain(lambda v, w: v + scale * w)


def _concat(net: RandomNet) -> Call:
    dim = net.random.choice((1, -3))
    return plain(lambda *v: torch.cat(v, dim))


def _slice(net: RandomNet, x: Tensor) -> Call | None:
    c = x.shape[1]
    if c < 2:
        return None
    low = net.random.randrange(c - 1)
    high = net.random.randint(low + 1, c)
    parts = [low + 1, c - low - 1]
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda v: v[:, low:high],
        lambda v: v[:, low : low + 1],
        lambda v: v.chunk(2, 1)[0],
        lambda v: v.split(parts, -3)[1],
        lambda v: torch.cat(v.split(parts, 1)[::-1], 1),
    )
    return plain(net.random.choice(ways))


def _pool(net: RandomNet, x: Tensor) -> Call | None:
    draw, (_, _, h, w) = net.random, x.shape
    kernel, stride = (draw.randint(2, 3), draw.randint(2, 3)), draw.randint(1, 2)
    padding, ceil, include = draw.randint(0, 1), draw.random() < 0.5, draw.random() < 0.5
    if h < kernel[0] or w < kernel[1]:
        return None
    if draw.random() < 0.5:
        return plain(lambda v: F.max_pool2d(v, kernel, stride, padding, ceil_mode=ceil))
    return plain(lambda v: F.avg_pool2d(v, kernel, stride, padding, ceil, include))


def _whole(net: RandomNet, x: Tensor) -> Call:
    """A mean of the map, as squeeze and excitation has it."""
    return plain(lambda v: v * F.adaptive_avg_pool2d(v, 1).sigmoid())


def _pad(net: RandomNet, x: Tensor) -> Call:
    sides, value = [net.random.randint(0, 1) for _ in range(4)], net.random.choice((0.0, 0.5))
    return plain(lambda v: F.pad(v, sides, value=value))


def _move(net: RandomNet, x: Tensor) -> Call:
    c = x.shape[1]
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda v: v.contiguous().view(-1, *v.shape[2:]).view(v.shape),
        lambda v: v.reshape(v.shape[0], -1).view(v.shape),
        lambda v: v.transpose(2, 3),
        lambda v: v.flip(3),
        lambda v: v.unflatten(1, (c, 1)).transpose(1, 2).flatten(1, 2),
        lambda v: v.flatten(2).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(v.shape),
        lambda v: F.dropout(v, 0.5, False),
    )
    return plain(net.random.choice(ways))


MAKERS: dict[str, Any] = {
    "conv": _conv, "conv again": _conv, "norm": _norm, "by size": _by_size, "activation": _activation,
    "in place": _in_place, "arithmetic": _arithmetic, "sum": _sum, "concat": _concat, "slice": _slice, "pool": _pool,
    "whole": _whole, "pad": _pad, "move": _move,
}  # fmt: skip
