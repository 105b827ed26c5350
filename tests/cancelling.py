"""Gradients that cancel, and what float32 may be off by in them.

In front of batch norm the gradient is what is left when its mean and its share along z are taken away, a thirtieth of
what is summed in the worst tensor here. What float32 is off by then says as much about the net as about who computed
it: a unit in the last place of one channel's mean moves the gradient of `c.conv.weight` by 4e-6. So the budget of a
tensor is measured on the net in float64: how far its gradient moves when all that float32 sums or stores is moved by
the budget of one float32 sum.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import numerics
from plain_layers import Plain


class Net(nn.Module):
    """Ours in the epilogue behind the first; cuDNN's in the second, which has too many products; a branch."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = block(16, 24, 3, 2, 1), block(24, 48, (1, 17), 1, (0, 8)), block(24, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([self.b(y), self.c(y)], 1)


def images() -> Tensor:
    return numerics.random(3, 16, 9, 9, seed=9)


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the sum of squares, by name, after two steps that add up; on the CPU in float64."""
    net.zero_grad()
    for _ in range(2):
        net(x).square().sum().backward()
    return {name: p.grad.double().cpu() for name, p in net.named_parameters() if p.grad is not None}


class _Moved(Function):
    """Each element up or down by `size` of itself, and so its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Iterator[int], size: float) -> Tensor:  # type: ignore[override]
        ctx.call = seeds, size
        return x + x * _signs(x, next(seeds)) * size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        seeds, size = ctx.call
        return grad + grad * _signs(grad, next(seeds)) * size, None, None


def _signs(x: Tensor, seed: int) -> Tensor:
    return numerics.random(*x.shape, seed=seed, dtype=torch.float64).sign()


def moved(layer: Plain, seeds: Iterator[int], size: float, x: Tensor) -> Tensor:
    """`layer` in training, step by step, moved wherever float32 sums or stores: z, the statistics, the scale, y, the
    parameters, and all their gradients, which are sums as well.
    """
    shake: Callable[[Tensor], Tensor] = lambda value: _Moved.apply(value, seeds, size)  # noqa: E731
    conv, bn = layer.conv, layer.bn
    z = shake(F.conv2d(x, shake(conv.weight), None, conv.stride, conv.padding))
    mean = shake(z.mean((0, 2, 3), keepdim=True))
    var = shake((z - mean).square().mean((0, 2, 3), keepdim=True))
    weight, bias = (shake(value).reshape(1, -1, 1, 1) for value in (bn.weight, bn.bias))
    return F.relu(shake((z - mean) * shake(weight * torch.rsqrt(var + bn.eps)) + bias))


def budgets(wide: nn.Module, x: Tensor) -> dict[str, float]:
    """The relative L2 error that each float32 gradient of the float64 net `wide` may have: the most of some draws."""
    exact, found = gradients(copy.deepcopy(wide), x), dict.fromkeys(dict(wide.named_parameters()), numerics.GRAD_REL_L2)
    seeds = itertools.count(1)
    for _ in range(numerics.MOVES):
        twin = copy.deepcopy(wide)
        for layer in twin.modules():
            if isinstance(layer, Plain):
                layer.forward = functools.partial(moved, layer, seeds, numerics.FP32_REL_L2)  # type: ignore[method-assign]
        for name, gradient in gradients(twin, x).items():
            found[name] = max(found[name], numerics.rel_l2(gradient, exact[name]))
    return found


def verdict(found: dict[str, dict[str, Tensor]], exact: dict[str, Tensor], allowed: dict[str, float]) -> str:
    """Empty where all gradients of the first of `found` are within their budgets; else a row for each tensor: what it
    may be off by, and the relative L2 error of each of `found`, by whom it was computed.
    """
    (_, mine), *_ = found.items()
    if set(mine) != set(exact) or not all(value.abs().max() > 0 for value in exact.values()):
        raise ValueError(f"gradients of {sorted(mine)}; allowed: those of {sorted(exact)}, none of them zero")
    errors = {who: {name: numerics.rel_l2(g[name], exact[name]) for name in exact} for who, g in found.items()}
    wrong = [name for name, error in next(iter(errors.values())).items() if not error <= allowed[name]]  # or NaN
    if not wrong:
        return ""
    rows = [
        f"{'over ' if name in wrong else '     '}{name:16} norm {exact[name].norm():9.3g} allowed {allowed[name]:.2e}"
        + "".join(f"  {who} {error[name]:.2e}" for who, error in errors.items())
        for name in exact
    ]
    return "\n".join([f"{len(wrong)} of {len(rows)} gradients are off, relative to float64:", *rows])
