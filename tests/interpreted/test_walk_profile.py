"""The profile of a network that is a walk, by its steps, over plain loops that leave marks and with a clock of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import abi, loader
from torch import Tensor

import inception_fast
import numerics
from hopper_library import emulated, launched, stub_file
from inception_fast.cli import main
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.engine.gpu_segment import Segment
from inception_fast.engine.runner import OptimizedModule
from inception_fast.engine.session import Session
from inception_fast.measure import gpu_profiler
from inception_fast.measure.roofline import Peak
from inception_fast.measure.walk_trace import shares, traced

from .maps import DEVICE
from .test_hopper_walk_plan import compiled, made

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")

PEAK = Peak(1e12, 1e11, "nothing", "float16", 0)
SECONDS = 1e-6  # of a walk, and nine tenths of that of another task


def timed(segment: Segment) -> list[tuple[str, float]]:
    segment._in_order()
    return [(task.name, SECONDS if task.walk else 0.9 * SECONDS) for task in segment.plan.tasks]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[OptimizedModule, Tensor]:
    """A network, all but its first convolution one walk, of whose jobs each runs for 2 ns in every 10."""
    monkeypatch.setattr(loader, "FILE", stub_file())
    monkeypatch.setattr(Segment, "_timed", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    x = numerics.random(1, 3, 39, 35)
    session = Session(made(), (x,), {}, "cuda", "float16")
    session.plan([x])
    launched()
    return OptimizedModule(session), x


def walk_task(fast: OptimizedModule, x: Tensor) -> Any:
    return next(task for _, task in gpu_profiler.tasks_of(fast, x) if task.walk is not None)


def test_the_rows_of_a_walk_are_its_steps(small: tuple[OptimizedModule, Tensor]) -> None:
    fast, x = small
    before = fast(x)
    found = gpu_profiler.profile(fast, x, PEAK, rounds=3)
    task = walk_task(fast, x)
    jobs = len(task.walk.members)
    first, *steps, waiting, launch = found.layers
    assert [row.layer for row in steps] == [step.name for step in task.steps] and len(steps) == jobs > 15
    assert (first.walk, waiting.layer, launch.layer) == ("", f"{task.name}: waiting", f"{task.name}: launch")
    assert {row.walk for row in (*steps, waiting, launch)} == {task.name} and not any(row.note for row in found.layers)
    (walk,) = found.walks
    assert (walk.layer, walk.kind, walk.ms) == (task.name, "walk", 1e3 * SECONDS)
    span = 10 * jobs - 7
    assert [row.ms for row in steps] == pytest.approx([2e-6] * jobs)
    assert waiting.ms == pytest.approx(1e-6 * (span - 2 * jobs)) and launch.ms == pytest.approx(1e-3 - 1e-6 * span)
    assert sum(row.ms for row in (*steps, waiting, launch)) == pytest.approx(walk.ms, rel=1e-12)
    assert sum(row.share for row in found.layers) == pytest.approx(1) and found.steps_ms == pytest.approx(1.9e-3)
    assert sum(row.flops for row in steps) == walk.flops and sum(row.bytes for row in steps) == walk.bytes
    for row, needs in zip(steps, task.walk.needs, strict=True):
        assert row.begin_ms is not None and row.end_ms == pytest.approx(row.begin_ms + 2e-6)
        assert all(steps[need].end_ms < row.begin_ms for need in needs)  # type: ignore[operator]
    assert set(found.by_kind()) == {"conv", "pool", "waiting", "launch"}
    assert torch.equal(fast(x), before)


def test_marks_are_left_in_calls_of_their_own(small: tuple[OptimizedModule, Tensor]) -> None:
    """Two calls untimed, three timed twice, one and three with marks, on the same data; then all is as it was."""
    fast, x = small
    fast(x)
    executable, _ = fast._session.executable([x])
    before = [list(launches) for launches in executable.segments[0].launches]
    launched()
    gpu_profiler.profile(fast, x, PEAK, rounds=3)
    assert [name for _, name, *_ in launched()].count("walk") == 2 + 2 * 3 + 1 + 3
    after = executable.segments[0].launches
    assert all(a is b for mine, theirs in zip(before, after, strict=True) for a, b in zip(mine, theirs, strict=True))


def test_a_network_whose_memory_is_gone_is_not_traced(small: tuple[OptimizedModule, Tensor]) -> None:
    fast, x = small
    fast(x)
    executable: Any = fast._session.executable([x])[0]
    assert executable.segments and executable.release() and not executable.segments
    assert gpu_profiler.traced_walks(fast, x, 1) == {1: "the network's memory was given up to others meanwhile"}


def refuse(*ignored: Any) -> Any:
    raise RuntimeError("a trace at 7;\nallowed: multiples of 8")


@pytest.mark.parametrize(
    ("name", "value", "note"),
    [
        ("walk_traces", False, "stub.so leaves no traces of walks; build the package anew"),
        ("traced_walk", refuse, "a trace at 7; allowed: multiples of 8"),
        ("traced_walk", lambda blob, trace: blob, "marks (0, 0, 0, 0) of unit 0, of job 0; allowed: those of a run"),
        ("walk_units", lambda jobs, blocks: [0] * len(jobs), "units of 1 jobs, up to 0; allowed: of each of "),
    ],
    ids=("an older library", "a library that refuses", "no marks", "other units"),
)
def test_without_a_trace_the_row_says_why(
    small: tuple[OptimizedModule, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, value: Any, note: str,
) -> None:  # fmt: skip
    from inception_fast.cli import profile as command

    fast, x = small
    monkeypatch.setattr(loader.library(), name, value)
    found = gpu_profiler.profile(fast, x, PEAK, rounds=1)
    assert [row.kind for row in found.layers] == ["conv", "walk"] and not found.walks
    assert found.layers[1].ms == 1e3 * SECONDS and found.layers[1].note.startswith(note)
    command._show(found, PEAK, 25)
    assert f"{walk_task(fast, x).name}: one row, without its steps: {note}" in capsys.readouterr().out


def test_a_library_without_traces_walks_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one has the walk's functions alone."""
    monkeypatch.setattr(abi, "TRACE_FUNCTIONS", {"hopper_walk_history": abi.TRACE_FUNCTIONS["hopper_walk_traced"]})
    older = loader.Library(stub_file())
    assert older.walk_columns and not older.walk_traces
    monkeypatch.undo()
    assert loader.Library(stub_file()).walk_traces


def test_the_command_names_the_layers_of_a_walk(
    small: tuple[OptimizedModule, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """As on a GPU, whose tensors are here those of the CPU."""
    fast, _ = small
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, *rest, **more: x if rest == ("cuda",) else to(x, *rest, **more))
    monkeypatch.setattr(inception_fast, "backend_status", lambda: {"triton": True, "cpu": None})
    monkeypatch.setattr(inception_fast, "optimize", lambda *ignored, **options: fast)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu_profiler, "measure_gpu_peak", lambda *ignored: PEAK)
    asked = ["profile", f"{made.__module__}:made", "--input", "3,39,35", "--device", "cuda", "--dtype", "float16"]
    assert main([*asked, "--rounds", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "profile.json").read_text())
    (walk,) = document["walks"]
    assert f"{walk['layer']}: 0.0010 ms in one launch, shared out to its steps" in out and "one row" not in out
    assert f"--nvtx-include '{walk['layer']}/'" in out, "the dearest launch, though no row of its steps is dearer"
    names = [row["layer"] for row in document["rows"]]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    bars = {bar["name"]: bar for bar in events if bar["ph"] == "X"}
    assert set(bars) == {*names[:-2], walk["layer"]} and names[-2:] == [
        f"{walk['layer']}: {kind}" for kind in ("waiting", "launch")
    ]
    begin = bars[walk["layer"]]["ts"]
    for row in document["rows"][1:-2]:
        bar = bars[row["layer"]]
        assert bar["ts"] == pytest.approx(begin + 1e3 * row["begin_ms"]) and bar["tid"] > bars[walk["layer"]]["tid"]
        assert bar["ts"] + bar["dur"] <= begin + 1e3 * walk["ms"] and bar["args"]["walk"] == walk["layer"]


def test_marks_of_the_kernels_own_source_are_shared_out() -> None:
    """Units of several jobs run at once on the emulated device; all of them are in the walk's time."""
    x, executable, _ = compiled(made(), 1, Hopper(emulated(), DEVICE, always=True))
    executable.run([x])
    position = next(j for j, task in enumerate(executable.plan.tasks) if task.walk is not None)
    (launch,) = executable.segments[0].launches[position]
    units = traced(launch)  # type: ignore[arg-type]
    found = shares(units, len(launch.kept[0]))  # type: ignore[attr-defined]
    assert len(units) > len(found.jobs) and all(part > 0 for part in found.jobs)
    assert sum(found.jobs) + found.waiting == found.span
    overlapping = sum(end - begin for begin, end in zip(found.begins, found.ends, strict=True))
    assert overlapping > found.span, "nothing ran beside anything"
