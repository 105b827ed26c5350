"""A profile as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: a bar a step, a lane a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .profiler import Layer


def trace(layers: Sequence[Layer], title: str, needs: Sequence[Sequence[int]] = (), lanes: Sequence[int] = ()) -> Any:
    """Trace events of the layers, one after another; with `needs` (of each layer, the positions of those before it) and
    `lanes`, as they would overlap: a layer begins when those are done, and the last one of its lane.
    """
    lanes = lanes or [0] * len(layers)
    needs = needs or [range(i) for i in range(len(layers))]
    ends: list[float] = []
    free: dict[int, float] = {}
    events: list[dict[str, Any]] = [_named("process_name", 0, title)]
    events += [_named("thread_name", lane, f"stream {lane}") for lane in sorted(set(lanes))]
    for layer, before, lane in zip(layers, needs, lanes, strict=True):
        begin = max([free.get(lane, 0.0), *(ends[i] for i in before)])
        ends.append(begin + 1e3 * layer.ms)
        free[lane] = ends[-1]
        more = {key: value for key, value in layer.as_json().items() if key not in ("layer", "kind")}
        place = {"ph": "X", "ts": begin, "dur": 1e3 * layer.ms, "pid": 1, "tid": lane}
        events.append({"name": layer.layer, "cat": layer.kind, **place, "args": more})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
