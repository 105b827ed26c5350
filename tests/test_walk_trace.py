"""A walk's time shared out to its steps, as arithmetic: against a count of every nanosecond, and spoilt."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from inception_fast.measure import walk_trace
from inception_fast.measure.gpu_profiler import steps_of_walk
from inception_fast.measure.profiler import Layer, Work, layer_of
from inception_fast.measure.roofline import Peak
from inception_fast.measure.trace import trace
from inception_fast.measure.walk_trace import NotTraced, Shares, Unit, shares

PEAK = Peak(1e12, 1e11, "nothing", "float16", 0)
Case = tuple[list[Unit], int]


def ran(job: int, begin: int, end: int, waited: int = 0) -> Unit:
    """A unit of a convolution that was taken up `waited` before it was ready."""
    return Unit(job, begin - waited, begin, end, end)


def counted(units: Sequence[Unit], jobs: int) -> tuple[list[Fraction], int]:
    """What `shares` says of jobs and of waiting, nanosecond by nanosecond. Who has sums has what it needs."""
    found, waiting = [Fraction(0)] * jobs, 0
    first = min(min(u.taken, u.ready) for u in units)
    for now in range(first, max(max(u.summed, u.ended) for u in units)):
        running = []
        for u in units:
            late = u.ready > (u.summed if u.summed else u.ended)
            if now >= u.taken and (late or now >= u.ready) and now < (u.ended if u.ended else u.summed):
                running.append(u)
        for u in running:
            found[u.job] += Fraction(1, len(running))
        waiting += not running
    return found, waiting


def drawn(seed: int) -> Case:
    """Jobs of several units each, which overlap, lie inside each other, leave gaps, last no time, have no sums or no
    end, and had their turn before or after what they need.
    """
    draw = random.Random(seed)
    jobs = draw.randint(1, 6)
    units = []
    for job in [*range(jobs), *(draw.randrange(jobs) for _ in range(draw.randint(0, 25)))]:
        taken = draw.randint(1, 200)
        ready = max(1, taken + draw.randint(-20, 20))
        summed = (taken if draw.randrange(5) == 0 else max(taken, ready)) + draw.choice((0, 0, 1, draw.randint(1, 60)))
        ended = summed + draw.choice((0, 1, draw.randint(1, 10)))
        kind = draw.randrange(4)
        units.append(Unit(job, taken, ready, summed if kind else 0, 0 if kind == 1 else ended))
    draw.shuffle(units)
    return units, jobs


EXACT: dict[str, tuple[Case, list[Any], int]] = {
    "one unit": (([ran(0, 5, 12)], 1), [7], 0),
    "one unit that waited": (([ran(0, 5, 12, waited=3)], 1), [7], 3),
    "one unit of no time": (([ran(0, 5, 5)], 1), [0], 0),
    "no time beside some": (([ran(0, 5, 5), ran(1, 5, 9), ran(2, 7, 7), ran(3, 9, 9)], 4), [0, 4, 0, 0], 0),
    "one behind the other": (([ran(0, 1, 4), ran(1, 4, 9)], 2), [3, 5], 0),
    "a gap": (([ran(0, 1, 4), ran(1, 6, 9)], 2), [3, 3], 2),
    "overlapping": (([ran(0, 1, 5), ran(1, 3, 9)], 2), [3, 5], 0),
    "inside": (([ran(0, 1, 10), ran(1, 4, 6)], 2), [8, 1], 0),
    "the same times": (([ran(0, 1, 10), ran(1, 1, 10), ran(2, 1, 10)], 3), [3, 3, 3], 0),
    "three units beside one": (([ran(0, 1, 9), ran(1, 1, 9), ran(0, 1, 9), ran(0, 1, 9)], 2), [6, 2], 0),
    "a third": (([ran(0, 1, 2), ran(1, 1, 2), ran(2, 1, 3)], 3), [Fraction(1, 3), Fraction(1, 3), Fraction(4, 3)], 0),
    "a pool has no sums": (([Unit(0, 3, 2, 0, 8)], 1), [5], 1),
    "a part that another stores": (([Unit(0, 2, 3, 6, 0), Unit(0, 2, 3, 7, 9)], 1), [6], 1),
    "a turn after what it needs": (([Unit(0, 6, 2, 9, 9)], 1), [3], 4),
    "a mark behind its sums": (([Unit(0, 3, 8, 7, 9)], 1), [6], 0),
    "a mark behind its end": (([Unit(0, 3, 11, 7, 9)], 1), [6], 0),
    "a mark behind a part's end": (([Unit(0, 3, 11, 7, 0), ran(1, 5, 12)], 2), [3, 6], 0),
}


@pytest.mark.parametrize("name", EXACT)
def test_by_hand(name: str) -> None:
    (units, jobs), parts, waiting = EXACT[name]
    found = shares(units, jobs)
    assert (list(found.jobs), found.waiting) == (parts, waiting) == counted(units, jobs)
    assert sum(found.jobs) + found.waiting == found.span


def fits(module: Any, seeds: range) -> bool:
    """Whether the module shares random runs out as a count of nanoseconds does, in whatever order units come."""
    for units, jobs in map(drawn, seeds):
        found = module.shares([module.Unit(*unit) for unit in units], jobs)
        parts, waiting = counted(units, jobs)
        start = min(min(unit[1:3]) for unit in units)
        begins = tuple(min(u.begin for u in units if u.job == job) - start for job in range(jobs))
        ends = tuple(max(u.end for u in units if u.job == job) - start for job in range(jobs))
        if (list(found.jobs), found.waiting, found.begins, found.ends) != (parts, waiting, begins, ends):
            return False
        turned = module.shares([module.Unit(*unit) for unit in reversed(units)], jobs)
        if sum(parts) + waiting != found.span or found != turned:
            return False
    return True


def test_the_parts_are_the_whole_whatever_overlaps() -> None:
    assert fits(walk_trace, range(300))


# What was, and the mistake.
MUTANTS = {
    "a unit runs from its turn on": ("return max(self.taken, self.ready) if", "return self.taken if"),
    "a unit runs once it is ready": ("return max(self.taken, self.ready) if", "return self.ready if"),
    "a late mark is believed": (" if self.ready <= (self.summed or self.ended) else self.taken", ""),
    "late is behind the end": ("<= (self.summed or self.ended)", "<= (self.ended or self.summed)"),
    "sums are the end": ("return self.ended or self.summed", "return self.summed or self.ended"),
    "who has no end never ran": ("return self.ended or self.summed", "return self.ended or self.begin"),
    "each unit has all its time": ("scale // count * (later", "scale * (later"),
    "what waited ahead is forgotten": ("waiting = times[0] - start", "waiting = 0"),
    "gaps are nobody's": ("waiting += 0 if count else later - time", "waiting += 0"),
    "the last unit of a job counts": ("found[unit.job] += passed", "found[unit.job] = passed"),
    "jobs begin with their last unit": ("min(begins[unit.job], unit.begin)", "unit.begin"),
    "times from who runs": ("start = min(min(unit.taken, unit.ready) for unit in units)", "start = times[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTANTS[name]
    source = Path(walk_trace.__file__).read_text()
    assert source.count(old) == 1
    module = types.ModuleType("inception_fast.measure.walk_trace_spoilt")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(old, new), name, "exec"), vars(module))
    try:
        right = fits(module, range(40))
    except (module.NotTraced, ZeroDivisionError):
        right = False
    assert not right


@pytest.mark.parametrize(
    ("units", "jobs", "said"),
    [
        ([Unit(0, 1, 2, 3, 4), Unit(1, 0, 0, 0, 0)], 2, r"marks \(0, 0, 0, 0\) of unit 1, of job 1; allowed: those"),
        ([Unit(0, 5, 6, 0, 0)], 1, r"marks \(5, 6, 0, 0\) of unit 0"),
        ([Unit(0, 5, 0, 7, 8)], 1, r"marks \(5, 0, 7, 8\) of unit 0"),
        ([Unit(0, 5, 6, 0, 4)], 1, r"marks \(5, 6, 0, 4\) of unit 0"),
        ([Unit(0, 5, 6, 9, 8)], 1, r"marks \(5, 6, 9, 8\) of unit 0"),
        ([ran(0, 1, 2)], 2, "units of 1 jobs, up to 0; allowed: of each of 2"),
        ([ran(0, 1, 2), ran(2, 1, 2)], 2, "units of 2 jobs, up to 2; allowed: of each of 2"),
        ([], 0, "units of 0 jobs, up to -1; allowed: of each of 0"),
    ],
)  # fmt: skip
def test_what_no_whole_run_leaves_is_refused(units: list[Unit], jobs: int, said: str) -> None:
    with pytest.raises(NotTraced, match=said):
        shares(units, jobs)


def walk_layer() -> Layer:
    return layer_of(Work("a walk", "walk", (1, 16, 1, 1), 3000, 300), 0.25e-3, 0.01e-3, 1e-3, PEAK)


STEPS = [Work("first", "conv", (1, 8, 4, 4), 2000, 200), Work("second", "pool", (1, 16, 1, 1), 1000, 100)]


def runs(scale: int = 1000) -> list[Shares]:
    """Of 90 and of 180 units of time by marks, of which both steps have twice as much in the second."""
    first = [ran(0, 10, 60), ran(1, 70, 100)]
    second = [ran(0, 10, 110), ran(1, 130, 190)]
    return [shares([Unit(u.job, *(scale * mark for mark in u[1:])) for u in run], 2) for run in (first, second)]


def test_rows_of_steps_are_the_walks_time_together() -> None:
    walk = walk_layer()
    rows = steps_of_walk(walk, STEPS, runs(), PEAK)
    first, second, waiting, launch = rows
    assert [row.layer for row in rows] == ["first", "second", "a walk: waiting", "a walk: launch"]
    assert [row.ms for row in rows] == pytest.approx([0.075, 0.045, 0.015, 0.115])
    for name in ("ms", "share", "flops"):
        assert sum(getattr(row, name) for row in rows) == pytest.approx(getattr(walk, name), rel=1e-12)
    assert {row.walk for row in rows} == {"a walk"}
    assert [row.iqr_ms for row in rows] == pytest.approx([0.025, 0.015, 0.005, 0.01])
    assert (first.begin_ms, first.end_ms) == pytest.approx((0, 0.075))
    assert (second.begin_ms, second.end_ms) == pytest.approx((0.09, 0.135))
    assert {row.begin_ms for row in (waiting, launch)} == {row.end_ms for row in (waiting, launch)} == {None}
    assert (first.kind, first.shape, first.bytes) == ("conv", (1, 8, 4, 4), 200)
    assert first.gflops == pytest.approx(2000 / 0.075e-3 / 1e9)
    assert first.roof_share == pytest.approx(PEAK.roof(2000, 200) / 0.075e-3)
    for row in (waiting, launch):
        assert (row.kind, row.flops, row.bytes, row.roof_share) == (row.layer.split(": ")[1], 0, 0, 0)


def test_marks_further_apart_than_the_walk_took_are_scaled() -> None:
    """Leaving them takes time; the rows are the measured time all the same."""
    rows = steps_of_walk(walk_layer(), STEPS, runs(10_000), PEAK)
    assert [row.ms for row in rows] == pytest.approx([0.25 * part / 135 for part in (75, 45, 15, 0)])
    assert sum(row.ms for row in rows) == pytest.approx(0.25, rel=1e-12) and all(row.ms >= 0 for row in rows)
    assert rows[1].end_ms == pytest.approx(0.25)
    nothing = shares([ran(0, 5, 5), ran(1, 5, 5)], 2)
    assert [row.ms for row in steps_of_walk(walk_layer(), STEPS, [nothing], PEAK)] == [0, 0, 0, 0.25]


def test_a_trace_has_the_walk_and_its_steps_beside_each_other() -> None:
    """A layer, a walk of three steps of which two overlap, and what waits for it."""
    units = [ran(0, 10_000, 60_000), ran(1, 30_000, 90_000), ran(2, 90_000, 110_000)]
    walk = walk_layer()
    steps = steps_of_walk(walk, [*STEPS, Work("third", "conv", (1,), 1, 1)], [shares(units, 3)], PEAK)
    stem, head = (layer_of(Work(name, "conv", (1,), 1, 1), 1e-3, 0, 1, PEAK) for name in ("stem", "head"))
    found = trace([stem, *steps, head], "a network", [(), (0,), (1,)], [0, 1, 0], [walk])
    bars = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert [(bar["name"], bar["ts"], bar["dur"], bar["tid"]) for bar in bars] == [
        ("stem", 0, pytest.approx(1000), 0),
        ("a walk", pytest.approx(1000), pytest.approx(250), 1),
        ("head", pytest.approx(1250), pytest.approx(1000), 0),
        ("first", pytest.approx(1000), pytest.approx(50), 2),
        ("second", pytest.approx(1020), pytest.approx(60), 3),
        ("third", pytest.approx(1080), pytest.approx(20), 2),
    ]
    named = {event["tid"]: event["args"]["name"] for event in found["traceEvents"] if event["name"] == "thread_name"}
    assert named == {0: "stream 0", 1: "stream 1", 2: "in walks 0", 3: "in walks 1"}
    assert bars[3]["args"]["walk"] == "a walk" and bars[3]["args"]["ms"] == pytest.approx(0.035)
