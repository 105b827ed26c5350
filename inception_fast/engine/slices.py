"""Large batches a few images at a time: a network whose activations leave the last cache waits for memory.

So would one whose weights leave it if every image asked for them anew. So the first steps, whose maps are large and
whose weights are few, run the fewest images at a time, and from where on the weights no longer fit the cache, as many
as do: loops within loops (`Plan.images`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.plan import ConvStep, PairStep, Plan, PoolStep, Step
from ..kernels.spec import ITEM_BYTES, PairSpec
from . import graph as ir
from .memory import Lifetime, place_by_halves
from .plan import Program, Tap
from .program import Compiled, convolutions_of
from .segment import NativeItem, views

# Half of the last-level cache that two cores of a server part see; the weights stream through the rest. On two threads
# of a Zen 5 with 32 MiB, 16 images of v3 take 3 % less so in float32 and 5 % less in bfloat16.
ARENA_LIMIT = 16 << 20
WEIGHTS_LIMIT = ARENA_LIMIT // 2

Fuses = Callable[[PairSpec], bool]


def plan_in_slices(program: Program) -> Plan | None:
    """The program's plan where it should run in slices; None where all images should run together, or must.

    Images must not meet: only where everything is native, and every input and output has the batch in front.
    """
    items = program.items
    outputs = [o.shape[0] if isinstance(o, Tap) else None for o in program.outputs]
    inputs = [n for item in items if isinstance(item, NativeItem) for n, *_ in item.plan.inputs]
    batches = {*outputs, *inputs}
    if len(items) != 1 or len(batches) != 1 or program.arena_bytes <= ARENA_LIMIT:
        return None
    (batch,) = batches
    if batch is None or batch < 2 or not all(isinstance(n.op, ir.Input) for n in program.graph.inputs):
        return None
    return items[0].plan if isinstance(items[0], NativeItem) else None


def images_at_a_time(plan: Plan) -> tuple[int, ...]:
    """How many images each step should run at a time: powers of two, from the first step to the last never fewer."""
    batch = plan.inputs[0][0]
    held = [size / batch for size in _bytes_held(plan)]

    def fitting(size: float) -> int:
        return 1 << int(math.log2(max(1, min(batch, ARENA_LIMIT // max(1, size)))))

    first, weights, wanted = fitting(max(held)), 0, []
    for step, size in zip(plan.steps, held, strict=True):
        weights += sum(map(_weight_bytes, convolutions_of(step)))
        wanted.append(fitting(size) if weights > WEIGHTS_LIMIT else first)
    return tuple(min(wanted[i:]) for i in range(len(wanted)))


def in_slices(plan: Plan, images: Sequence[int], fuses: Fuses) -> Plan:
    """The plan with so many images of each step at a time, and as many in each buffer as steps hold in it together.

    A buffer that steps of several numbers share fills up slice by slice, so it keeps its place from the start.
    """
    steps = [_of_images(step, n) for step, n in zip(plan.steps, images, strict=True)]
    touched = _touched(plan)
    fused = {s.second.x.buffer for s in steps if isinstance(s, PairStep) and _is_fused(s, fuses)}
    buffers = []
    for i, buffer in enumerate(plan.buffers):
        if buffer.kind in ("arena", "local") and touched[i]:
            kind, position = ("local", i) if i in fused else ("arena", 0)
            buffer = replace(buffer, n=max(images[t] for t in touched[i]), kind=kind, position=position)
        buffers.append(buffer)
    arena = [i for i, buffer in enumerate(buffers) if buffer.kind == "arena" and touched[i]]
    lives = []
    for i in arena:
        shared = len({images[t] for t in touched[i]}) > 1
        lives.append(Lifetime(buffers[i].bytes, 0 if shared else min(touched[i]), max(touched[i])))
    positions, total = place_by_halves(lives)
    for i, position in zip(arena, positions, strict=True):
        buffers[i] = replace(buffers[i], position=position)
    return Plan(tuple(buffers), tuple(steps), plan.inputs, total, tuple(images))


def _touched(plan: Plan) -> list[list[int]]:
    """The steps that read or write each buffer."""
    found: list[list[int]] = [[] for _ in plan.buffers]
    for i, step in enumerate(plan.steps):
        for number in {view.buffer for view in views(step)}:
            found[number].append(i)
    return found


def _bytes_held(plan: Plan) -> list[int]:
    """Bytes of the arena's buffers that are alive at each step."""
    held = [0] * len(plan.steps)
    for buffer, touched in zip(plan.buffers, _touched(plan), strict=True):
        if buffer.kind == "arena" and touched:
            for i in range(min(touched), max(touched) + 1):
                held[i] += buffer.bytes
    return held


def _weight_bytes(step: ConvStep) -> int:
    spec, (tile_h, tile_w) = step.spec, step.tile
    points = (spec.kh + tile_h - 1) * (spec.kw + tile_w - 1) if any(step.tile) else spec.kh * spec.kw
    return ITEM_BYTES[spec.dtype] * spec.oc * (spec.c // spec.groups) * points


def _of_images(step: Step, n: int) -> Step:
    if isinstance(step, PairStep):
        first, second = (replace(part, spec=replace(part.spec, n=n)) for part in (step.first, step.second))
        return replace(step, first=first, second=second)
    if isinstance(step, ConvStep):
        return replace(step, spec=replace(step.spec, n=n))
    return replace(step, spec=replace(step.spec, n=n)) if isinstance(step, PoolStep) else step


def _is_fused(step: PairStep, fuses: Fuses) -> bool:
    if step.kind != "chain" or any(step.first.tile) or any(step.second.tile):
        return False
    return fuses(PairSpec(step.first.spec, step.second.spec, step.kind))


class Sliced:
    """A batch run by `main`, `step` images at a time, and by `rest` where that leaves some over. `program` is that of
    all images, which nothing runs.
    """

    def __init__(self, program: Program, main: Compiled, rest: Compiled | Sliced | None, batch: int, step: int) -> None:
        self.program, self.main, self.rest, self.batch, self.step = program, main, rest, batch, step
        self.native, self.plans = main.native, main.plans

    @property
    def packed_bytes(self) -> int:
        return self.main.packed_bytes

    @property
    def arena_bytes(self) -> int:
        return self.main.arena_bytes

    @property
    def slices(self) -> int:
        return self.batch // self.step * self.main.slices + (self.rest.slices if self.rest else 0)

    def _batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        """The outputs of all slices; with `seconds`, every step's times in all of them together."""
        found: list[list[Tensor]] = []
        spent: dict[int, tuple[str, float]] = {}
        for start in range(0, self.batch, self.step):
            part = [x[start : start + self.step] if self._batched(x) else x for x in inputs]
            times: list[tuple[str, float]] | None = None if seconds is None else []
            whole = start + self.step <= self.batch
            executable = self.main if whole or self.rest is None else self.rest
            found.append(executable.run(part, times))
            for i, (name, time) in enumerate(times or ()):
                spent[i] = (name, spent.get(i, (name, 0.0))[1] + time)
        if seconds is not None:
            seconds += spent.values()
        return [torch.cat(parts) for parts in zip(*found, strict=True)]
