"""Work per layer of any module: multiply-adds and parameters, counted on shapes alone, without computing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, state, shapes)
    counts = counter.get_flop_counts()
    root = type(module).__name__

    def flops(name: str) -> int:
        return sum(counts.get(f"{root}.{name}" if name else root, {}).values())

    found = []
    for name, child in module.named_modules():
        inner = sum(flops(f"{name}.{key}" if name else key) for key, _ in child.named_children())
        macs = (flops(name) - inner) // 2
        params = sum(p.numel() for p in child.parameters(recurse=False))
        if macs or params:
            found.append(LayerCost(name, type(child).__name__, macs, params))
    return found


def totals(costs: Iterable[LayerCost]) -> tuple[int, int]:
    """(multiply-adds, parameters) of all layers together."""
    costs = list(costs)
    return sum(c.macs for c in costs), sum(c.params for c in costs)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
