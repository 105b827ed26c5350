"""From images to features in one process: workers decode while the network runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .extractors import Extractor
from .feed import Failure, feed
from .sources import Source


@dataclass
class Clock:
    """Where the time of a run went: `waiting` for decoded images, `computing` features."""

    images: int = 0
    waiting: float = 0.0
    computing: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def summary(self) -> dict[str, float | int]:
        seconds = time.perf_counter() - self.started
        return {
            "seconds": round(seconds, 3),
            "waiting_seconds": round(self.waiting, 3),
            "computing_seconds": round(self.computing, 3),
            "images_per_second": round(self.images / seconds, 2) if seconds else 0.0,
        }


@dataclass(frozen=True)
class Features:
    """`values` [n, d] float32 of the images `rows`; `bad` are (index, reason) of those that could not be read."""

    values: NDArray[np.float32]
    rows: list[int]
    bad: list[tuple[int, str]]

    @property
    def count(self) -> int:
        return len(self.rows) + len(self.bad)


def stream(
    source: Source,
    extractor: Extractor,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    workers: int = 0,
    threads: int = 0,
    unreadable: str = "skip",
    clock: Clock | None = None,
) -> Iterator[Features]:
    """Features of the images of `indices` (all by default), a batch at a time, in order.

    `workers` processes decode, or else `threads` threads.

    Args:
        unreadable: "skip" hands the reasons on, "fail" raises Failure at the first.
    """
    if unreadable not in ("skip", "fail"):
        raise ValueError(f"unreadable {unreadable!r}; allowed: 'skip', 'fail'")
    clock = clock or Clock()
    wanted = range(len(source.names)) if indices is None else indices
    before = time.perf_counter()
    for prepared in feed(source, extractor.prepare, wanted, batch_size=batch_size, workers=workers, threads=threads):
        ready = time.perf_counter()
        if prepared.bad and unreadable == "fail":
            raise Failure(prepared.bad[0][1])
        values = np.zeros((0, extractor.width), np.float32)
        if prepared.rows:
            values = extractor.run(prepared.x).numpy()
        done = time.perf_counter()
        clock.waiting += ready - before
        clock.computing += done - ready
        clock.images += prepared.count
        yield Features(values, prepared.rows, prepared.bad)
        before = time.perf_counter()
