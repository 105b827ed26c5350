"""A profile as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: a bar a step, a lane a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from .profiler import Layer


def trace(
    layers: Sequence[Layer], title: str, needs: Sequence[Sequence[int]] = (), lanes: Sequence[int] = (),
    walks: Sequence[Layer] = (),
) -> Any:  # fmt: skip
    """Trace events of the layers, one after another; with `needs` (of each layer, the positions of those before it) and
    `lanes`, as they would overlap: a layer begins when those are done, and the last one of its lane.

    `walks` are whole walks, each a layer in the place of its steps, which get lanes of their own under the streams.
    """
    tasks = list(_tasks(layers, walks))
    lanes = lanes or [0] * len(tasks)
    needs = needs or [range(i) for i in range(len(tasks))]
    ends: list[float] = []
    free: dict[int, float] = {}
    bars: list[dict[str, Any]] = []
    inside: list[tuple[float, Layer]] = []
    for (layer, steps), before, lane in zip(tasks, needs, lanes, strict=True):
        begin = max([free.get(lane, 0.0), *(ends[i] for i in before)])
        ends.append(begin + 1e3 * layer.ms)
        free[lane] = ends[-1]
        bars.append(_bar(layer, begin, 1e3 * layer.ms, lane))
        inside += [(begin + 1e3 * step.begin_ms, step) for step in steps if step.begin_ms is not None]
    first = 1 + max(lanes, default=0)
    bars += _beside(sorted(inside, key=lambda one: one[0]), first)
    events = [_named("process_name", 0, title)]
    for lane in sorted({bar["tid"] for bar in bars}):
        events.append(_named("thread_name", lane, f"stream {lane}" if lane < first else f"in walks {lane - first}"))
    return {"traceEvents": events + bars, "displayTimeUnit": "ms"}


def _tasks(layers: Sequence[Layer], walks: Sequence[Layer]) -> Iterator[tuple[Layer, list[Layer]]]:
    """The layers with walks whole, each with the steps that `layers` has of it."""
    whole = {walk.layer: walk for walk in walks}
    for name, rows in itertools.groupby(layers, key=lambda layer: layer.walk):
        if name:
            yield whole[name], list(rows)
        else:
            yield from ((layer, []) for layer in rows)


def _beside(steps: Sequence[tuple[float, Layer]], first: int) -> Iterator[dict[str, Any]]:
    """Bars of what overlaps, in the order of their beginnings, each in the first lane that is free."""
    free: list[float] = []
    for begin, step in steps:
        assert step.begin_ms is not None and step.end_ms is not None
        end = begin + 1e3 * (step.end_ms - step.begin_ms)
        lane = next((i for i, until in enumerate(free) if until <= begin), len(free))
        free[lane : lane + 1] = [end]
        yield _bar(step, begin, end - begin, first + lane)


def _bar(layer: Layer, begin: float, length: float, lane: int) -> dict[str, Any]:
    more = {key: value for key, value in layer.as_json().items() if key not in ("layer", "kind")}
    place = {"ph": "X", "ts": begin, "dur": length, "pid": 1, "tid": lane}
    return {"name": layer.layer, "cat": layer.kind, **place, "args": more}


def _named(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
