"""Large batches a few images at a time: a network whose activations leave the last cache waits for memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import graph as ir
from .plan import Program, Tap
from .program import Compiled
from .segment import NativeItem

# Half of the last-level cache that two cores of a server part see; the weights stream through the rest. On two threads
# of a Zen 5 with 32 MiB, 16 images of v3 take 3 % less so in float32 and 5 % less in bfloat16.
ARENA_LIMIT = 16 << 20


def images_at_a_time(program: Program) -> int | None:
    """How many images of the program's batch should run together; None where all should, or must.

    Images must not meet: only where everything is native, and every input and output has the batch in front.
    """
    alone = len(program.items) == 1 and isinstance(program.items[0], NativeItem)
    outputs = [o.shape[0] if isinstance(o, Tap) else None for o in program.outputs]
    inputs = [n for item in program.items if isinstance(item, NativeItem) for n, *_ in item.plan.inputs]
    batches = {*outputs, *inputs}
    if not alone or len(batches) != 1 or program.arena_bytes <= ARENA_LIMIT:
        return None
    (batch,) = batches
    if batch is None or batch < 2 or not all(isinstance(n.op, ir.Input) for n in program.graph.inputs):
        return None
    return max(1, ARENA_LIMIT * batch // program.arena_bytes)


class Sliced:
    """A batch of `batch` images run by `main`, `step` at a time, and `rest` where that leaves some over."""

    def __init__(self, main: Compiled, rest: Compiled | None, batch: int, step: int) -> None:
        self.main, self.rest, self.batch, self.step = main, rest, batch, step
        self.program, self.native = main.program, main.native

    @property
    def packed_bytes(self) -> int:
        return self.main.packed_bytes

    @property
    def slices(self) -> int:
        return -(-self.batch // self.step)

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
