"""What the measuring queue says of a network's walk, over plain loops and with clocks that stand still."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import loader, walk
from torch import Tensor, nn

import numerics
from hopper_library import launched, stub_file
from inception_fast.engine import gpu_walk
from inception_fast.engine.session import Session
from queue_modules import loaded

from .maps import DEVICE
from .test_hopper_walk_plan import DEEP, made

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")
ABOUT = {"model": "small", "batch": 1, "dtype": "float16"}


class Event:
    """Of a clock by which 50 runs take 3 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 3.0


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with a small network, sessions on the CPU, and calls run once in place of being timed."""

    def once(calls: Mapping[str, Callable[[], Any]], **options: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1e-3, 2e-3, 3e-3] for name in calls}

    def optimize(net: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> Callable[[Tensor], Tensor]:
        session = Session(net, (x,), {}, backend, str(dtype).removeprefix("torch."))
        session.plan([x])
        disabled = gpu_walk._disabled.get()

        def call(x: Tensor) -> Tensor:
            with gpu_walk.disabled() if disabled else contextlib.nullcontext():
                return session((x,), {})

        return call

    with loaded("walks") as modules:
        module = modules["walks"]
        for name in ("host_seconds", "device_seconds"):
            monkeypatch.setattr(module, name, once)
        monkeypatch.setattr(module, "network_of", lambda model, n: (network(), numerics.random(n, 3, 39, 35)))
        monkeypatch.setattr(module, "REPLAYS", 1)
        monkeypatch.setattr(module.fast, "optimize", optimize)
        monkeypatch.setattr(gpu_walk, "WALK_BATCH", 1)  # which the job raises
        monkeypatch.setattr(loader, "FILE", stub_file())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        launched()
        yield module


def network() -> nn.Module:
    return copy.deepcopy(made())


def test_a_walk_is_compared_timed_cut_anew_and_traced(walks: Any) -> None:
    first, timed, *later = ([dict(row) for row in rows] for rows in walks.walk_rows("small", 1, "float16"))
    rows = later[-1]
    assert all(row | ABOUT == row and row["status"] == "ok" for row in rows)
    assert first == rows[:1] and timed == rows[:3] and rows[0]["walks"] == 1
    assert 0 <= rows[0]["rel_difference"] < walks.ALIKE
    assert [row["runtime"] for row in timed] == ["ours", "walk", "separate"]
    assert all(row[clock]["median_ms"] == 2.0 for row in timed[1:] for clock in ("host", "device_cold"))
    cuts = [row for row in rows if "cut" in row and "job" not in row]
    assert [row["cut"] for row in cuts] == list(walks.CUTS) and {row["alone_us"] for row in cuts} == {3e3}
    jobs = [row for row in rows if row.get("walk") == "as made"]
    traced = [row["walk"] for row in rows if "job" in row]
    assert list(dict.fromkeys(traced)) == ["as made", *(name for name in walks.CUTS if name in walks.TRACED)]
    ran = [count for count, name, *_ in launched() if name == "walk"]
    assert len(rows) == 3 + len(cuts) + 3 * len(jobs) and set(ran) == {len(jobs)}
    assert len(ran) == 3 + 7 * len(cuts) + 3 * 2, "checked, timed twice, compared and replayed by every cut, traced"
    assert [row["job"] for row in jobs] == list(range(len(jobs)))
    results = {"walk/small/1/float16": {"status": "ok", "rows": rows}}
    (choice,) = importlib.import_module("ship").walks_of({"machine": {"name": "a GPU"}, "results": results})
    assert choice.shape == gpu_walk.shape_of("float16", 1, len(jobs)), "not of each cut that is traced"
    for row in jobs:
        pool = row["cut"] is None
        assert pool == row["spec"].startswith("PoolSpec") == (row["summed_us"] is None)
        assert row["units"] == 1 and row["last_ready_us"] == row["ready_us"] < row["ended_us"]
        assert pool or row["ready_us"] < row["summed_us"] < row["ended_us"]
        assert all(jobs[need]["ended_us"] <= row["ready_us"] for need in row["needs"]), "no job before what it needs"


@pytest.mark.parametrize("why", ("numbers", "no walk"))
def test_a_wrong_walk_is_said_and_not_timed(walks: Any, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """One that does nothing leaves NaN, which is alike to nothing; a plan without a walk compares nothing. JSON, which
    has no NaN, holds either row.
    """
    if why == "numbers":
        monkeypatch.setattr(loader.Library, "launch_walk", lambda *ignored: None)
    else:
        monkeypatch.setattr(gpu_walk, "WALK_LEAST", 1000)
    ((row,),) = walks.walk_rows("small", 1, "float16")
    assert row["status"] == "wrong" and row["walks"] == (why == "numbers")
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["rel_difference"] is not None) == (why == "no walk")


def test_a_cut_whose_results_are_infinite_is_a_wrong_row_among_the_others(
    walks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.0, float("inf")])
    monkeypatch.setattr(walks, "difference", lambda *ignored: next(found, 0.0))
    *_, rows = walks.walk_rows("small", 1, "float16")
    cuts = {row["cut"]: (row["status"], row["rel_difference"]) for row in rows if "cut" in row and "job" not in row}
    assert list(cuts.values()) == [("ok", 0.0), ("wrong", None), *[("ok", 0.0)] * (len(walks.CUTS) - 2)]
    json.dumps(rows, allow_nan=False)


def test_other_cuts_are_other_cuts_of_the_same_numbers(walks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits where they cost nothing, none where they cost a second; on the same memory, and constants as before."""
    monkeypatch.setattr(walk, "LEAST_STEPS", 1)
    monkeypatch.setattr(walk, "PART_SECONDS", 0.0)
    (net, x), before_all = walks.network_of("small", 1), gpu_walk.launch
    with walks.Made().recorded() as seen:
        y = walks.fast.optimize(net, x, dtype=torch.float16, backend="cuda")(x)
    ((*_, launch),) = seen.walks
    assert isinstance(launch, walk.WalkLaunch) and gpu_walk.launch is before_all and y.isfinite().all()
    before = walk.SPLIT_SECONDS
    _, several = walks.remade(seen.walks[0], (32,), 0.0, {})
    _, none = walks.remade(seen.walks[0], (64,), walks.NEVER, {"ahead": True, "halo": True})
    cuts = [[job.cut for job in made.kept[0] if job.cut] for made in (launch, several, none)]
    assert walk.SPLIT_SECONDS == before and len({tuple(one) for one in cuts}) == 3
    assert {cut.columns for cut in cuts[1]} == {32} and max(cut.splits for cut in cuts[1]) > 1
    assert set(cuts[2]) == {walk.Cut(64, 1, True), walk.Cut(64, 1, True, True)}
    last, arena = launch.kept[0][-1].work.targets[0].y, launch.kept[0][0].work.x.data.untyped_storage()
    before_it, results = arena.clone(), []
    for one in (launch, several, none):
        assert [job.needs for job in one.kept[0]] == [job.needs for job in launch.kept[0]]
        arena.copy_(before_it)  # later jobs wrote over what the first ones read
        last.data.fill_(float("nan"))
        one.run()
        results.append(last.data[: last.c].double())
    assert all(numerics.rel_l2(one, results[0]) <= DEEP for one in results[1:]) and results[0].isfinite().all()
