"""The profile on a GPU: every task timed alone, in order, by events of the device, a walk's time shared out to its
steps; its peak; and the command lines for Nsight's tools, which look at one call between cudaProfilerStart and -Stop.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine.runner import OptimizedModule
from .profiler import Layer, Profile, Work, layer_of, layers_of, work_of
from .roofline import Peak
from .timer import summarise
from .walk_trace import NotTraced, Shares, Tracer, shares

SIDE = 8192  # of the square matrices multiplied
COPIED = 1 << 30  # bytes copied, beyond every cache
SECONDS = 0.5  # given to each of the two
TRACES = 10  # runs that leave marks, at most


def profile(fast: OptimizedModule, x: Tensor, peak: Peak, rounds: int = 20) -> Profile:
    """Medians over `rounds` timed calls after two untimed ones. A walk's time is shared out to its steps as in up to
    `TRACES` calls more that leave marks; where that cannot be, its row's note says why.

    Raises ValueError for fewer than one round and for a module that runs no GPU plan.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds}; allowed: 1 or more")
    tasks = tasks_of(fast, x)
    report = fast.report(x)
    calls, runs = [], []
    with torch.inference_mode():
        for _ in range(2):
            fast(x)
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            fast(x)
            torch.cuda.synchronize()
            calls.append(time.perf_counter() - start)
            runs.append([seconds for _, seconds in fast.time_steps(x)])
        traced = traced_walks(fast, x, min(rounds, TRACES))
    rows = layers_of([task_work(plan, task) for plan, task in tasks], runs, peak)
    layers: list[Layer] = []
    walks: list[Layer] = []
    for position, (row, (plan, task)) in enumerate(zip(rows, tasks, strict=True)):
        found = traced.get(position, "")
        if isinstance(found, str):
            layers.append(replace(row, note=found))
        else:
            walks.append(row)
            layers += steps_of_walk(row, [work_of(step, plan.plan.buffers) for step in task.steps], found, peak)
    reasons = tuple(step.reason for step in report.fallbacks)
    return Profile(tuple(layers), 1e3 * summarise(calls).median, rounds, reasons, tuple(walks))


def traced_walks(fast: OptimizedModule, x: Tensor, count: int) -> dict[int, list[Shares] | str]:
    """Of each walk, by its task's position, so many runs inside whole calls, or why it has none."""
    tracers: dict[int, Tracer] = {}
    found: dict[int, list[Shares] | str] = {}
    with contextlib.ExitStack() as inside:
        for position, launches in _walk_launches(fast, x).items():
            try:
                tracers[position] = inside.enter_context(_leaving_marks(launches))
            except NotTraced as error:
                found[position] = str(error)
        for i in range(count + 1 if tracers else 0):
            for tracer in tracers.values():
                tracer.clear()
            fast.time_steps(x)
            for position, tracer in tracers.items() if i else ():  # the first one warms the marks' memory
                runs = found.setdefault(position, [])
                if isinstance(runs, str):
                    continue
                try:
                    runs.append(shares(tracer.units(), tracer.jobs))
                except NotTraced as error:
                    found[position] = str(error)
    return found


def _walk_launches(fast: OptimizedModule, x: Tensor) -> dict[int, list[Any]]:
    """The launches of each walk's task, by its position; none where no call came to it, or its memory was given up."""
    executable: Any = fast._session.executable(fast._session.signature.leaves((x,), {}))[0]
    made = executable.segments
    each = [(task, made[i].launches[j] if i in made else [])
            for i, plan in executable.native.items() for j, task in enumerate(plan.tasks)]  # fmt: skip
    return {position: launches for position, (task, launches) in enumerate(each) if task.walk is not None}


@contextlib.contextmanager
def _leaving_marks(launches: list[Any]) -> Iterator[Tracer]:
    """Inside, a walk's one launch is another that leaves marks, but not in the graph, which has its own."""
    if not launches:
        raise NotTraced("the network's memory was given up to others meanwhile")
    (own,) = launches
    tracer = Tracer(own)
    launches[:] = [tracer.launch]
    try:
        yield tracer
    finally:
        launches[:] = [own]


def steps_of_walk(walk: Layer, work: Sequence[Work], runs: Sequence[Shares], peak: Peak) -> list[Layer]:
    """The rows of a walk's steps in place of its own, by means over these runs, and two of what is left of its time:
    `waiting`, in which no unit ran, and `launch`, which is outside of the marks. Marks further apart than the time that
    was measured without them are brought together in proportion.
    """
    nanoseconds = 1e6 * walk.ms
    mean = sum(run.span for run in runs) / len(runs)
    scale = min(1.0, nanoseconds / mean) if mean else 1.0
    columns = [[scale * float(part) for part in column] for column in zip(*(run.jobs for run in runs), strict=True)]
    columns.append([scale * run.waiting for run in runs])
    columns.append([max(nanoseconds - scale * mean, 0.0)] * len(runs))
    rest = [Work(f"{walk.layer}: {kind}", kind, (), 0, 0) for kind in ("waiting", "launch")]
    total = walk.ms / 1e3 / walk.share if walk.share else math.inf
    found = []
    for step, column in zip([*work, *rest], columns, strict=True):
        row = layer_of(step, sum(column) / len(runs) / 1e9, summarise(column).iqr / 1e9, total, peak)
        found.append(replace(row, walk=walk.layer))
    for job in range(len(work)):
        begin, end = (sum(getattr(run, name)[job] for run in runs) / len(runs) for name in ("begins", "ends"))
        found[job] = replace(found[job], begin_ms=scale * begin / 1e6, end_ms=scale * end / 1e6)
    found[-1] = replace(found[-1], iqr_ms=walk.iqr_ms)
    return found


def tasks_of(fast: OptimizedModule, x: Tensor) -> list[tuple[Any, Any]]:
    """(plan, task) of every native task, in the order of its times. Raises ValueError where there is no GPU plan."""
    session = fast._session
    executable, _ = session.executable(session.signature.leaves((x,), {}))
    plans = getattr(executable, "native", {}).values()
    if fast.backend not in ("cuda", "triton"):
        raise ValueError(f"a module on backend {fast.backend!r}; allowed: the GPU's kernels")
    return [(plan, task) for plan in plans for task in plan.tasks]


def task_work(plan: Any, task: Any) -> Work:
    """What a task has to do: that of all steps that it computes. A walk's shape is what its last step writes."""
    parts = [work_of(step, plan.plan.buffers) for step in task.steps]
    whole = parts[0] if task.walk is None else parts[-1]._replace(kind="walk")
    unmoved = 0 if task.hopper is None else task.hopper.unmoved_bytes
    moved = sum(part.bytes for part in parts) - unmoved
    return whole._replace(name=task.name, flops=sum(part.flops for part in parts), bytes=moved)


def schedule(tasks: Sequence[tuple[Any, Any]]) -> tuple[list[list[int]], list[int]]:
    """What each task waits for, and its stream; a plan waits for the whole one before it."""
    needs: list[list[int]] = []
    start, current = 0, None
    for position, (plan, task) in enumerate(tasks):
        if plan is not current:
            start, current = position, plan
        needs.append([start + i for i in task.needs] or [*range(start)])
    return needs, [task.stream for _, task in tasks]


def once(fast: OptimizedModule, x: Tensor) -> None:
    """One call, task by task under NVTX ranges, for a profiler that waits for cudaProfilerStart; two before it."""
    with torch.inference_mode():
        for _ in range(2):
            fast(x)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        fast.time_steps(x)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def commands(arguments: Sequence[str], dearest: str) -> dict[str, str]:
    """Command lines that look deeper: Nsight Systems at the whole call, Nsight Compute at the dearest layer."""
    ours = ["inception-fast", *(a for a in arguments if a not in ("--json", "--once")), "--once"]
    systems = ["nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--output=profile"]
    compute = ["ncu", "--profile-from-start", "off", "--set", "full", "--export", "profile"]
    only = ["--nvtx", "--nvtx-include", f"{dearest}/"]
    return {"nsys": shlex.join([*systems, *ours]), "ncu": shlex.join([*compute, *only, *ours])}


def measure_gpu_peak(dtype: str, device: torch.device, tf32: bool = False) -> Peak:
    """A large product of torch on random numbers, and the bytes that a copy within the device reads and writes."""
    kind = getattr(torch, dtype)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
    try:
        a, b = (torch.randn(SIDE, SIDE, device=device).to(kind) for _ in range(2))
        product = 2 * SIDE**3 / _fastest(lambda: a @ b)
    finally:
        matmul.fp32_precision = before  # type: ignore[attr-defined]
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * COPIED / _fastest(lambda: target.copy_(source))
    return Peak(product, moved, f"a {SIDE}x{SIDE} matrix product of torch", dtype, 0)


def _fastest(call: Callable[[], object]) -> float:
    """The shortest of the calls that fit, three at least, on the device."""
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < SECONDS:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        best, count = min(best, first.elapsed_time(last) / 1e3), count + 1
    return best
