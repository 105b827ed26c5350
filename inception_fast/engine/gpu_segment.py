"""One native plan of a GPU program: its static inputs, its launches, its graph."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.maps import Launched
from ..kernels.plan import ImportStep, Plan
from .gpu_plan import DTYPES, GpuPlan, Task
from .segment import NativeItem

# A capture begins by waiting for the whole device, which is an error, for both, while another stream is being captured.
_CAPTURING = threading.Lock()
_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}
LAUNCH_CYCLES = 80_000  # some 40 us: more than the host takes for a task's launches and its mark


class Segment:
    """A plan on its memory. The first call brings the inputs' dtypes and layouts; later ones are copied into these."""

    def __init__(
        self,
        item: NativeItem,
        plan: GpuPlan,
        given: Sequence[Tensor],
        outputs: Sequence[Tensor],
        arena: Tensor,
        kept: Mapping[int, Tensor],
    ) -> None:
        self.plan, self.item = plan, item
        places = [i for i, source in enumerate(item.sources) if not isinstance(source, int)]
        kinds = [held_as(plan.plan, i, x.dtype) for i, x in zip(places, given, strict=True)]
        self.inputs = [torch.empty_like(x, dtype=k, device=plan.device) for x, k in zip(given, kinds, strict=True)]
        used = [outputs[o] for o in item.outputs]
        self.launches: list[list[Launched]] = plan.launches(_by_source(item, self.inputs), used, arena, kept)
        self.graph: torch.cuda.CUDAGraph | None = None
        if plan.device.type == "cuda":
            self._capture()

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.inputs) + self.plan.workspace_bytes

    def run(self, given: Sequence[Tensor], seconds: list[tuple[str, float]] | None) -> None:
        """On the current stream. With `seconds` every task is timed alone, under an NVTX range, without the graph."""
        for mine, x in zip(self.inputs, given, strict=True):
            mine.copy_(x, non_blocking=True)
        if seconds is not None:
            seconds += self._timed()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self._in_order()

    def _in_order(self) -> None:
        for launches in self.launches:
            for one in launches:
                one.run()

    def _capture(self) -> None:
        """Runs once, which compiles every kernel, then records the branches as one graph. Where that fails, or is
        interrupted, the caller's stream is the current one again: torch leaves the graph's where a capture cannot end.
        """
        self._in_order()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.plan.device)
        with _CAPTURING, _no_collection(), torch.cuda.stream(here):
            streams = _streams(self.plan.device, 1 + max(task.stream for task in self.plan.tasks))
            # Other threads may allocate meanwhile; only this one must not.
            with torch.cuda.graph(graph, stream=streams[0], capture_error_mode="thread_local"):
                _branches(self.plan.tasks, self.launches, streams)
        self.graph = graph

    def _timed(self) -> list[tuple[str, float]]:
        if self.plan.device.type != "cuda":
            raise RuntimeError("step times need a GPU; interpreted kernels have none worth keeping")
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.launches) + 1)]
        torch.cuda._sleep(LAUNCH_CYCLES * len(self.launches))  # type: ignore[no-untyped-call]  # the host gets ahead
        marks[0].record()
        names = [task.name for task in self.plan.tasks]
        for name, launches, mark in zip(names, self.launches, marks[1:], strict=True):
            torch.cuda.nvtx.range_push(name)
            for one in launches:
                one.run()
            torch.cuda.nvtx.range_pop()
            mark.record()
        marks[-1].synchronize()
        return [(n, a.elapsed_time(b) / 1e3) for n, a, b in zip(names, marks, marks[1:], strict=False)]


def held_as(plan: Plan, source: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an input of `dtype` waits for the graph: that of the map it becomes, where it would only be
    rounded to it. The copy that every call makes of it rounds as well, and there are fewer bytes to write and to read.
    """
    entries = [step for step in plan.steps if isinstance(step, ImportStep) and step.source == source]
    plain = all(step.scale is None and step.shift is None for step in entries)
    maps = {plan.buffers[step.y.buffer].dtype for step in entries}
    return DTYPES[maps.pop()] if dtype is torch.float32 and plain and len(maps) == 1 else dtype


def _by_source(item: NativeItem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs at the positions that import steps know; sources in kept memory have none, and are not imported."""
    left = iter(inputs)
    return [torch.empty(0) if isinstance(source, int) else next(left) for source in item.sources]


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Those that every capture on the device goes through, one after the other. torch deals all streams out of a few,
    the callers' too, so that new ones for each capture would soon be a caller's own.
    """
    kept = _STREAMS.setdefault(device, [])
    kept += [torch.cuda.Stream(device) for _ in range(count - len(kept))]
    return kept[:count]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may own events and graphs, which must not be given back in the middle of a capture."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _branches(
    tasks: Sequence[Task], launches: Sequence[Sequence[Launched]], streams: Sequence[torch.cuda.Stream]
) -> None:
    """Puts every task on its stream; streams fork from the first, which is captured, and join it at the end, behind an
    error too: a capture with others still in it cannot end, which would hide the error and upset torch's allocator.
    """
    main, forked = streams[0], list[torch.cuda.Stream]()
    fork = torch.cuda.Event()
    fork.record(main)
    try:
        for stream in streams[1:]:
            stream.wait_event(fork)
            forked.append(stream)
        _put(tasks, launches, streams)
    finally:
        for stream in forked:
            main.wait_stream(stream)


def _put(tasks: Sequence[Task], launches: Sequence[Sequence[Launched]], streams: Sequence[torch.cuda.Stream]) -> None:
    """Each task on its stream, behind those of others that it waits for."""
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
