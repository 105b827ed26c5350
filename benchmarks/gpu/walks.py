"""The walk of a network: whether it is right, what it takes beside separate launches, where its time goes,
and what other cuts of its convolutions would take.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from inception_fast.kernels.cuda import walk
from inception_fast.kernels.plan import ConvStep
from networks import ended_after, network_of
from timing import device_seconds, host_seconds, summary
from torch import Tensor

import inception_fast as fast
from inception_fast.engine import gpu_walk
from inception_fast.measure.compare import calibrate
from inception_fast.measure.walk_trace import Unit, shares, traced

PATIENCE = 60.0  # to make and prove the network
REPLAYS = 50  # of a walk alone, one behind the other
ALIKE = 0.02  # of the separate launches' logits, relative L2: both round every layer to 16 bits
NEVER = 1.0  # seconds that a split costs where none is wanted
# What each other cut of all convolutions is called: widths of tiles, none where each keeps its own, seconds of a split,
# and what else differs from copies of x for each tap where a convolution can have it.
CUTS: dict[str, tuple[tuple[int, ...], float, dict[str, bool]]] = {
    "as shipped": ((), walk.SPLIT_SECONDS, {}),
    "x for each tap": ((32, 64), walk.SPLIT_SECONDS, {}),
    "halo": ((32, 64), walk.SPLIT_SECONDS, {"halo": True}),
    "32 columns, halo": ((32,), walk.SPLIT_SECONDS, {"halo": True}),
    "weights ahead": ((32, 64), walk.SPLIT_SECONDS, {"ahead": True}),
    "halo, weights ahead": ((32, 64), walk.SPLIT_SECONDS, {"ahead": True, "halo": True}),
    "64 columns, halo, weights ahead": ((64,), walk.SPLIT_SECONDS, {"ahead": True, "halo": True}),
    "no splits": ((32, 64), NEVER, {}),
    "splits at 1 us": ((32, 64), 1e-6, {}),
    "splits at 4 us": ((32, 64), 4e-6, {}),
    "32 columns": ((32,), walk.SPLIT_SECONDS, {}),
    "64 columns": ((64,), walk.SPLIT_SECONDS, {}),
}
TRACED = ("x for each tap", "64 columns")  # of these, beside the walk as it is


class Made:
    """The walks that plans make inside, with what they were made of, so that they can be made again in other ways."""

    def __init__(self) -> None:
        self.walks: list[tuple[Any, gpu_walk.Walk, Any, walk.WalkLaunch]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Made]:
        before = gpu_walk.launch

        def launch(hopper: Any, made: gpu_walk.Walk, place: Any) -> walk.WalkLaunch:
            one = before(hopper, made, place)
            self.walks.append((hopper, made, place, one))
            return one

        gpu_walk.launch = launch
        try:
            yield self
        finally:
            gpu_walk.launch = before


def walk_rows(model: str, n: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """The network with walks, at batches that have none as well, and without, then the walk alone by every cut of
    `CUTS`, then each job of the walk as it is and by the cuts of `TRACED`.
    """
    kind = getattr(torch, dtype)
    net, x = network_of(model, n)
    calibrate(net, x[:1].cpu().expand(2, -1, -1, -1))
    gpu_walk.WALK_BATCH = max(gpu_walk.WALK_BATCH, n)  # of this process
    with ended_after(PATIENCE), torch.no_grad():
        with gpu_walk.disabled():
            apart = fast.optimize(net, x, dtype=kind, backend="cuda")
        with Made().recorded() as made:
            whole = fast.optimize(net, x, dtype=kind, backend="cuda")
            found, wanted = whole(x), apart(x)
        error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    about: dict[str, Any] = {"model": model, "batch": n, "dtype": dtype}
    status = "ok" if error < ALIKE and made.walks else "wrong"
    first = {**about, "runtime": "ours", "status": status, **rel_difference(error), "walks": len(made.walks)}
    yield [first]
    if status != "ok":
        return
    calls: dict[str, Callable[[], Tensor]] = {"walk": lambda: whole(x), "separate": lambda: apart(x)}
    with torch.no_grad():
        host, device = host_seconds(calls, rounds=51), device_seconds(calls)
    rows = [first]
    for name in calls:
        times = {"host": summary(host[name]), "device_cold": summary(device[name])}
        rows.append({**about, "runtime": name, "status": "ok", **times})
    yield rows
    others = {"as made": [(one[1], one[3]) for one in made.walks]}
    maps = [_arena(one[3]).clone() for one in made.walks]  # what runs one behind the other leave is no image any more
    for name, cut in CUTS.items():
        pairs = [remade(one, *cut) for one in made.walks]
        each = zip(made.walks, pairs, maps, strict=True)
        apart = max(difference(one[3], launch, before) for one, (_, launch), before in each)
        row = {**about, "cut": name, "status": "ok" if apart < ALIKE else "wrong", **rel_difference(apart)}
        rows.append({**row, "alone_us": replayed([launch for _, launch in pairs])})
        yield rows
        others |= {name: pairs} if name in TRACED else {}
    for name, pairs in others.items():
        rows += [{**about, "status": "ok", "walk": name, **row} for pair in pairs for row in jobs_of(*pair)]
        yield rows


def remade(
    one: tuple[Any, gpu_walk.Walk, Any, walk.WalkLaunch],
    widths: Sequence[int],
    split: float,
    changes: dict[str, bool],
) -> tuple[gpu_walk.Walk, walk.WalkLaunch]:
    """The same walk on the same memory with its convolutions cut as the model says with these constants, and so changed
    where they can be. Rows of x stay only where there are taps to read them again.
    """
    hopper, made, place, _ = one
    blocks, before = walk.blocks_of(hopper.device), walk.SPLIT_SECONDS

    def cut(member: gpu_walk.Member) -> gpu_walk.Member:
        if member.cut is None or not widths:
            return member
        assert isinstance(member.step, ConvStep)
        spec = gpu_walk.spec_of(member.step)
        found = walk.cut(spec, widths, blocks)
        for name, value in changes.items():
            other = found._replace(**{name: value})
            able = not walk.conv_reasons(hopper.kernels, spec, gpu_walk.columns_of(member.step), other)
            found = other if able and not (name == "halo" and spec.kh * spec.kw == 1) else found
        return replace(member, cut=found)

    walk.SPLIT_SECONDS = split
    try:
        other = replace(made, members=tuple(map(cut, made.members)))
    finally:
        walk.SPLIT_SECONDS = before
    return other, gpu_walk.launch(hopper, other, place)


def _arena(launch: walk.WalkLaunch) -> torch.UntypedStorage:
    """The memory of the maps."""
    return launch.kept[0][0].work.x.data.untyped_storage()


def difference(first: walk.WalkLaunch, other: walk.WalkLaunch, before: torch.UntypedStorage) -> float:
    """Of the last results of two cuts of one walk, relative L2, each with its maps as they were."""
    work = first.kept[0][-1].work
    last, results = (work.y if isinstance(work, walk.Pooling) else work.targets[0].y).data, []
    for one in (first, other):
        _arena(first).copy_(before)  # later jobs write over what the first ones read
        last.fill_(float("nan"))
        one.run()
        results.append(last.double())
    wanted, found = results
    return float((found - wanted).nan_to_num(0).norm() / wanted.nan_to_num(0).norm()) if _alike_nan(*results) else 1.0


def rel_difference(off: float) -> dict[str, float | None]:
    """As a row has it: JSON has no word for what is not finite, with which the job would end and lose its rows."""
    return {"rel_difference": off if math.isfinite(off) else None}


def _alike_nan(wanted: Tensor, found: Tensor) -> bool:
    """Whether the same elements were written: those between the channels of a map are nobody's."""
    return bool((wanted.isnan() == found.isnan()).all())


def replayed(launches: Sequence[walk.WalkLaunch]) -> float:
    """Microseconds of one run, of several in a row in which each begins behind the one before."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(5):
        begin.record()
        for _ in range(REPLAYS):
            for one in launches:
                one.run()
        end.record()
        end.synchronize()
        best = min(best, 1e3 * begin.elapsed_time(end) / REPLAYS)
    return best


def jobs_of(made: gpu_walk.Walk, launch: walk.WalkLaunch) -> list[dict[str, Any]]:
    """Of each job: its units and its share of the walk's time, and microseconds from the walk's first mark to when its
    first unit was ready, its last sums were there, its last unit had ended; and of a unit, medians, what it waited for
    its turn, from ready to sums, from sums to end.
    """
    units = traced(launch)
    start = min(min(unit.taken, unit.ready) for unit in units)
    parts = shares(units, len(made.members)).jobs
    by_job: dict[int, list[Unit]] = {}
    for unit in units:
        by_job.setdefault(unit.job, []).append(unit)
    rows = []
    for job, member in enumerate(made.members):
        mine = by_job[job]
        ready = [u.ready for u in mine]
        summed, ended = [u.summed for u in mine if u.summed], [u.ended for u in mine if u.ended]
        row = {
            "job": job, "name": member.step.name, "needs": list(made.needs[job]), "units": len(mine),
            "cut": list(member.cut) if member.cut else None, "spec": str(member.step.spec),
            "share_us": float(parts[job]) / 1e3,
            "ready_us": (min(ready) - start) / 1e3, "last_ready_us": (max(ready) - start) / 1e3,
            "summed_us": (max(summed) - start) / 1e3 if summed else None, "ended_us": (max(ended) - start) / 1e3,
            "multiply_us": median([(u.summed - u.begin) / 1e3 for u in mine if u.summed]),
            "store_us": median([(u.ended - (u.summed or u.ready)) / 1e3 for u in mine if u.ended]),
        }  # fmt: skip
        rows.append(row)
    return rows


def median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
