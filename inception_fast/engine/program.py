"""Compiled programs: native calls and torch calls over one leased arena."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels import cpu
from ..kernels.plan import ALIGNMENT, ConvStep, PairStep, Plan, Step, View
from . import graph as ir
from . import interpret
from .plan import Program, Tap, TorchItem
from .segment import NativeItem

IDLE_ARENAS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.uint8: "uint8"}


class Executable(Protocol):
    """What a call needs of a backend's program."""

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        """The module's flattened outputs; with `seconds`, native steps append their names and times."""


class Planned(Executable, Protocol):
    """A program of native plans, `native` by the positions of their items."""

    @property
    def program(self) -> Program: ...

    @property
    def native(self) -> Mapping[int, Any]: ...

    @property
    def packed_bytes(self) -> int: ...


class ArenaPool:
    """Memory for calls in flight: each leases one arena alone, so that calls may run at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Tensor] = []

    def lease(self, size: int) -> Tensor:
        """[>= size] uint8, aligned for the native kernels."""
        with self._lock:
            if len(self._idle) == 1 and self._idle[0].numel() >= size:
                return self._idle.pop()
            fitting = [a for a in self._idle if a.numel() >= size]
            if fitting:
                best = min(fitting, key=Tensor.numel)
                self._idle = [a for a in self._idle if a is not best]
                return best
        whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        start = -whole.data_ptr() % ALIGNMENT
        return whole[start : start + size]

    def give_back(self, arena: Tensor) -> None:
        with self._lock:
            if not self._idle:
                self._idle.append(arena)
                return
            self._idle = sorted([*self._idle, arena], key=Tensor.numel)[-IDLE_ARENAS:]


class OutputBuffer(NamedTuple):
    """`sizes` are [n, h, w, c]; `shape` is that of the one result which is all of it, where there is one.

    Such a result is made as it is returned: after the native call nothing of Python's is in the caches, and each view
    of a tensor takes 10 to 20 microseconds there.
    """

    sizes: tuple[int, int, int, int]
    shape: ir.Shape | None

    def empty(self) -> Tensor:
        shape = self.sizes if self.shape is None else self.shape
        maps = self.shape is not None and len(shape) == 4
        layout = torch.channels_last if maps else torch.contiguous_format
        return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)

    def nhwc(self, made: Tensor) -> Tensor:
        if self.shape is None:
            return made
        return made.permute(0, 2, 3, 1) if len(self.shape) == 4 else made.view(self.sizes)


def output_buffers(program: Program) -> list[OutputBuffer]:
    """By position."""
    taps: dict[int, list[Tap]] = {}
    for output in program.outputs:
        if isinstance(output, Tap):
            taps.setdefault(output.view.buffer, []).append(output)
    found: dict[int, OutputBuffer] = {}
    for number, b in enumerate(program.buffers):
        if b.kind == "output":
            one = taps[number][0] if len(taps.get(number, ())) == 1 else None
            whole = one is not None and one.view.channels == b.c and (len(one.shape) == 4 or b.h == b.w == 1)
            found[b.position] = OutputBuffer((b.n, b.h, b.w, b.c), one.shape if one is not None and whole else None)
    return [found[position] for position in range(len(found))]


def convolutions_of(step: Step) -> tuple[ConvStep, ...]:
    """A convolution itself, a pair's two, none of any other step."""
    if isinstance(step, PairStep):
        return step.first, step.second
    return (step,) if isinstance(step, ConvStep) else ()


def convolutions(program: Program) -> list[list[ConvStep]]:
    """The convolutions of each native call, in order, parts of pairs apart."""
    found: list[list[ConvStep]] = []
    for item in program.items:
        if isinstance(item, NativeItem):
            found.append([conv for step in item.plan.steps for conv in convolutions_of(step)])
    return found


def same_weights(a: Program, b: Program) -> bool:
    """Whether two programs would pack the same numbers in the same order, whatever their sizes."""
    left, right = convolutions(a), convolutions(b)
    return [len(x) for x in left] == [len(x) for x in right] and all(
        _same_convolution(x, y) for xs, ys in zip(left, right, strict=True) for x, y in zip(xs, ys, strict=True)
    )


def _same_convolution(a: ConvStep, b: ConvStep) -> bool:
    def layout(step: ConvStep) -> tuple[object, ...]:
        shapes = [part.shape for part in step.parts]
        return shapes, step.spec.groups, step.tile, [(o.view.channels, o.relu) for o in step.outputs]

    if layout(a) != layout(b):
        return False
    arrays = ((a.scale, b.scale), (a.shift, b.shift), *zip(a.parts, b.parts, strict=True))
    return all(_same_memory(x, y) or np.array_equal(x, y) for x, y in arrays)


def _same_memory(x: np.ndarray, y: np.ndarray) -> bool:
    return x.ctypes.data == y.ctypes.data and x.strides == y.strides


class Copies:
    """What torch calls read of a module's parameters, copied once for all programs of a session.

    Native steps hold packed weights: where the module is trained on, no part of a program may follow it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # with the original, whose address is in the key

    def of(self, op: ir.Op) -> ir.Op:
        return ir.with_leaves(op, Tensor, self._copy)

    def _copy(self, value: Tensor) -> Tensor:
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in self._made:
            self._made[key] = value, value.detach().clone()
        return self._made[key][1]


class Interpreted:
    """A graph run by torch, for the backends "torch" (in `dtype`) and "reference" (in float64, rounded at the end).

    It reads the module's own parameters: who keeps it sees to it that they have not changed.
    """

    def __init__(self, graph: ir.Graph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph.copy(), dtype
        for node in self.graph.nodes:
            if isinstance(node.op, ir.Conv) and len(node.op.parts) > 1:  # joined once, not in every call
                node.op = replace(node.op, weight=torch.cat(node.op.parts))
        self.held = storages(t for node in self.graph.nodes for t in ir.tensors_of(node.op))

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        with torch.no_grad():
            found = interpret.run(self.graph, inputs, self.dtype)
        held = self.held | storages(inputs)
        return [own_result(node, value, held) for node, value in zip(self.graph.outputs, found, strict=True)]


def storages(values: Iterable[Any]) -> set[int]:
    """The memory that tensors lie in."""
    tensors = (v for v in values if isinstance(v, Tensor) and v.layout == torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def own_result(node: Any, value: Any, held: set[int]) -> Any:
    """The value in its captured dtype, copied where it would lie in the memory of inputs or parameters, `held`."""
    if not isinstance(node, ir.Node) or not isinstance(value, Tensor):
        return value
    value = value.to(node.dtype)
    return value.clone() if storages([value]) & held else value


class Compiled:
    """A program whose native calls are compiled. Any number of threads may run it at once.

    With `like`, compiled with the same weights for other sizes, it shares that one's packed weights, on the same tier.
    `sliced`: what runs in place of the plan of the program's only item, a few images at a time.
    """

    def __init__(
        self,
        program: Program,
        pool: ArenaPool,
        like: Compiled | None = None,
        sliced: Plan | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.program, self.pool = program, pool
        self.arena_bytes = program.arena_bytes if sliced is None else sliced.arena_bytes
        self.slices = sliced.inputs[0][0] // sliced.images[0] if sliced else 1
        self.native: dict[int, cpu.CompiledPlan] = {}
        self.plans: list[Plan] = []  # of the native calls
        self.ops: dict[int, ir.Op] = {}
        copies = copies or Copies()
        shared = iter(() if like is None else like.native.values())
        for i, item in enumerate(program.items):
            if isinstance(item, NativeItem):
                first, plan = next(shared, None), sliced or item.plan
                self.plans.append(plan)
                self.native[i] = cpu.compile(plan, first.tier if first else None, like=first)
            else:
                self.ops[i] = copies.of(item.node.op)
        self.outputs = output_buffers(program)
        self.inputs = [(n, n.op.index) for n in program.graph.inputs if isinstance(n.op, ir.Input)]
        self.dead = dead_after(program)
        self.held = storages(t for op in self.ops.values() for t in ir.tensors_of(op))

    @property
    def packed_bytes(self) -> int:
        return sum(c.packed_bytes for c in self.native.values())

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        arena = self.pool.lease(self.arena_bytes)
        try:
            if not self.ops:
                return _Run(self, inputs, arena, seconds).run()
            with torch.no_grad():
                return _Run(self, inputs, arena, seconds).run()
        finally:
            self.pool.give_back(arena)


def dead_after(program: Program) -> list[list[ir.Node]]:
    """For each item, the values from outside the arena that nothing after it reads."""
    last: dict[ir.Node, int] = {}
    for i, item in enumerate(program.items):
        used = item.node.inputs if isinstance(item, TorchItem) else item.sources
        last.update({node: i for node in used if isinstance(node, ir.Node) and node not in program.taps})
    for output in program.outputs:
        if isinstance(output, ir.Node):
            last.pop(output, None)
    return [[node for node, i in last.items() if i == item] for item in range(len(program.items))]


class _Run:
    """One call: `bases` are the output buffers as [n, h, w, c], `values` what lives outside the arena."""

    def __init__(
        self, compiled: Compiled, inputs: Sequence[Any], arena: Tensor, seconds: list[tuple[str, float]] | None
    ) -> None:
        self.compiled, self.program, self.arena, self.seconds = compiled, compiled.program, arena, seconds
        self.inputs = inputs
        self.bases = [output.empty() for output in compiled.outputs]
        self.values: dict[ir.Node, Any] = {node: inputs[i] for node, i in compiled.inputs}
        self.threads = torch.get_num_threads()

    def run(self) -> list[Any]:
        for i, item in enumerate(self.program.items):
            if isinstance(item, TorchItem):
                self._torch(i, item)
            else:
                self._native(i, item)
            for node in self.compiled.dead[i]:
                del self.values[node]
        return [self._output(o) for o in self.program.outputs]

    def _output(self, output: Any) -> Any:
        if isinstance(output, Tap):
            buffer = self.program.buffers[output.view.buffer]
            if buffer.kind == "output" and self.compiled.outputs[buffer.position].shape is not None:
                return self.bases[buffer.position]
            return self._tensor(output)
        if not isinstance(output, ir.Node):
            return output
        return own_result(output, self.values[output], self.compiled.held | storages(self.inputs))

    def _base(self, number: int) -> Tensor:
        """Program buffer `number` as [n, h, w, c]."""
        b = self.program.buffers[number]
        if b.kind == "output":
            return self.compiled.outputs[b.position].nhwc(self.bases[b.position])
        return self.arena[b.position : b.position + b.bytes].view(DTYPES[b.dtype]).view(b.n, b.h, b.w, b.c)

    def _tensor(self, tap: Tap) -> Tensor:
        view: View = tap.view
        part = self._base(view.buffer)
        if view.channels != part.shape[3]:
            part = part[..., view.offset : view.offset + view.channels]
        part = part.permute(0, 3, 1, 2).float()
        return part if len(tap.shape) == 4 else part.reshape(tap.shape)

    def _native(self, index: int, item: NativeItem) -> None:
        arguments: list[Any] = []
        alive = []
        for source, (n, c, h, w) in zip(item.sources, item.plan.inputs, strict=True):
            if isinstance(source, int):
                x = self._base(source).permute(0, 3, 1, 2)
            else:
                x = self.values[source]
                x = x.resolve_neg() if x.is_neg() else x
                x = x if x.dim() == 4 else x.reshape(n, c, h, w)
            alive.append(x)
            arguments.append((x.data_ptr(), NAMES.get(x.dtype) or str(x.dtype), x.stride()))
        pointers = [self.bases[o].data_ptr() for o in item.outputs]
        native = self.compiled.native[index]
        if self.seconds is None:
            native.run(arguments, pointers, self.arena.data_ptr(), self.threads)
        else:
            times = native.run_timed(arguments, pointers, self.arena.data_ptr(), self.threads)
            self.seconds += zip((s.name for s in item.plan.steps), times, strict=True)

    def _torch(self, index: int, item: TorchItem) -> None:
        node = item.node
        inputs = [self._tensor(self.program.taps[i]) if i in self.program.taps else self.values[i] for i in node.inputs]
        result = interpret.evaluate(self.compiled.ops[index], inputs)
        self.values[node] = pytree.tree_map_only(Tensor, self._own, result)

    def _own(self, value: Tensor) -> Tensor:
        """The value in memory that later steps do not overwrite."""
        inside = value.untyped_storage().data_ptr() == self.arena.untyped_storage().data_ptr()
        return value.clone() if inside else value
