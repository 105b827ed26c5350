"""Contestants against each other on the engine: outputs first, then turns in one interleaved run on cold caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import optimize, passes
from ..engine.runner import OptimizedModule
from ..measure.compare import BUDGET, relative_error, truth
from ..measure.timer import Flush, Plan, Summary, contrasts, interleave, summarise

_ablating = Lock()


class RedGate(Exception):
    """A contestant's output is wrong, so its time means nothing."""


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Modules optimised inside the block miss these passes of the engine. One thread at a time."""
    known = {p.__name__ for p in passes.PIPELINE}
    if not known.issuperset(names):
        raise ValueError(f"passes {', '.join(names)}; allowed: {', '.join(sorted(known))}")
    with _ablating:
        whole = passes.PIPELINE
        passes.PIPELINE = tuple(p for p in whole if p.__name__ not in names)
        try:
            yield
        finally:
            passes.PIPELINE = whole


@dataclass(frozen=True)
class Contestant:
    """A module and the passes of the engine that it runs without."""

    module: nn.Module
    missing: tuple[str, ...] = ()

    def ready(self, x: Tensor) -> OptimizedModule:
        """The optimised module, its output proved against float64; raises RedGate where it is off."""
        with without(*self.missing):
            fast = optimize(self.module, x)
        error = relative_error(fast(x), truth(self.module, [x])[0])
        if not error <= BUDGET["float32"]:
            raise RedGate(f"the output is off by {error:.1e}, more than {BUDGET['float32']:.0e}: not timed")
        return fast


@dataclass(frozen=True)
class Race:
    """Samples in seconds, by name, round by round."""

    samples: dict[str, list[float]] = field(repr=False)

    def summary(self, name: str) -> Summary:
        return summarise(self.samples[name])

    def saving(self, name: str, base: str) -> float:
        """The share of `base`'s time that `name` saves, in per cent; negative where it is the slower."""
        return 100 * (1 - self.summary(name).median / self.summary(base).median)

    def established(self, name: str, base: str) -> bool:
        """Whether the order of the two is beyond chance and beyond what equal code shows in this run."""
        return contrasts({base: self.samples[base], name: self.samples[name]}, base)[name].established

    def times(self) -> dict[str, Any]:
        """Median and distance of the quartiles in milliseconds, by name."""
        summaries = {name: self.summary(name) for name in self.samples}
        return {
            name: {"median_ms": 1e3 * s.median, "iqr_ms": 1e3 * s.iqr, "rounds": s.count}
            for name, s in summaries.items()
        }


def race(contestants: Mapping[str, Contestant], x: Tensor, plan: Plan, flush: Flush) -> Race:
    """Runs all of them on one input; raises RedGate, before anything is timed, where one of them is wrong."""
    with torch.inference_mode():
        ready = {name: one.ready(x) for name, one in contestants.items()}
        return Race(interleave({name: _call(fast, x) for name, fast in ready.items()}, plan, before=flush))


def _call(fast: OptimizedModule, x: Tensor) -> Any:
    return lambda: fast(x)
