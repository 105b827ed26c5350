"""The part of a GPU plan that runs as a walk: one kernel through many steps, without the time that launches take.

At small batches a step computes for less time than a launch costs. Where every task of some levels in a row is a
convolution or a pool that the walk takes, these tasks become one: `mark` chooses them before buffers have places,
`collapsed` joins them when it is known what each needs. A pair is two convolutions in a plan with a walk, and what a
job needs is what its task would have waited for, memory that it takes over included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.cuda import abi, choices, walk
from ..kernels.cuda.choices import Row
from ..kernels.cuda.convolve import Packed
from ..kernels.cuda.walk import Cut, Job, Pooling, WalkLaunch
from ..kernels.maps import Map
from ..kernels.plan import Buffer, ConvStep, PoolStep, Step, View
from .gpu_hopper import Hopper, columns_of, misplaced, problem_of, spec_of

WALK_BATCH = 1  # up to here
WALK_LEAST = 8  # jobs
WALK_NEEDS = abi.NEEDS  # of a job
_disabled: ContextVar[bool] = ContextVar("walks disabled", default=False)


@dataclass(frozen=True)
class Member:
    """A step of a walk; a convolution's cut and weights."""

    step: ConvStep | PoolStep
    cut: Cut | None = None
    packed: Packed | None = None


@dataclass(frozen=True)
class Walk:
    """Steps of one launch. `needs` are positions of the earlier ones that each waits for."""

    members: tuple[Member, ...]
    needs: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return f"walk of {len(self.members)} steps from {self.members[0].step.name}"

    @property
    def steps(self) -> list[Step]:
        return [member.step for member in self.members]


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Plans that this thread makes inside have no walk, whatever backend was named: to time what walks are worth."""
    before = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(before)


def possible(hopper: Hopper | None, buffers: Sequence[Buffer]) -> bool:
    """Whether a plan over these buffers may have walks at all."""
    return hopper is not None and _asked(hopper, buffers) and not hopper.unwalked


def denied(hopper: Hopper | None, buffers: Sequence[Buffer]) -> str:
    """Why a plan that might have walks has none on this device; empty where that is not so."""
    return hopper.unwalked if hopper is not None and _asked(hopper, buffers) else ""


def _asked(hopper: Hopper, buffers: Sequence[Buffer]) -> bool:
    if not hopper.kernels.walk_columns or hopper.invariant or _disabled.get():  # no other batch walks
        return False
    return all(1 <= buffer.n <= WALK_BATCH for buffer in buffers) and (hopper.always or bool(_rows(hopper)))


def mark(hopper: Hopper, tasks: Sequence[Any], buffers: Sequence[Buffer]) -> bool:
    """Gives the tasks of walks, of all in the order of their levels, their members; returns whether there are any."""
    members = [_member(hopper, task, buffers) for task in tasks]
    barred = {task.level for task, member in zip(tasks, members, strict=True) if member is None}
    runs = itertools.groupby(range(len(tasks)), key=lambda j: tasks[j].level in barred)
    found = [places for others, run in runs if not others and len(places := list(run)) >= WALK_LEAST]
    chosen = [j for places in found for j in places]
    if not chosen or not (hopper.always or _won(_rows(hopper), len(chosen), max(b.n for b in buffers))):
        return False
    for j in chosen:
        member = members[j]
        assert member is not None
        packed = hopper.packed(member.step) if isinstance(member.step, ConvStep) else None
        tasks[j].member = dataclasses.replace(member, packed=packed)
    return True


def _rows(hopper: Hopper) -> list[Row]:
    """What was measured of walks on this GPU. A row's shape is that of a network: m its batch, oc the jobs of its
    walks, k and taps 1; `against` is the same network without them.
    """
    return [row for row in hopper.rows if row.shape.kernel == "walk" and row.gpu == hopper.gpu]


def _won(rows: Sequence[Row], jobs: int, batch: int) -> bool:
    """Whether the network of the nearest number of jobs, of those measured at this batch or a larger one, won. One of
    more than twice or less than half as many says nothing.
    """

    def apart(row: Row) -> float:
        return abs(math.log2(row.shape.oc / jobs))

    able = [row for row in rows if row.shape.m >= batch and apart(row) <= choices.REACH]
    nearest = min(able, key=lambda row: (apart(row), row.shape.m), default=None)
    return nearest is not None and nearest.seconds < nearest.against


def shape_of(dtype: str, batch: int, jobs: int) -> choices.Shape:
    """What a row of a network's walks is kept under."""
    return choices.Shape("walk", choices.precision_of(dtype), batch, jobs, 1, 1)


def _member(hopper: Hopper, task: Any, buffers: Sequence[Buffer]) -> Member | None:
    """The task as a member of a walk, without its weights; None for one that the library does not take."""
    step, kernels = task.step, hopper.kernels
    if task.entry is not None or not isinstance(step, (ConvStep, PoolStep)):
        return None
    wide = _widened(step, buffers)
    if misplaced(step, step.spec.dtype, buffers) and not wide:
        return None
    if isinstance(step, PoolStep):
        return None if walk.pool_reasons(kernels, step.spec) else Member(step)
    spec = spec_of(step)
    cut = walk.chosen(kernels, spec, columns_of(step), walk.blocks_of(hopper.device), wide)
    return None if walk.conv_reasons(kernels, spec, columns_of(step), cut) else Member(step, cut)


def _widened(step: ConvStep | PoolStep, buffers: Sequence[Buffer]) -> bool:
    """Whether it is a convolution whose only output is float32, which a walk takes in place of its own dtype."""
    if not isinstance(step, ConvStep) or len(step.outputs) != 1 or step.residual is not None:
        return False
    x, y = step.x, step.outputs[0].view
    aligned = all(view.offset % 8 == 0 and buffers[view.buffer].c % 8 == 0 for view in (x, y))
    return aligned and buffers[x.buffer].dtype == step.spec.dtype and buffers[y.buffer].dtype == "float32"


def collapsed(tasks: Sequence[Any]) -> list[Any]:
    """The tasks, in the order of levels and with what they need, with each walk's as one."""
    found: list[Any] = []
    places: dict[int, int] = {}
    for start, stop in _pieces(tasks):
        first, inside = tasks[start], tasks[start:stop]
        outside = {places[i] for task in inside for i in task.needs if i < start}
        places |= dict.fromkeys(range(start, stop), len(found))
        if first.member is None:
            found.append(dataclasses.replace(first, needs=tuple(sorted(outside))))
            continue
        made = Walk(tuple(task.member for task in inside), reduced([_inside(task, start) for task in inside]))
        spans = list(dict.fromkeys(span for task in inside for span in task.spans))
        needs = tuple(sorted(outside))
        found.append(dataclasses.replace(first, spans=spans, needs=needs, member=None, walk=made))
    return found


def _pieces(tasks: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """[start, stop) of what becomes one task. A walk ends ahead of the level of a job that would need too many."""
    for member, run in itertools.groupby(range(len(tasks)), key=lambda j: tasks[j].member is not None):
        places = list(run)
        start, stop = places[0], places[-1] + 1
        while member and start < stop:
            needs = reduced([_inside(task, start) for task in tasks[start:stop]])
            over = next((start + j for j, mine in enumerate(needs) if len(mine) > WALK_NEEDS), None)
            end = stop if over is None else next(j for j in places if tasks[j].level == tasks[over].level)
            yield start, end
            start = end
        yield from ((j, j + 1) for j in range(start, stop))


def _inside(task: Any, start: int) -> tuple[int, ...]:
    """What it needs from `start` on, counted from there."""
    return tuple(i - start for i in task.needs if i >= start)


def reduced(needs: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Without those that another of a job's needs has to wait for anyway."""
    behind: list[set[int]] = []  # all that have ended before each job starts
    found = []
    for mine in needs:
        implied = set[int]().union(*(behind[i] for i in mine))
        behind.append(implied | set(mine))
        found.append(tuple(i for i in mine if i not in implied))
    return tuple(found)


def bytes_of(hopper: Hopper, made: Walk) -> int:
    """Of the table and the workspace, before any is made."""
    jobs = []
    for member, needs in zip(made.members, made.needs, strict=True):
        if isinstance(member.step, PoolStep):
            jobs.append(walk.blank_pool(member.step.spec, needs))
        else:
            assert member.cut is not None
            jobs.append(walk.blank_conv(spec_of(member.step), columns_of(member.step), member.cut, needs))
    sizes = hopper.kernels.walk_sizes(jobs, walk.blocks_of(hopper.device))
    return int(sizes.table + sizes.workspace)


def launch(hopper: Hopper, made: Walk, place: Callable[[View], Map]) -> WalkLaunch:
    """The walk as one launch on the maps that `place` finds, with memory of its own."""
    jobs = []
    for member, needs in zip(made.members, made.needs, strict=True):
        step = member.step
        if isinstance(step, PoolStep):
            there = None
            if step.shift is not None:
                there = torch.as_tensor(step.shift, dtype=torch.float32, device=hopper.device).contiguous()
            jobs.append(Job(Pooling(step.spec, place(step.x), place(step.y), there, step.relu), None, needs))
        else:
            assert member.packed is not None
            jobs.append(Job(problem_of(step, member.packed, place), member.cut, needs))
    return walk.launch(made.name, hopper.kernels, jobs, hopper.device)
