"""The profile on a GPU: every task timed alone, in order, by events of the device; its peak; and the command lines for
Nsight's tools, which look at one call between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.runner import OptimizedModule
from .profiler import Profile, Work, layers_of, work_of
from .roofline import Peak
from .timer import summarise

SIDE = 8192  # of the square matrices multiplied
COPIED = 1 << 30  # bytes copied, beyond every cache
SECONDS = 0.5  # given to each of the two


def profile(fast: OptimizedModule, x: Tensor, peak: Peak, rounds: int = 20) -> Profile:
    """Medians over `rounds` timed calls after two untimed ones.

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
    work = [task_work(plan, task) for plan, task in tasks]
    reasons = tuple(step.reason for step in report.fallbacks)
    return Profile(layers_of(work, runs, peak), 1e3 * summarise(calls).median, rounds, reasons)


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
    return whole._replace(
        name=task.name, flops=sum(part.flops for part in parts), bytes=sum(part.bytes for part in parts)
    )


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
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        a, b = (torch.randn(SIDE, SIDE, device=device).to(kind) for _ in range(2))
        product = 2 * SIDE**3 / _fastest(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
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
