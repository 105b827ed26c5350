"""What became of every captured node: the step it was fused into, or why there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels.plan import ConvStep, PairStep, PoolStep, Step
from . import graph as ir
from .plan import Program, TorchItem
from .program import Compiled, Interpreted, Planned, convolutions, convolutions_of
from .slices import Sliced

if TYPE_CHECKING:
    from .session import Captured

_VIEWS = {
    ir.Concat: "concatenation in place: its operands are written into one buffer",
    ir.Slice: "a range of channels, read in place",
    ir.Reshape: "the same memory under another shape",
    ir.Constant: "computed from parameters alone, once",
    ir.Cast: "done while the input is read",
}


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """One captured call. `steps` are those that compute it; with none, `reason` says why none is needed."""

    name: str
    op: str
    path: str
    shape: tuple[int, ...] | None
    steps: tuple[str, ...]
    backend: str
    reason: str


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step of the plan, or one call of torch. `nodes` are the captured calls it computes, in whole or in part.

    `winograd`, where that was asked for: the tile of each convolution, or why it is a direct sum.
    `note`: why a step of a GPU plan does not run on the CUDA kernels, or in a walk of them, where they were to be had.
    """

    name: str
    kind: str
    backend: str
    shape: tuple[int, ...] | None
    flops: int
    nodes: tuple[str, ...]
    reason: str
    winograd: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """Readable by print, as a table, and by programs through `to_dict`."""

    model: str
    backend: str
    inputs: tuple[tuple[int, ...], ...]
    counts: dict[str, int]
    passes: dict[str, int]
    nodes: tuple[NodeReport, ...]
    steps: tuple[StepReport, ...]

    @property
    def fallbacks(self) -> tuple[StepReport, ...]:
        """What runs through torch because no native step says the same, each with its reason."""
        return tuple(s for s in self.steps if s.reason)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self) | {"fallbacks": [dataclasses.asdict(f) for f in self.fallbacks]}

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, s)) for s in self.inputs)
        lines = [f"{self.model} on {self.backend}, input {shapes}"]
        lines += [f"  {name.replace('_', ' ')}: {value:,}" for name, value in self.counts.items()]
        fired = ", ".join(f"{name} {count}" for name, count in self.passes.items() if count)
        lines += [f"  passes that fired: {fired}", ""]
        lines += _table(
            ["step", "kind", "backend", "shape", "MFLOP", "nodes"],
            [
                [
                    s.name,
                    s.kind,
                    s.backend,
                    "x".join(map(str, s.shape or ())),
                    f"{s.flops / 1e6:.1f}",
                    str(len(s.nodes)),
                ]
                for s in self.steps
            ],
        )
        absent = [n for n in self.nodes if not n.steps]
        if absent:
            lines += ["", "captured nodes without a step:"]
            lines += _table(["node", "operator", "why"], [[n.name, n.op, n.reason] for n in absent])
        asked = [s for s in self.steps if s.winograd]
        if asked:
            lines += ["", "Winograd's algorithm:"]
            lines += _table(["step", "how"], [[s.name, s.winograd] for s in asked])
        notes = [[s.name, s.kind, s.note] for s in self.steps if s.note]
        if notes:
            lines += ["", "not on the CUDA kernels:"]
            lines += _table(["step", "kind", "why"], notes)
        if self.fallbacks:
            lines += ["", "through torch:"]
            lines += _table(["step", "kind", "why"], [[s.name, s.kind, s.reason] for s in self.fallbacks])
        return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    numbers = ("MFLOP", "nodes")
    return [
        "  "
        + "  ".join(
            c.rjust(w) if h in numbers else c.ljust(w) for c, w, h in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in [header, *rows]
    ]


def make_report(
    model: str, backend: str, executable: Interpreted | Planned, captured: Captured, leaves: Sequence[Any]
) -> Report:
    graph = captured.graph
    steps = (
        _torch_steps(graph, backend)
        if isinstance(executable, Interpreted)
        else _native_steps(executable.program, backend, getattr(executable, "ran_by", None))
    )
    inputs = tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor))
    nodes = tuple(_node(name, graph, steps) for name in graph.captured)
    return Report(model, backend, inputs, _counts(executable, captured, steps), captured.fired, nodes, tuple(steps))


def _counts(executable: Interpreted | Planned, captured: Captured, steps: list[StepReport]) -> dict[str, int]:
    counts = {
        "captured_nodes": len(captured.graph.captured),
        "convolutions_before": ir.convolutions(captured.raw),
        "convolutions": ir.convolutions(captured.graph),
        "launches": len(steps),
        "torch_fallbacks": sum(bool(s.reason) for s in steps),
        "flops": sum(s.flops for s in steps),
    }
    if not isinstance(executable, Interpreted):
        program = executable.program
        counts |= {
            "native_calls": len(executable.native),
            "copies": program.copies,
            "arena_bytes": program.arena_bytes,
            "buffer_bytes": sum(b.bytes for b in program.buffers),
            "packed_bytes": executable.packed_bytes,
        }
        if program.tiles:
            counts["winograd_convolutions"] = sum(any(c.tile) for call in convolutions(program) for c in call)
        if isinstance(executable, (Compiled, Sliced)):
            counts["arena_bytes"] = executable.arena_bytes
            if executable.slices > 1:
                counts["slices"] = executable.slices  # of the first steps
    return counts


def _native_steps(program: Program, backend: str, ran_by: Callable[[Step], tuple[str, str]] | None) -> list[StepReport]:
    found: list[StepReport] = []
    for item in program.items:
        if isinstance(item, TorchItem):
            found.append(_torch_step(item.node, "torch", item.reason))
            continue
        for step, node in zip(item.plan.steps, item.nodes, strict=True):
            shape = shape_of(step, item.plan.buffers)
            kind = type(step).__name__.removesuffix("Step").lower()
            name, note = ran_by(step) if ran_by else (backend, "")
            found.append(
                StepReport(
                    step.name,
                    kind,
                    name,
                    shape,
                    flops_of(step, shape),
                    node.sources if node else (),
                    "",
                    _winograd(step, program),
                    note,
                )
            )
    return found


def _winograd(step: Step, program: Program) -> str:
    convs = convolutions_of(step)
    found = [program.tiles[conv.name, conv.spec] for conv in convs if program.tiles]
    return "; ".join(f"tiles of {tile[0]}x{tile[1]}" if any(tile) else f"direct: {why}" for tile, why in found)


def _torch_steps(graph: ir.Graph, backend: str) -> list[StepReport]:
    skipped = (ir.Input, ir.Constant)
    return [
        _torch_step(n, backend, n.op.reason if isinstance(n.op, ir.Torch) else "")
        for n in graph.nodes
        if not isinstance(n.op, skipped)
    ]


def _torch_step(node: ir.Node, backend: str, reason: str) -> StepReport:
    kind = str(node.op.target) if isinstance(node.op, ir.Torch) else type(node.op).__name__.lower()
    return StepReport(node.path or node.name, kind, backend, node.shape, 0, node.sources, reason)


def shape_of(step: Step, buffers: Sequence[Any]) -> tuple[int, ...]:
    """The step's output as [n, c, h, w]."""
    last = step.second if isinstance(step, PairStep) else step
    views = [o.view for o in last.outputs] if isinstance(last, ConvStep) else [last.y]
    buffer = buffers[views[0].buffer]
    channels = sum(v.channels for v in views)
    if isinstance(step, PairStep) and step.kind == "split":
        channels += step.first.spec.oc
    return buffer.n, channels, buffer.h, buffer.w


def flops_of(step: Step, shape: tuple[int, ...]) -> int:
    if isinstance(step, PairStep):
        return step.first.spec.flops() + step.second.spec.flops()
    return step.spec.flops() if isinstance(step, (ConvStep, PoolStep)) else math.prod(shape)


def _node(name: str, graph: ir.Graph, steps: list[StepReport]) -> NodeReport:
    call = graph.captured[name]
    mine = [s for s in steps if name in s.nodes]
    if mine:
        reason = "; ".join(s.reason for s in mine if s.reason)
        return NodeReport(
            name, call.target, call.path, call.shape, tuple(s.name for s in mine), mine[0].backend, reason
        )
    holder = next((n for n in graph.nodes if name in n.sources), None)
    reason = graph.notes.get(name) or (_VIEWS.get(type(holder.op), "") if holder else "nothing that an output needs")
    return NodeReport(name, call.target, call.path, call.shape, (), "none", reason)
