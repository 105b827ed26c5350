"""Runs a program on an NVIDIA GPU: a CUDA graph for each native plan, its branches concurrent, and torch between them.

A network whose nodes all have kernels is one graph. A call copies its inputs into the graph's own memory, replays the
graph on the caller's stream and copies the results into fresh tensors, so that nothing it returns is ever written
again. Calls of one program follow one another on the device, whatever streams and threads they come from; calls of
different programs do not wait for each other. What no kernel computes runs through torch, on the device, under torch's
own settings of TF32 and determinism.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.plan import ALIGNMENT, Buffer, Step
from . import graph as ir
from . import interpret
from .gpu_hopper import Hopper
from .gpu_memory import Keeper
from .gpu_plan import DTYPES, Choose, GpuPlan, Packs
from .gpu_segment import Segment
from .plan import Program, Tap, TorchItem
from .program import dead_after, own_result, storages
from .segment import NativeItem


class GpuCompiled:
    """A program on one device. Any number of threads and streams may run it at once.

    `keeper` bounds what this and other programs hold between their calls.
    """

    def __init__(
        self, program: Program, packs: Packs, choose: Choose, *, tf32: bool = False, keeper: Keeper | None = None,
        hopper: Hopper | None = None,
    ) -> None:  # fmt: skip
        self.program, self.device = program, packs.device
        self.kept = _kept(program)
        self.native: dict[int, GpuPlan] = {}
        self.ops: dict[int, ir.Op] = {}
        for i, item in enumerate(program.items):
            if isinstance(item, NativeItem):
                kept = frozenset(self.shared(item))
                self.native[i] = GpuPlan(item.plan, packs, choose, tf32=tf32, kept=kept, hopper=hopper)
            else:
                self.ops[i] = on_device(item.node.op, self.device)
        self.hopper = hopper
        if hopper is not None:
            hopper.expect_work(task for plan in self.native.values() for task in plan.tasks)
        buffers = sorted((b for b in program.buffers if b.kind == "output"), key=lambda b: b.position)
        self.buffers: list[Buffer] = buffers
        self.inputs = [(n, n.op.index) for n in program.graph.inputs if isinstance(n.op, ir.Input)]
        self.dead = dead_after(program)
        self.held = storages(t for op in self.ops.values() for t in ir.tensors_of(op))
        self._packs, self._keeper = packs, keeper or Keeper.of(self.device)
        self._lock = threading.Lock()
        self._static: _Static | None = None
        self._done: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None  # that of the newest call

    @property
    def plan(self) -> GpuPlan:
        """The only native plan. Raises ValueError where torch runs between several, or alone."""
        if len(self.native) != 1:
            raise ValueError(f"{len(self.native)} native plans; allowed: one")
        return next(iter(self.native.values()))

    @property
    def segments(self) -> dict[int, Segment]:
        """The native plans on their memory, as far as calls have come to them; none after `release`."""
        static = self._static
        return {} if static is None else static.segments

    def shared(self, item: NativeItem) -> dict[int, int]:
        """The buffers of an item's plan that others read or wrote, as numbers of the program's."""
        pairs = enumerate(zip(item.numbers, item.plan.buffers, strict=True))
        return {i: number for i, (number, b) in pairs if number in self.kept or b.kind == "input"}

    @property
    def packed_bytes(self) -> int:
        """Of the weights, which the programs of a session share."""
        return self._packs.bytes + (0 if self.hopper is None else self.hopper.bytes)

    def ran_by(self, step: Step) -> tuple[str, str]:
        """The backend of a step, and why it is not another where that was asked."""
        mine = (plan for plan in self.native.values() if any(step is one for one in plan.plan.steps))
        return next(mine).ran_by(step)

    @property
    def held_bytes(self) -> int:
        """Memory that stays between calls: arena, inputs, outputs; 0 before the first and after `release`."""
        static = self._static
        return 0 if static is None else static.bytes

    @property
    def holds(self) -> bool:
        """Whether there is any."""
        return self._static is not None

    @functools.cached_property
    def needed_bytes(self) -> int:
        """What a call needs to hold, inputs counted as float32."""
        sizes = [n * c * h * w for item in self._items() for n, c, h, w in item.plan.inputs]
        return _Static.size(self) + 4 * sum(sizes) + sum(plan.workspace_bytes for plan in self.native.values())

    def release(self) -> bool:
        """Gives graphs and memory up, once the device is done with them; False while a call is running."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._done is not None:
                self._done.synchronize()
            self._static = None
            return True
        finally:
            self._lock.release()

    def run(self, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None = None) -> list[Any]:
        """The module's flattened outputs. With `seconds` every native task is timed alone, without its graph."""
        self._keeper.admit(self)
        with self._lock, _plain_mode(), self._on_device():
            if self._static is None:
                self._static = _Static(self)
            if self.device.type == "cuda":
                self._follow()
            try:
                return _Run(self, self._static, inputs, seconds).run()
            finally:  # what was launched before an error still runs
                if self.device.type == "cuda":
                    self._mark()

    def _follow(self) -> None:
        """Comes behind the call before; on the same stream it does so anyway."""
        stream, self._stream = self._stream, torch.cuda.current_stream()
        if self._done is not None and stream != self._stream:
            self._stream.wait_event(self._done)

    def _mark(self) -> None:
        """The next call starts behind this one, and memory is given back no earlier than it ends."""
        if self._done is None:
            self._done = torch.cuda.Event()
            weakref.finalize(self, self._done.synchronize).atexit = False
        self._done.record(self._stream)

    def _items(self) -> list[NativeItem]:
        return [item for item in self.program.items if isinstance(item, NativeItem)]

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        elsewhere = self.device.type == "cuda" and self.device.index not in (None, torch.cuda.current_device())
        return torch.cuda.device(self.device) if elsewhere else contextlib.nullcontext()


def _plain_mode() -> contextlib.AbstractContextManager[Any]:
    """Neither gradients nor inference mode, in which static memory could be made that nothing outside may write. Each
    mode costs microseconds to enter, so none is that is on already.
    """
    if torch.is_inference_mode_enabled():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        return stack
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


class _Static:
    """The memory that graphs point at, and these graphs, each made when its inputs first come.

    `arena` serves one plan after the other; `kept` holds, by number, the buffers that outlive their plan.
    """

    def __init__(self, compiled: GpuCompiled) -> None:
        self.compiled = weakref.proxy(compiled)  # no cycle: memory goes when the program goes
        self.block = torch.empty(self.size(compiled), dtype=torch.uint8, device=compiled.device)
        self._at = -self.block.data_ptr() % ALIGNMENT
        self.outputs = [self._take(b) for b in compiled.buffers]
        self.kept = {number: self._take(compiled.program.buffers[number]) for number in compiled.kept}
        self.arena = self.block[self._at :]
        self.segments: dict[int, Segment] = {}

    @staticmethod
    def size(compiled: GpuCompiled) -> int:
        """Bytes of outputs, kept buffers and arena, each aligned."""
        buffers = [*compiled.buffers, *(compiled.program.buffers[number] for number in compiled.kept)]
        arena = max((plan.arena_bytes for plan in compiled.native.values()), default=0)
        return sum(_aligned(b.bytes) for b in buffers) + arena + ALIGNMENT

    @property
    def bytes(self) -> int:
        """Of a moment: another thread's call may be making segments."""
        return self.block.numel() + sum(segment.bytes for segment in list(self.segments.values()))

    def _take(self, b: Buffer) -> Tensor:
        part = self.block[self._at : self._at + b.bytes]
        self._at += _aligned(b.bytes)
        return part.view(DTYPES[b.dtype]).view(b.n, b.h, b.w, b.c)

    def segment(self, index: int, item: NativeItem, plan: GpuPlan, given: Sequence[Tensor]) -> Segment:
        if index not in self.segments:
            kept = {i: self.whole(number) for i, number in self.compiled.shared(item).items()}
            self.segments[index] = Segment(item, plan, given, self.outputs, self.arena, kept)
        return self.segments[index]

    def whole(self, number: int) -> Tensor:
        """A buffer of the program that outlives its plan, [n, h, w, c]."""
        buffer = self.compiled.program.buffers[number]
        return self.outputs[buffer.position] if buffer.kind == "output" else self.kept[number]


class _Run:
    """One call: `values` are what lives outside of the static memory."""

    def __init__(
        self, compiled: GpuCompiled, static: _Static, inputs: Sequence[Any], seconds: list[tuple[str, float]] | None
    ) -> None:
        self.compiled, self.program, self.static, self.seconds = compiled, compiled.program, static, seconds
        self.inputs = inputs
        self.values: dict[ir.Node, Any] = {node: inputs[i] for node, i in compiled.inputs}

    def run(self) -> list[Any]:
        for i, item in enumerate(self.program.items):
            if isinstance(item, TorchItem):
                self._torch(i, item)
            else:
                self._native(i, item)
            for node in self.compiled.dead[i]:
                del self.values[node]
        bases = [base.clone() for base in self.static.outputs]
        return [self._output(o, bases) for o in self.program.outputs]

    def _native(self, index: int, item: NativeItem) -> None:
        pairs = zip(item.sources, item.plan.inputs, strict=True)
        given = [self._map(source, shape) for source, shape in pairs if not isinstance(source, int)]
        self.static.segment(index, item, self.compiled.native[index], given).run(given, self.seconds)

    def _map(self, source: ir.Node, shape: tuple[int, int, int, int]) -> Tensor:
        x: Tensor = self.values[source].detach().resolve_neg()
        return x if x.dim() == 4 else x.reshape(shape)

    def _torch(self, index: int, item: TorchItem) -> None:
        taps = self.program.taps
        inputs = [self._tensor(taps[i]) if i in taps else self.values[i] for i in item.node.inputs]
        result = interpret.evaluate(self.compiled.ops[index], inputs)
        self.values[item.node] = pytree.tree_map_only(Tensor, self._own, result)

    def _tensor(self, tap: Tap) -> Tensor:
        """A native value as torch sees it: float32, of its logical shape."""
        return _shaped(self.static.whole(tap.view.buffer), tap).float()

    def _own(self, value: Tensor) -> Tensor:
        """The value in memory that later steps and calls do not overwrite."""
        inside = value.untyped_storage().data_ptr() == self.static.block.untyped_storage().data_ptr()
        return value.clone() if inside else value

    def _output(self, output: Any, bases: Sequence[Tensor]) -> Any:
        if isinstance(output, Tap):
            return _shaped(bases[self.program.buffers[output.view.buffer].position], output)
        if not isinstance(output, ir.Node):
            return output
        return own_result(output, self.values[output], self.compiled.held | storages(self.inputs))


def on_device(op: ir.Op, device: torch.device) -> ir.Op:
    """The operation with its parameters, and with the devices that it names, on `device`."""
    if device.type == "cpu":
        return op

    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else device

    return ir.with_leaves(op, (Tensor, torch.device), moved)


def _kept(program: Program) -> list[int]:
    """The buffers that torch or a later plan reads, but for outputs, which stay anyway."""
    items = [item for item in program.items if isinstance(item, NativeItem)]
    read = {source for item in items for source in item.sources if isinstance(source, int)}
    read |= {tap.view.buffer for tap in program.taps.values()}
    return sorted(number for number in read if program.buffers[number].kind != "output")


def _shaped(whole: Tensor, tap: Tap) -> Tensor:
    """[n, h, w, c] as the tap's [n, c, h, w] or what that is a reshape of."""
    y = whole[..., tap.view.offset : tap.view.offset + tap.view.channels].permute(0, 3, 1, 2)
    return y if len(tap.shape) == 4 else y.reshape(tap.shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
