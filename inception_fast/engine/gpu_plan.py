"""A plan as GPU launches on concurrent branches.

1. Steps become tasks: a pair's two convolutions are two tasks, a split is one, an import that only stems read is none,
   a grouped convolution has one for each group, and a convolution and its maximum are one where that was measured to be
   faster (`gpu_pooled`).
2. A task depends on earlier ones that touch the same channels of the same buffer, one of them writing. Its level is one
   more than that of the deepest task it depends on; tasks of one level may run at the same time.
3. Buffers get places in an arena by the levels they live through, so that sharing memory never orders what may overlap.
4. Tasks in the order of levels are dealt to streams; a task waits for those in other streams that it depends on or
   whose memory it takes over. Where `gpu_walk` joins the tasks of levels in a row to one, it takes part in this as one.

Nothing is measured or tuned here, and the same plan gives the same launches: results are the same bits from run to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.maps import Launched
from ..kernels.plan import (
    ALIGNMENT,
    Buffer,
    ConvStep,
    EltwiseStep,
    ImportStep,
    LrnStep,
    NormalizeStep,
    Output,
    PairStep,
    Plan,
    PoolStep,
    Step,
    View,
)
from ..kernels.spec import ConvSpec
from ..kernels.triton import convolve, launch, pools, stems
from ..kernels.triton.configs import Config
from ..kernels.triton.convolve import Packed, Part
from ..kernels.triton.launch import Launch, Map
from . import gpu_pooled, gpu_walk
from .gpu_hopper import Hopper, Work, overlapping
from .gpu_pooled import PooledStep
from .memory import Lifetime, place
from .segment import views, writes

Choose = Callable[[ConvSpec], Config]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STREAMS = 4


class Packs:
    """Packed weights on one device, shared by the plans of all batch sizes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[Any, ...], Packed] = {}

    def get(self, step: ConvStep | PairStep, dtype: torch.dtype) -> Packed:
        """The step's convolutions as one packed launch: a group an output of each."""
        both = (step.first, step.second) if isinstance(step, PairStep) else (step,)
        arrays = [a for s in both for a in (s.whole, s.scale, s.shift)]
        columns = [[(o.view.channels, o.relu) for o in s.outputs] for s in both]
        pads = tuple((s.spec.padding[0], s.spec.padding[2]) for s in both)
        key = (
            dtype,
            pads,
            *map(tuple, columns),
            *((a.shape, blake2b(a.tobytes()).digest()) for a in arrays),
        )
        if key not in self._kept:
            parts: list[Part] = []
            for s, ranges in zip(both, columns, strict=True):
                whole = Part(s.whole, s.scale, s.shift, (s.spec.padding[0], s.spec.padding[2]), False)
                parts += convolve.split_columns(whole, ranges)
            self._kept[key] = convolve.pack(parts, dtype, self.device)
        return self._kept[key]

    @property
    def bytes(self) -> int:
        return sum(packed.bytes for packed in self._kept.values())


class Span(NamedTuple):
    """Channels [first, last) of a buffer."""

    buffer: int
    first: int
    last: int
    written: bool

    def meets(self, other: Span) -> bool:
        """Whether the order of the two accesses matters."""
        overlap = self.buffer == other.buffer and self.first < other.last and other.first < self.last
        return overlap and (self.written or other.written)


@dataclasses.dataclass
class Task:
    """One step's work. `needs` are positions of tasks in the final order; `waits` those of them in other streams."""

    step: Step | PooledStep
    entry: ImportStep | None
    spans: list[Span]
    config: Config | None = None
    packed: Packed | None = None
    level: int = 0
    needs: tuple[int, ...] = ()
    stream: int = 0
    waits: tuple[int, ...] = ()
    part: int = -1  # its workspace's place in the arena
    hopper: Work | None = None
    member: gpu_walk.Member | None = None  # of a walk that is to come
    walk: gpu_walk.Walk | None = None
    whole: ConvStep | None = None  # of which its step is one group's
    note: str = ""  # why the Hopper kernels do not run it, or no walk does, where they were asked

    @property
    def name(self) -> str:
        return (self.walk or self.hopper or self.step).name

    @property
    def steps(self) -> list[Step]:
        """All that it computes: several where a level's convolutions are one launch, or a walk."""
        made = self.walk or self.hopper
        if made is not None:
            return made.steps
        return [self.step.first, self.step.second] if isinstance(self.step, PooledStep) else [self.step]

    @property
    def backend(self) -> str:
        return "triton" if self.walk is None and self.hopper is None else "cuda"


class GpuPlan:
    """A plan ready to be launched on `device` any number of times, on any memory of the sizes it states.

    `kept` are buffers that others read or wrote, and so lie in memory of the caller's; input buffers have to be.
    """

    def __init__(
        self, plan: Plan, packs: Packs, choose: Choose, *, streams: int = STREAMS, tf32: bool = False,
        kept: frozenset[int] = frozenset(), hopper: Hopper | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.device, self.tf32, self.kept, self.hopper = plan, packs.device, tf32, kept, hopper
        if any(b.kind == "input" and i not in kept for i, b in enumerate(plan.buffers)):
            raise ValueError("a plan with input buffers; allowed: in memory that is kept, or through import steps")
        tasks = self._levelled(apart=True) if gpu_walk.possible(hopper, plan.buffers) else []
        walks = hopper is not None and gpu_walk.mark(hopper, tasks, plan.buffers)
        tasks = tasks if walks else self._levelled(apart=False)
        for task in tasks:
            self._prepare(task, packs, choose)
        self.tasks = _gathered(tasks)
        self.positions, self.arena_bytes = self._place()
        self._order()
        self.tasks = gpu_walk.collapsed(self.tasks) if walks else self.tasks
        _deal(self.tasks, streams)
        self.workspace_bytes = 0
        if hopper is not None:
            alone = [gpu_walk.bytes_of(hopper, task.walk) for task in self.tasks if task.walk is not None]
            self.workspace_bytes = hopper.workspace_bytes(self.hopper_work()) + sum(alone)

    def hopper_work(self) -> list[tuple[int, Work]]:
        """What the Hopper kernels run, with its streams."""
        return [(task.stream, task.hopper) for task in self.tasks if task.hopper is not None]

    def ran_by(self, step: Step) -> tuple[str, str]:
        """The backend that runs a step, both for a pair's two; and why not the Hopper kernels where they were asked."""
        parts = {id(part) for part in ((step, step.first, step.second) if isinstance(step, PairStep) else (step,))}
        tasks = [task for task in self.tasks if parts & {id(task.step), id(task.whole), *map(id, task.steps)}]
        names = sorted({task.backend for task in tasks}) or ["triton"]
        return "+".join(names), "; ".join(dict.fromkeys(task.note for task in tasks if task.note))

    def launches(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        arena: Tensor,
        kept: Mapping[int, Tensor] | None = None,
    ) -> list[list[Launched]]:
        """Each task's launches, in order. inputs [n, c, h, w] of any strides; outputs and kept buffers [n, h, w, c],
        dense, of their buffers' dtypes; arena [>= arena_bytes] uint8, aligned to 64 bytes.
        """
        memory = _Memory(self, inputs, outputs, arena, kept or {})
        return [memory.launches(task) for task in self.tasks]

    def _levelled(self, apart: bool) -> list[Task]:
        """The steps as tasks in the order of their levels; `apart`: every pair as two."""
        steps = _expanded(self.plan, self.kept, self.hopper, apart)
        tasks = [Task(step, entry, _spans(step, entry), whole=whole) for step, entry, whole in steps]
        _set_levels(tasks)
        return sorted(tasks, key=lambda task: task.level)

    def _prepare(self, task: Task, packs: Packs, choose: Choose) -> None:
        step = task.step
        if not isinstance(step, (ConvStep, PairStep, PooledStep)) or task.member is not None:
            return
        if self.hopper is not None:
            found = (
                "a convolution from the caller's image"
                if task.entry is not None
                else self.hopper.take(step, self.plan.buffers)
            )
            if isinstance(found, Work):
                task.hopper, task.note = found, gpu_walk.denied(self.hopper, self.plan.buffers)
                return
            task.note = found
        assert not isinstance(step, PooledStep), "taken by the Hopper kernels, or not joined"
        first = step.first if isinstance(step, PairStep) else step
        task.packed = packs.get(step, DTYPES[first.spec.dtype])
        columns = sum(group.channels for group in task.packed.groups)
        task.config = choose(dataclasses.replace(first.spec, oc=columns))

    def _place(self) -> tuple[dict[int, int], int]:
        """Byte offsets of the arena's buffers, and of the splits' workspaces in their tasks."""
        lives: dict[int, list[int]] = {}
        for task in self.tasks:
            for span in task.spans:
                lives.setdefault(span.buffer, []).append(task.level)
        buffers = [b for b in lives if self.plan.buffers[b].kind == "arena" and b not in self.kept]
        times = [Lifetime(self.plan.buffers[b].bytes, min(lives[b]), max(lives[b])) for b in buffers]
        split = [task for task in self.tasks if _part_bytes(task)]
        times += [Lifetime(_part_bytes(task), task.level, task.level) for task in split]
        places, total = place(times)
        for task, at in zip(split, places[len(buffers) :], strict=True):
            task.part = at
        return dict(zip(buffers, places, strict=False)), total

    def _order(self) -> None:
        """Sets `needs`: shared channels first, then shared memory."""
        ranges = [self._bytes_of(task) for task in self.tasks]
        for j, task in enumerate(self.tasks):
            task.needs = tuple(
                i
                for i, earlier in enumerate(self.tasks[:j])
                if _conflict(earlier, task) or _overlap(ranges[i], ranges[j])
            )

    def _bytes_of(self, task: Task) -> list[tuple[int, int, int]]:
        """(owner, start, stop) of everything the task touches in the arena; a workspace is its own owner."""
        found = {(s.buffer, self.positions[s.buffer]) for s in task.spans if s.buffer in self.positions}
        whole = [(b, at, at + self.plan.buffers[b].bytes) for b, at in sorted(found)]
        return whole + ([(-1 - id(task), task.part, task.part + _part_bytes(task))] if task.part >= 0 else [])


def _expanded(
    plan: Plan, kept: frozenset[int], hopper: Hopper | None, apart: bool
) -> list[tuple[Step | PooledStep, ImportStep | None, ConvStep | None]]:
    """The steps as tasks see them, each with the import it takes over, and the convolution whose group it is."""
    steps: list[Step] = []
    for step in plan.steps:
        fused = hopper is not None and isinstance(step, PairStep) and hopper.fuses(step, plan.buffers)
        if isinstance(step, PairStep) and (apart or not (fused or _one_launch(step))):
            steps += [step.first, step.second]
        else:
            steps.append(step)
    parts = {id(s): _by_group(s) for s in steps if isinstance(s, ConvStep) and s.spec.groups > 1}
    wholes = {id(part): s for s in steps if isinstance(s, ConvStep) for part in parts.get(id(s), ())}
    steps = [one for s in steps for one in parts.get(id(s), [s])]
    imports = {step.y.buffer: step for step in steps if isinstance(step, ImportStep)}
    mine = {buffer: step for buffer, step in imports.items() if buffer not in kept}
    taken = {buffer: step for buffer, step in mine.items() if _only_stems_read(plan, steps, buffer)}
    pooled = []
    if hopper is not None and not apart:
        pooled = [one for one in gpu_pooled.candidates(plan, kept) if hopper.pools(one, plan.buffers)]
    found: list[tuple[Step | PooledStep, ImportStep | None, ConvStep | None]] = []
    for made in gpu_pooled.merged(steps, pooled):
        if isinstance(made, ImportStep) and made.y.buffer in taken:
            continue
        entry = taken.get(made.x.buffer) if isinstance(made, ConvStep) else None
        found.append((made, entry, wholes.get(id(made))))
    return found


def _by_group(step: ConvStep) -> list[ConvStep]:
    """One for each group of a convolution without a residual. With zeros for weights in a single one, infinities and
    NaN would spread from group to group.
    """
    spec, found = step.spec, []
    c, oc = spec.c // spec.groups, spec.oc // spec.groups
    for i in range(spec.groups):
        rows = slice(i * oc, (i + 1) * oc)
        part = dataclasses.replace(
            step,
            name=f"{step.name} of group {i}",
            spec=dataclasses.replace(spec, c=c, oc=oc, groups=1),
            x=View(step.x.buffer, step.x.offset + i * c, c),
            weight=step.whole[rows],
            scale=step.scale[rows],
            shift=step.shift[rows],
            outputs=_columns(step.outputs, rows.start, rows.stop),
        )
        found.append(part)
    return found


def _columns(outputs: Sequence[Output], first: int, last: int) -> tuple[Output, ...]:
    """Where columns [first, last) of all go."""
    found, at = list[Output](), 0
    for view, relu in ((o.view, o.relu) for o in outputs):
        low, high = max(first, at), min(last, at + view.channels)
        if low < high:
            found.append(Output(View(view.buffer, view.offset + low - at, high - low), relu))
        at += view.channels
    return tuple(found)


def _one_launch(step: PairStep) -> bool:
    a, b = step.first, step.second
    sizes = [(s.spec.stride, s.spec.oh, s.spec.ow, s.spec.groups, s.residual, s.x) for s in (a, b)]
    return step.kind == "split" and sizes[0] == sizes[1] and a.spec.groups == 1 and a.residual is None


def _only_stems_read(plan: Plan, steps: Sequence[Step], buffer: int) -> bool:
    """Whether a buffer is written by one import and read by nothing but convolutions that the stem kernel serves."""
    whole = plan.buffers[buffer]
    touching = [s for s in steps if any(v.buffer == buffer for v in views(s))]
    readers = [s for s in touching if not isinstance(s, ImportStep)]
    return (
        whole.kind == "arena"
        and len(touching) - len(readers) == 1
        and bool(readers)
        and all(isinstance(s, ConvStep) and convolve.stem_takes(s.spec) and len(s.outputs) == 1 for s in readers)
    )


def _spans(step: Step | PooledStep, entry: ImportStep | None) -> list[Span]:
    written = writes(step)
    apart = set() if entry is None else {entry.y.buffer}
    if isinstance(step, PooledStep):
        apart.add(step.second.x.buffer)  # what is between its two
    found = []
    for view in views(step):
        if view.buffer not in apart:
            found.append(Span(view.buffer, view.offset, view.offset + view.channels, view in written))
    return list(dict.fromkeys(found))


def _conflict(a: Task, b: Task) -> bool:
    return any(x.meets(y) for x in a.spans for y in b.spans)


def _overlap(a: list[tuple[int, int, int]], b: list[tuple[int, int, int]]) -> bool:
    return any(x[0] != y[0] and x[1] < y[2] and y[1] < x[2] for x in a for y in b)


def _set_levels(tasks: Sequence[Task]) -> None:
    for j, task in enumerate(tasks):
        task.level = 1 + max((earlier.level for earlier in tasks[:j] if _conflict(earlier, task)), default=-1)


def _gathered(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with those of one level that can be one launch as one; tasks of a level do not depend on each other."""
    found: list[Task] = []
    for task in tasks:
        work = task.hopper
        mine = [t for t in found if work and t.hopper and t.level == task.level and t.hopper.fits(work)]
        if mine and work and mine[0].hopper:
            mine[0].hopper = mine[0].hopper.joined(work)
            mine[0].spans = list(dict.fromkeys(mine[0].spans + task.spans))
        else:
            found.append(task)
    return found


def _deal(tasks: Sequence[Task], streams: int) -> None:
    """Gives each task a stream: that of the last task it needs where nothing followed there, else the idlest."""
    last = [-1] * streams
    for j, task in enumerate(tasks):
        follows = [s for s in range(streams) if last[s] in task.needs]
        task.stream = max(follows, key=lambda s: last[s]) if follows else min(range(streams), key=lambda s: last[s])
        newest = {tasks[i].stream: i for i in task.needs}
        task.waits = tuple(sorted(i for stream, i in newest.items() if stream != task.stream))
        last[task.stream] = j


def _part_bytes(task: Task) -> int:
    if task.packed is None or task.config is None or task.entry is not None:
        return 0
    assert isinstance(task.step, (ConvStep, PairStep))
    spec = task.step.first.spec if isinstance(task.step, PairStep) else task.step.spec
    return 4 * convolve.part_elements(spec, task.packed.groups, task.config)


class _Memory:
    """Where a call's maps lie."""

    def __init__(
        self,
        plan: GpuPlan,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        arena: Tensor,
        kept: Mapping[int, Tensor],
    ) -> None:
        if arena.numel() < plan.arena_bytes or arena.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"arena of {arena.numel()} bytes at {arena.data_ptr():#x}; allowed: at least {plan.arena_bytes} "
                f"bytes on a multiple of {ALIGNMENT}"
            )
        self.plan, self.inputs, self.arena = plan, inputs, arena
        self.flat = [y.reshape(-1) for y in outputs]
        self.kept = {b: y.reshape(-1) for b, y in kept.items()}
        self.workspaces = {} if plan.hopper is None else plan.hopper.workspaces(plan.hopper_work())
        self.early = {id(plan.tasks[j]) for j in overlapping(plan.tasks)}

    def map(self, view: View) -> Map:
        b: Buffer = self.plan.plan.buffers[view.buffer]
        if b.kind == "output":
            data = self.flat[b.position]
        elif view.buffer in self.kept:
            data = self.kept[view.buffer]
        else:
            at = self.plan.positions[view.buffer]
            data = self.arena[at : at + b.bytes].view(DTYPES[b.dtype])
        return Map(data[view.offset :], b.n, b.h, b.w, view.channels, b.c)

    def launches(self, task: Task) -> list[Launched]:
        step = task.step
        if task.walk is not None and self.plan.hopper is not None:
            return [gpu_walk.launch(self.plan.hopper, task.walk, self.map)]
        if task.hopper is not None and self.plan.hopper is not None:
            place = self.workspaces[task.stream]
            return [self.plan.hopper.launch(task.hopper, self.map, place, id(task) in self.early)]
        if isinstance(step, (ConvStep, PairStep)):
            return [*self._conv(task)]
        if isinstance(step, ImportStep):
            found = launch.imported(self.inputs[step.source], self.map(step.y), step.scale, step.shift)
        elif isinstance(step, PoolStep):
            found = pools.pooled(step.spec, self.map(step.x), self.map(step.y), step.shift, step.relu)
        elif isinstance(step, EltwiseStep):
            old = None if step.residual is None else self.map(step.residual)
            found = launch.eltwise(step, self.map(step.x), self.map(step.y), old)
        elif isinstance(step, LrnStep):
            found = launch.lrn(step, self.map(step.x), self.map(step.y))
        else:
            assert isinstance(step, NormalizeStep)
            found = launch.normalized(step, self.map(step.x), self.map(step.y))
        return [dataclasses.replace(one, name=step.name) for one in found]

    def _conv(self, task: Task) -> list[Launch]:
        step, packed = task.step, task.packed
        assert packed is not None and task.config is not None
        if isinstance(step, PairStep):
            outputs = [self.map(o.view) for s in (step.first, step.second) for o in s.outputs]
            spec, x, residual, scale = step.first.spec, step.first.x, None, 1.0
        else:
            assert isinstance(step, ConvStep)
            outputs = [self.map(o.view) for o in step.outputs]
            spec, x, scale = step.spec, step.x, step.residual_scale
            residual = None if step.residual is None else self.map(step.residual)
        if task.entry is not None:
            entry, first = task.entry, x.offset - task.entry.y.offset
            seen = slice(first, first + x.channels)
            scales = (None if v is None else v[seen] for v in (entry.scale, entry.shift))
            return stems.convolution(
                step.name, spec, self.inputs[entry.source][:, seen], packed, outputs[0],
                **dict(zip(("scale", "shift"), scales, strict=True)), config=task.config, tf32=self.plan.tf32,
            )  # fmt: skip
        return convolve.convolution(
            step.name, spec, self.map(x), packed, outputs, task.config,
            residual=residual, residual_scale=scale, workspace=self._workspace(task), tf32=self.plan.tf32,
        )  # fmt: skip

    def _workspace(self, task: Task) -> convolve.Workspace:
        def take(elements: int) -> Tensor:
            return self.arena[task.part : task.part + 4 * elements].view(torch.float32)

        return take
