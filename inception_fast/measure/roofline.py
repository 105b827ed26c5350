"""What this machine can do at most, measured: the best of two kinds of products, and a long read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels import cpu
from .machine import caches

SIDE = 1536  # of the square matrices multiplied
READ = 1 << 28  # bytes read at least
CACHES = 4  # times the cache that a core sees: it may be one of several
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Peak:
    """FLOP a second and bytes a second, with the threads that torch is set to; `by` names what reached the first."""

    flops: float
    bytes: float
    by: str
    dtype: str
    threads: int

    def roof(self, flops: int, moved: int) -> float:
        """The fewest seconds that this work and this compulsory traffic can take."""
        return max(flops / self.flops, moved / self.bytes)

    def best(self, other: Peak) -> Peak:
        """What was reached in either of two measurements: a machine may change its pace."""
        faster = max(self, other, key=lambda peak: peak.flops)
        return replace(faster, bytes=max(self.bytes, other.bytes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_peak(dtype: str = "float32", seconds: float = 0.3) -> Peak:
    """The best of a matrix product of torch and products of ours on registers, and the fastest read of 256 MiB, or
    of more where caches are large.

    `seconds` is the time given to each. Raises ValueError for a dtype whose products are not measured.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    threads = torch.get_num_threads()
    with torch.inference_mode():
        a, b = (torch.randn(SIDE, SIDE).to(DTYPES[dtype]) for _ in range(2))
        product = 2 * SIDE**3 / _fastest(lambda: a @ b, seconds)
        memory = torch.zeros(_bytes_read() // 8, dtype=torch.int64)
        read = memory.nbytes / _fastest(lambda: memory.sum(), seconds)
    registers = cpu.peak_flops(dtype, threads, seconds=seconds)
    by = f"a {SIDE}x{SIDE} matrix product of torch" if product >= registers else "products on registers"
    return Peak(max(product, registers), read, by, dtype, threads)


def _bytes_read() -> int:
    """Beyond every cache."""
    return max(READ, CACHES * max(caches().values(), default=0))


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """A peak is what was reached once: the shortest of the calls that fit, three at least."""
    best, start, count = float("inf"), time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        count += 1
    return best
