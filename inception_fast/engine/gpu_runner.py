"""Runs a program on an NVIDIA GPU: one CUDA graph for each input size, its branches concurrent.

A call copies its inputs into the graph's own memory, replays the graph on the caller's stream and copies the results
into fresh tensors, so that nothing it returns is ever written again. Calls of one program follow one another on the
device, whatever streams and threads they come from; calls of different programs do not wait for each other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.plan import ALIGNMENT, Buffer, Step
from ..kernels.triton.launch import Launch
from . import graph as ir
from .gpu_hopper import Hopper
from .gpu_plan import DTYPES, Choose, GpuPlan, Packs, Task
from .plan import Program, Tap, TorchItem
from .segment import NativeItem


class GpuCompiled:
    """A program on one device. Any number of threads and streams may run it at once.

    Raises ValueError for a program that is not one native plan from inputs to outputs: nothing leaves the GPU half way.
    """

    def __init__(
        self, program: Program, packs: Packs, choose: Choose, *, tf32: bool = False, hopper: Hopper | None = None
    ) -> None:
        self.program, self.device = program, packs.device
        self.item = _only_plan(program)
        self.plan = GpuPlan(self.item.plan, packs, choose, tf32=tf32, hopper=hopper)
        self.inputs = [_index(source) for source in self.item.sources]
        buffers = sorted((b for b in program.buffers if b.kind == "output"), key=lambda b: b.position)
        self.buffers: list[Buffer] = buffers
        self.native = {0: self.plan}
        self._packs = packs
        self._lock = threading.Lock()
        self._static: _Static | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def packed_bytes(self) -> int:
        """Of the weights, which the programs of a session share."""
        return self._packs.bytes + (0 if self.plan.hopper is None else self.plan.hopper.bytes)

    def ran_by(self, step: Step) -> tuple[str, str]:
        """The backend of a step, and why it is not another where that was asked."""
        return self.plan.ran_by(step)

    @property
    def held_bytes(self) -> int:
        """Memory that stays while the program lives: arena, inputs and outputs; 0 before the first call."""
        return 0 if self._static is None else self._static.bytes

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        """The module's flattened outputs. With `seconds` every task is timed alone, without the graph."""
        with self._lock, torch.no_grad(), self._on_device():
            given = [inputs[i] for i in self.inputs]
            if self._static is None:
                self._static = _Static(self, given)
                if self.device.type == "cuda":
                    self._capture()
            static = self._static
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            static.take(given)
            if seconds is not None:
                seconds += self._timed(static)
            elif self._graph is not None:
                self._graph.replay()
            else:
                static.run_in_order()
            bases = [base.clone() for base in static.outputs]
            if self._done is not None:
                self._done.record(torch.cuda.current_stream())
        return [_output(o, bases, self.program, inputs) for o in self.program.outputs]

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _capture(self) -> None:
        """Runs once, which compiles every kernel, then records the branches as one graph."""
        assert self._static is not None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._static.run_in_order()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile; only this one must not.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            _branches(self.plan.tasks, self._static.launches, stream)
        self._graph, self._done = graph, torch.cuda.Event()

    def _timed(self, static: _Static) -> list[tuple[str, float]]:
        if self.device.type != "cuda":
            raise RuntimeError("step times need a GPU; interpreted kernels have none worth keeping")
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(static.launches) + 1)]
        marks[0].record()
        for launches, mark in zip(static.launches, marks[1:], strict=True):
            for one in launches:
                one.run()
            mark.record()
        marks[-1].synchronize()
        names = [task.name for task in self.plan.tasks]
        return [(n, a.elapsed_time(b) / 1e3) for n, a, b in zip(names, marks, marks[1:], strict=False)]


class _Static:
    """The memory that a graph's launches point at, and these launches."""

    def __init__(self, compiled: GpuCompiled, given: Sequence[Tensor]) -> None:
        device, plan = compiled.device, compiled.plan
        shapes = [_mapped(x, shape) for x, shape in zip(given, compiled.item.plan.inputs, strict=True)]
        self.inputs = [torch.empty_like(x, device=device) for x in shapes]
        self.outputs = [
            torch.empty((b.n, b.h, b.w, b.c), dtype=DTYPES[b.dtype], device=device) for b in compiled.buffers
        ]
        whole = torch.empty(plan.arena_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        self.arena = whole[-whole.data_ptr() % ALIGNMENT :]
        self.bytes = whole.numel() + sum(t.numel() * t.element_size() for t in (*self.inputs, *self.outputs))
        self.maps = compiled.item.plan.inputs
        used = [self.outputs[o] for o in compiled.item.outputs]
        self.launches: list[list[Launch]] = plan.launches(self.inputs, used, self.arena)
        self.bytes += plan.workspace_bytes

    def take(self, given: Sequence[Tensor]) -> None:
        for mine, x, shape in zip(self.inputs, given, self.maps, strict=True):
            mine.copy_(_mapped(x, shape), non_blocking=True)

    def run_in_order(self) -> None:
        for launches in self.launches:
            for one in launches:
                one.run()


def _branches(tasks: Sequence[Task], launches: Sequence[Sequence[Launch]], main: torch.cuda.Stream) -> None:
    """Puts every task on its stream; streams fork from `main` and join it at the end."""
    streams = [main] + [torch.cuda.Stream() for _ in range(max(task.stream for task in tasks))]
    fork = torch.cuda.Event()
    fork.record(main)
    for stream in streams[1:]:
        stream.wait_event(fork)
    done: dict[int, torch.cuda.Event] = {}
    awaited = {i for task in tasks for i in task.waits}
    for j, (task, own) in enumerate(zip(tasks, launches, strict=True)):
        stream = streams[task.stream]
        for i in task.waits:
            stream.wait_event(done[i])
        with torch.cuda.stream(stream):
            for one in own:
                one.run()
        if j in awaited:
            done[j] = torch.cuda.Event()
            done[j].record(stream)
    for stream in streams[1:]:
        main.wait_stream(stream)


def _only_plan(program: Program) -> NativeItem:
    foreign = [item for item in program.items if isinstance(item, TorchItem)]
    if foreign:
        named = "; ".join(f"{item.node.name}: {item.reason}" for item in foreign[:5])
        raise ValueError(f"{len(foreign)} nodes have no GPU step ({named}); allowed: networks of native steps alone")
    items = [item for item in program.items if isinstance(item, NativeItem)]
    if len(items) != 1:
        raise ValueError(f"{len(items)} native plans; allowed: one")
    return items[0]


def _index(source: ir.Node | int) -> int:
    if isinstance(source, int) or not isinstance(source.op, ir.Input):
        raise ValueError(f"a step reads {source}; allowed: inputs of the module")
    return source.op.index


def _mapped(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    return x if x.dim() == 4 else x.reshape(shape)


def _output(output: Any, bases: Sequence[Tensor], program: Program, inputs: Sequence[Any]) -> Any:
    """One of the module's results, from the fresh copies of the output buffers."""
    if isinstance(output, Tap):
        buffer = program.buffers[output.view.buffer]
        y = bases[buffer.position][..., output.view.offset : output.view.offset + output.view.channels]
        y = y.permute(0, 3, 1, 2)
        return y if len(output.shape) == 4 else y.reshape(output.shape)
    if isinstance(output, ir.Node) and isinstance(output.op, ir.Input):
        return inputs[output.op.index].clone()
    if isinstance(output, ir.Node):
        raise ValueError(f"the result {output.name} has no GPU step")
    return output
