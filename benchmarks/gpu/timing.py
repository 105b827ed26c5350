"""Times on a GPU, had alone: rounds in shuffled order, medians and quartiles."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from turns import alone

Call = Callable[[], Any]
BACKLOG_CYCLES = 4_000_000  # about 2 ms of a busy device, in which the host gets ahead of it: eager launches take 0.9
FLUSH_BYTES = 256 << 20


def device_seconds(
    calls: Mapping[str, Call], rounds: int = 25, seed: int = 0, backlog: int = BACKLOG_CYCLES
) -> dict[str, list[float]]:
    """Seconds on the device, caches flushed before each call. A backlog of cycles keeps launches out of the figure."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return _rounds(calls, rounds, seed, lambda call: _by_events(call, flush, backlog))


def host_seconds(calls: Mapping[str, Call], rounds: int = 15, seed: int = 0) -> dict[str, list[float]]:
    """Seconds from call to result, launches included: what a caller waits for."""
    return _rounds(calls, rounds, seed, _by_clock)


def _rounds(
    calls: Mapping[str, Call], rounds: int, seed: int, measure: Callable[[Call], float]
) -> dict[str, list[float]]:
    order, shuffled = list(calls), random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in calls}
    with alone():
        for call in calls.values():
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                found[name].append(measure(calls[name]))
    return found


def _by_events(call: Call, flush: torch.Tensor, backlog: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda._sleep(backlog)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _by_clock(call: Call) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and interquartile range in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": statistics.median(seconds) * 1e3, "iqr_ms": (high - low) * 1e3, "rounds": len(seconds)}
