"""Where the time of a walk goes: the marks that its units leave, and the time that passed, shared out to its jobs.

A walk is one launch, so no event of the device lies between its jobs, which overlap besides. Its kernel can leave the
nanoseconds at which every unit came to its marks. At each instant the time that passes belongs in equal parts to the
units that run then, and so to their jobs; where none runs it is waiting. So the parts together are the whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch

from ..kernels.cuda import abi, walk
from ..kernels.cuda.walk import WalkLaunch


class NotTraced(RuntimeError):
    """Why a walk has no trace that could be shared out."""


class Unit(NamedTuple):
    """A unit of a job, and the nanoseconds at which it was taken up, what it needs had ended, its sums were there, it
    had ended. A pool has no sums, and of the parts of a tile only the one that stores has an end: 0.
    """

    job: int
    taken: int
    ready: int
    summed: int
    ended: int

    @property
    def begin(self) -> int:
        """When it had its turn and what it needs. The latter is for another warp to say, which may come to that late,
        even behind the sums of a short unit: then from its turn on.
        """
        return max(self.taken, self.ready) if self.ready <= (self.summed or self.ended) else self.taken

    @property
    def end(self) -> int:
        return self.ended or self.summed


class Tracer:
    """Makes a walk leave marks: `launch` runs in place of the one that was given, on the same memory.

    Raises NotTraced where the library has no traces, or refuses this one.
    """

    def __init__(self, launch: WalkLaunch) -> None:
        library, jobs = launch.library, [walk.described(job) for job in launch.kept[0]]
        if not library.walk_traces:
            raise NotTraced(f"{library.file.name} leaves no traces of walks; build the package anew")
        try:
            self._job_of = library.walk_units(jobs, walk.blocks_of(launch.device))
            self._marks = torch.zeros(len(self._job_of), abi.WALK_MARKS, dtype=torch.int64, device=launch.device)
            blob = library.traced_walk(launch.blob, self._marks.data_ptr())
        except RuntimeError as error:
            raise NotTraced(" ".join(str(error).split())) from error
        self.launch = dataclasses.replace(launch, blob=blob, kept=(*launch.kept, self._marks))
        self.jobs = len(jobs)

    def clear(self) -> None:
        """Ahead of every run: marks that it does not leave are 0."""
        self._marks.zero_()

    def units(self) -> list[Unit]:
        """Of the last run, which this waits for."""
        return [Unit(job, *marks) for job, marks in zip(self._job_of, self._marks.tolist(), strict=True)]


def traced(launch: WalkLaunch) -> list[Unit]:
    """The units of one run of the walk alone, its second one with a trace."""
    tracer = Tracer(launch)
    for _ in range(2):
        tracer.clear()
        tracer.launch.run()
    return tracer.units()


@dataclass(frozen=True)
class Shares:
    """Nanoseconds of one run, from its first mark to its last: what each job has of them and what none has, exactly,
    and when each job's first unit began and its last one ended.
    """

    jobs: tuple[Fraction, ...]
    waiting: int
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    span: int


def shares(units: Sequence[Unit], jobs: int) -> Shares:
    """The run's time shared out to so many jobs. The order of the units says nothing.

    Raises NotTraced for marks that no whole run leaves.
    """
    _check(units, jobs)
    changes = Counter(unit.begin for unit in units)
    changes.subtract(Counter(unit.end for unit in units))
    times = sorted(changes)
    running = list(itertools.accumulate(changes[time] for time in times))  # from each of the times to the next
    scale = math.lcm(*filter(None, running))
    start = min(min(unit.taken, unit.ready) for unit in units)
    passed = {times[0]: 0}  # what a unit would have, by then, that runs all along; `scale` times that
    waiting = times[0] - start
    for (time, later), count in zip(itertools.pairwise(times), running, strict=False):
        passed[later] = passed[time] + (scale // count * (later - time) if count else 0)
        waiting += 0 if count else later - time
    found = [0] * jobs
    for unit in units:
        found[unit.job] += passed[unit.end] - passed[unit.begin]
    begins, ends = [times[-1]] * jobs, [start] * jobs
    for unit in units:
        begins[unit.job] = min(begins[unit.job], unit.begin)
        ends[unit.job] = max(ends[unit.job], unit.end)
    return Shares(
        tuple(Fraction(part, scale) for part in found), waiting,
        tuple(begin - start for begin in begins), tuple(end - start for end in ends), times[-1] - start,
    )  # fmt: skip


def _check(units: Sequence[Unit], jobs: int) -> None:
    for place, unit in enumerate(units):
        whole = 0 < min(unit.taken, unit.ready) and unit.begin <= (unit.summed or unit.begin) <= unit.end
        if not whole:
            raise NotTraced(f"marks {unit[1:]} of unit {place}, of job {unit.job}; allowed: those of a run that ended")
    seen = {unit.job for unit in units}
    if not seen or seen != set(range(jobs)):
        raise NotTraced(f"units of {len(seen)} jobs, up to {max(seen, default=-1)}; allowed: of each of {jobs}")
