"""Where an optimised network spends its time: every native step beside its work, its traffic and the machine's peak."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.program import Compiled
from ..engine.report import flops_of, shape_of
from ..engine.runner import OptimizedModule
from ..engine.segment import NativeItem
from ..engine.slices import Sliced
from ..kernels.plan import ConvStep, PairStep, PoolStep, Step
from ..kernels.spec import ITEM_BYTES, PairSpec
from .roofline import Peak
from .timer import summarise


@dataclass(frozen=True)
class Layer:
    """One step. `share` is of the time of all steps, `peak_share` of the machine's FLOP a second, `roof_share` how near
    the time is to the fewest seconds that work and traffic allow.

    `bytes` is compulsory traffic: every operand moved once. A step of a walk has its name in `walk`, as `ms` its share
    of the time that passed, and when its first unit began and its last one ended, from the walk's first mark.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    ms: float
    iqr_ms: float
    share: float
    flops: int
    bytes: int
    gflops: float
    gbytes: float
    peak_share: float
    roof_share: float
    walk: str = ""
    begin_ms: float | None = None
    end_ms: float | None = None
    note: str = ""  # why a walk is not shown by its steps

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Profile:
    """All steps in their order. `call_ms` is the whole call, so `call_ms - steps_ms` is spent around the steps.

    `walks` are the rows of whole walks of which `layers` has the steps, whose times are the walk's together.
    """

    layers: tuple[Layer, ...]
    call_ms: float
    rounds: int
    fallbacks: tuple[str, ...]
    walks: tuple[Layer, ...] = ()

    @property
    def steps_ms(self) -> float:
        return sum(layer.ms for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Milliseconds, share and FLOP of each kind of step, the dearest first."""
        found: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            kind = found.setdefault(layer.kind, {"steps": 0, "ms": 0.0, "share": 0.0, "flops": 0})
            kind["steps"] += 1
            kind["ms"] += layer.ms
            kind["share"] += layer.share
            kind["flops"] += layer.flops
        return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


def profile(fast: OptimizedModule, x: Tensor, peak: Peak, rounds: int = 20) -> Profile:
    """Medians over `rounds` timed calls after two untimed ones.

    Raises ValueError for fewer than one round and for a module that is not on the native CPU kernels.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds}; allowed: 1 or more")
    session = fast._session
    executable, _ = session.executable(session.signature.leaves((x,), {}))
    if not isinstance(executable, (Compiled, Sliced)):
        raise ValueError(f"a module on backend {fast.backend!r}; allowed: the native CPU kernels")
    report = fast.report(x)
    with torch.inference_mode():
        for _ in range(2):
            fast(x)
        runs, calls = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            fast(x)
            calls.append(time.perf_counter() - start)
            runs.append([seconds for _, seconds in fast.time_steps(x)])
    items = [item for item in executable.program.items if isinstance(item, NativeItem)]
    work = [work_of(step, item.plan.buffers) for item in items for step in item.plan.steps]
    return Profile(
        layers_of(work, runs, peak),
        1e3 * summarise(calls).median,
        rounds,
        tuple(step.reason for step in report.fallbacks),
    )


def against(found: Profile, peak: Peak) -> Profile:
    """The same times beside another peak."""

    def shares(layer: Layer) -> Layer:
        least = max(layer.ms / 1e3, 1e-9)
        roof = peak.roof(layer.flops, layer.bytes) / least
        return replace(layer, peak_share=layer.flops / least / peak.flops, roof_share=roof)

    return replace(found, layers=tuple(map(shares, found.layers)))


class Work(NamedTuple):
    """What one step has to do: its output is [n, c, h, w], its traffic every operand moved once."""

    name: str
    kind: str
    shape: tuple[int, ...]
    flops: int
    bytes: int


def work_of(step: Step, buffers: Sequence[Any]) -> Work:
    shape = shape_of(step, buffers)
    kind = type(step).__name__.removesuffix("Step").lower()
    return Work(step.name, kind, shape, flops_of(step, shape), _bytes(step, buffers))


def layers_of(work: Sequence[Work], runs: Sequence[Sequence[float]], peak: Peak) -> tuple[Layer, ...]:
    """A row for each step, from the seconds that every run measured of each."""
    times = [summarise(column) for column in zip(*runs, strict=True)]
    total = sum(t.median for t in times) or math.inf
    return tuple(layer_of(step, t.median, t.iqr, total, peak) for step, t in zip(work, times, strict=True))


def layer_of(step: Work, seconds: float, iqr: float, total: float, peak: Peak) -> Layer:
    """A row of these seconds, of `total` that all steps take."""
    least = max(seconds, 1e-9)  # the clock's tick
    speed = step.flops / least
    return Layer(
        step.name, step.kind, step.shape, 1e3 * seconds, 1e3 * iqr, seconds / total, step.flops, step.bytes,
        speed / 1e9, step.bytes / least / 1e9, speed / peak.flops, peak.roof(step.flops, step.bytes) / least,
    )  # fmt: skip


def _bytes(step: Step, buffers: Sequence[Any]) -> int:
    if isinstance(step, PairStep):
        return PairSpec(step.first.spec, step.second.spec, step.kind).bytes()
    if isinstance(step, (ConvStep, PoolStep)):
        return step.spec.bytes()
    y = buffers[step.y.buffer]
    tensors = 3 if getattr(step, "residual", None) is not None else 2
    return tensors * ITEM_BYTES[y.dtype] * y.n * y.h * y.w * step.y.channels
