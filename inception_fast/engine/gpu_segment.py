"""One native plan of a GPU program: its static inputs, its launches, its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.maps import Launched
from .gpu_plan import GpuPlan, Task
from .segment import NativeItem


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
        self.inputs = [torch.empty_like(x, device=plan.device) for x in given]
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
        """Runs once, which compiles every kernel, then records the branches as one graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._in_order()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile; only this one must not.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            _branches(self.plan.tasks, self.launches, stream)
        self.graph = graph

    def _timed(self) -> list[tuple[str, float]]:
        if self.plan.device.type != "cuda":
            raise RuntimeError("step times need a GPU; interpreted kernels have none worth keeping")
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.launches) + 1)]
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


def _by_source(item: NativeItem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs at the positions that import steps know; sources in kept memory have none, and are not imported."""
    left = iter(inputs)
    return [torch.empty(0) if isinstance(source, int) else next(left) for source in item.sources]


def _branches(tasks: Sequence[Task], launches: Sequence[Sequence[Launched]], main: torch.cuda.Stream) -> None:
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
