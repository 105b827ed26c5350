"""Work per layer of any module: multiply-adds and parameters, counted on shapes alone, without computing."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerCost:
    """What one submodule does itself, its children not counted in."""

    name: str
    kind: str
    macs: int
    params: int


def layers(module: nn.Module, *inputs: Tensor) -> list[LayerCost]:
    """The submodules of `module` that own parameters or multiply, in definition order.

    Multiply-adds are those of convolutions and matrix products, taps on the zero padding counted in; normalisation,
    pooling and activations count as none. Only shapes are computed with, so a network of any size takes no time.
    """
    state = {name: tensor.to("meta") for name, tensor in _tensors(module)}
    shapes = tuple(x.to("meta") for x in inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _own_work(module, counter) as work:
        torch.func.functional_call(module, state, shapes)
    found = []
    for name, child in module.named_modules():
        macs, params = work[child] // 2, sum(p.numel() for p in child.parameters(recurse=False))
        if macs or params:
            found.append(LayerCost(name, type(child).__name__, macs, params))
    return found


@contextlib.contextmanager
def _own_work(module: nn.Module, counter: FlopCounterMode) -> Iterator[collections.Counter[nn.Module]]:
    """What each submodule adds to the counter inside, its children not counted in: by the module, which may have
    several names and be called from anywhere.
    """
    work, known = collections.Counter[nn.Module](), set(module.modules())
    inside, seen = [module], 0

    def credit() -> None:
        nonlocal seen
        work[inside[-1]] += counter.get_total_flops() - seen
        seen = counter.get_total_flops()

    def enter(child: nn.Module, given: Any) -> None:
        credit()
        inside.append(child if child in known else inside[-1])

    def leave(child: nn.Module, given: Any, result: Any) -> None:
        credit()
        inside.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield work
        credit()
    finally:
        for handle in handles:
            handle.remove()


def totals(costs: Iterable[LayerCost]) -> tuple[int, int]:
    """(multiply-adds, parameters) of all layers together."""
    costs = list(costs)
    return sum(c.macs for c in costs), sum(c.params for c in costs)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
