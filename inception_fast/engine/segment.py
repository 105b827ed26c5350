"""One native call's plan out of the whole program's buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from ..kernels.plan import Buffer, ImportStep, Plan, Step, View
from . import graph as ir
from .native import Map


@dataclass(frozen=True)
class NativeItem:
    """One native call.

    `sources` are what it is handed: values made outside, and the indices of program buffers that earlier calls wrote.
    `outputs` are the program's outputs that it writes, in its own order; `nodes` the nodes of its steps; `numbers` the
    program's buffers that those of the plan are.
    """

    plan: Plan
    sources: tuple[ir.Node | int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[ir.Node | None, ...]
    numbers: tuple[int, ...]


def segment(
    steps: Sequence[tuple[Step, ir.Node | None]],
    buffers: Sequence[Buffer],
    imports: Sequence[tuple[ir.Node, Map]],
    arena_bytes: int,
) -> NativeItem:
    """The call that runs `steps`. Buffers it only reads become inputs; `imports` are what the steps' sources count."""
    written = {v.buffer for step, _ in steps for v in writes(step)}
    used = dict.fromkeys(v.buffer for step, _ in steps for v in views(step))
    local: list[Buffer] = []
    index: dict[int, int] = {}
    sources: list[ir.Node | int] = []
    shapes: list[tuple[int, int, int, int]] = []
    outputs: list[int] = []
    for number in used:
        buffer = buffers[number]
        index[number] = len(local)
        if number not in written:
            local.append(replace(buffer, kind="input", position=len(sources)))
            sources.append(number)
            shapes.append((buffer.n, buffer.c, buffer.h, buffer.w))
        elif buffer.kind == "output":
            local.append(replace(buffer, position=len(outputs)))
            outputs.append(buffer.position)
        else:
            local.append(buffer)
    moved: list[Step] = []
    for step, _ in steps:
        step = _renumber(step, index)
        if isinstance(step, ImportStep):
            source, (n, h, w, c) = imports[step.source]
            step = replace(step, source=len(sources))
            sources.append(source)
            shapes.append((n, c, h, w))
        moved.append(step)
    plan = Plan(tuple(local), tuple(moved), tuple(shapes), arena_bytes)
    return NativeItem(plan, tuple(sources), tuple(outputs), tuple(node for _, node in steps), tuple(used))


def views(step: Any) -> Iterator[View]:
    """Every view in a step, parts of pairs too."""
    if isinstance(step, View):
        yield step
    elif isinstance(step, tuple):
        for item in step:
            yield from views(item)
    elif is_dataclass(step):
        for f in fields(step):
            yield from views(getattr(step, f.name))


def writes(step: Any) -> list[View]:
    """The views that a step writes."""
    if hasattr(step, "first"):
        return writes(step.first) + writes(step.second)
    return [o.view for o in step.outputs] if hasattr(step, "outputs") else [step.y]


def _renumber(value: Any, index: dict[int, int]) -> Any:
    if isinstance(value, View):
        return replace(value, buffer=index[value.buffer])
    if isinstance(value, tuple):
        return tuple(_renumber(v, index) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _renumber(getattr(value, f.name), index) for f in fields(value) if f.init}
        return type(value)(**changed)
    return value
