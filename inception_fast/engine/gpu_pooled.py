"""Convolutions of a GPU plan with the maximum behind them, as one step: where that was measured to be faster than two,
and nothing else reads what is between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.plan import ConvStep, Plan, PoolStep, View
from .segment import views


@dataclass(frozen=True)
class PooledStep:
    """What `first` writes is read by `second` alone, and lies in no memory."""

    name: str
    first: ConvStep
    second: PoolStep

    @property
    def relu(self) -> bool:
        """Of the one result: a maximum of what is not negative is not, and what ReLU makes of a maximum is the maximum
        of what it makes.
        """
        return self.first.outputs[0].relu or self.second.relu


def candidates(plan: Plan, kept: frozenset[int]) -> list[PooledStep]:
    """Every convolution of a plan with the maximum that alone reads its result, whatever their sizes are."""
    touching: dict[int, list[Any]] = {}
    for step in plan.steps:
        for buffer in {view.buffer for view in views(step)}:
            touching.setdefault(buffer, []).append(step)
    found = []
    for buffer, steps in touching.items():
        whole = plan.buffers[buffer]
        if len(steps) != 2 or whole.kind != "arena" or buffer in kept:
            continue
        conv, pool = steps
        if isinstance(conv, ConvStep) and isinstance(pool, PoolStep) and _joined(conv, pool, View(buffer, 0, whole.c)):
            found.append(PooledStep(f"{conv.name} + {pool.name}", conv, pool))
    return found


def _joined(conv: ConvStep, pool: PoolStep, middle: View) -> bool:
    alone = len(conv.outputs) == 1 and conv.outputs[0].view == middle == pool.x and conv.residual is None
    return alone and conv.spec.groups == 1 and pool.spec.kind == "max" and pool.shift is None


def merged(steps: Sequence[Any], taken: Sequence[PooledStep]) -> list[Any]:
    """The steps with those `taken` in place of their convolutions, and without the pools of these: between the two
    others may write to what the convolution reads, but none touches what the pool writes.
    """
    instead: dict[int, PooledStep] = {id(one.first): one for one in taken}
    gone = {id(one.second) for one in taken}
    return [instead.get(id(step), step) for step in steps if id(step) not in gone]
