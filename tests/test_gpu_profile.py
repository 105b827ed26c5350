"""The profile on a GPU as far as a machine without one can tell: its rows, its trace, its command lines."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inception_fast.kernels.plan import Buffer, ConvStep, EltwiseStep, Output, View
from inception_fast.kernels.spec import ConvSpec

from inception_fast.cli import main
from inception_fast.engine import gpu_segment
from inception_fast.engine.gpu_segment import Segment
from inception_fast.measure import gpu_profiler
from inception_fast.measure.profiler import Layer, layers_of, work_of
from inception_fast.measure.roofline import Peak
from inception_fast.measure.trace import trace

PEAK = Peak(1e12, 1e11, "nothing", "float16", 0)


class Event:
    """A device whose clock moves a millisecond at every mark."""

    marks = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self) -> None:
        Event.marks += 1
        self.at = Event.marks

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return float(later.at - self.at)


def task(name: str, needs: tuple[int, ...] = (), stream: int = 0) -> Any:
    spec = ConvSpec(2, 4, 4, 8, 16, 1, 1, dtype="float16")
    zeros: Any = None
    step: Any = ConvStep(name, spec, View(0, 0, 8), zeros, zeros, zeros, (Output(View(1, 0, 16), True),))
    if name == "copy":
        step = EltwiseStep(name, View(1, 0, 16), View(1, 0, 16))
    return SimpleNamespace(name=name, step=step, needs=needs, stream=stream)


BUFFERS = (Buffer(2, 4, 4, 8, "arena", 0, "float16"), Buffer(2, 4, 4, 16, "arena", 0, "float16"))
TASKS = [task("stem"), task("left", (0,)), task("right", (0,), 1), task("copy", (1, 2))]


def plan(*tasks: Any) -> Any:
    return SimpleNamespace(tasks=tasks, plan=SimpleNamespace(buffers=BUFFERS), device=torch.device("cuda"))


def rows() -> tuple[Layer, ...]:
    work = [work_of(one.step, BUFFERS) for one in TASKS]
    return layers_of(work, [[1e-3, 2e-3, 3e-3, 1e-3]] * 3, PEAK)


def test_tasks_are_timed_under_ranges_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a busy device, or the host's launches would count as the first one's time."""
    said: list[Any] = []
    monkeypatch.setattr(torch.cuda, "_sleep", said.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("end"))
    segment = Segment.__new__(Segment)
    segment.plan, segment.inputs = plan(*TASKS), []
    segment.launches = [[SimpleNamespace(run=lambda one=one: said.append(f"run {one.name}"))] for one in TASKS]  # type: ignore[misc,list-item]
    seconds: list[tuple[str, float]] = []
    segment.run([], seconds)
    assert seconds == [(one.name, 1e-3) for one in TASKS]
    busy, *ran = said
    assert busy == len(TASKS) * gpu_segment.LAUNCH_CYCLES
    assert ran == [word for one in TASKS for word in (one.name, f"run {one.name}", "end")]


def test_work_is_counted_by_the_specs() -> None:
    stem, *_, copy = rows()
    spec = TASKS[0].step.spec
    assert (stem.flops, stem.bytes, stem.shape, stem.kind) == (spec.flops(), spec.bytes(), (2, 16, 4, 4), "conv")
    assert (copy.kind, copy.bytes) == ("eltwise", 2 * 2 * 2 * 4 * 4 * 16)
    assert stem.share == pytest.approx(1 / 7) and stem.peak_share == pytest.approx(spec.flops() / 1e-3 / 1e12)


def test_branches_lie_beside_each_other_in_the_trace() -> None:
    """stem, then left and right at once, then what needs both; a second plan waits for all of the first."""
    first, second = plan(*TASKS[:3]), plan(TASKS[0])
    needs, lanes = gpu_profiler.schedule([*((first, one) for one in TASKS[:3]), (second, TASKS[0])])
    assert needs == [[], [0], [0], [0, 1, 2]] and lanes == [0, 0, 1, 0]
    found = trace(rows(), "a network", [(), (0,), (0,), (1, 2)], [0, 0, 1, 0])
    bars = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert [(bar["name"], bar["ts"], bar["dur"], bar["tid"]) for bar in bars] == [
        ("stem", 0, pytest.approx(1000), 0),
        ("left", pytest.approx(1000), pytest.approx(2000), 0),
        ("right", pytest.approx(1000), pytest.approx(3000), 1),
        ("copy", pytest.approx(4000), pytest.approx(1000), 0),
    ]
    alone = [event["ts"] for event in trace(rows(), "a network")["traceEvents"] if event["ph"] == "X"]
    assert alone == pytest.approx([0, 1000, 3000, 6000])
    assert bars[0]["args"]["flops"] and found["traceEvents"][0]["args"]["name"] == "a network"


def test_the_command_lines_are_whole() -> None:
    found = gpu_profiler.commands(["profile", "inception_v3", "--device", "cuda", "--json"], "Mixed_5b.branch 1x1")
    assert found["nsys"] == (
        "nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --output=profile "
        "inception-fast profile inception_v3 --device cuda --once"
    )
    words = shlex.split(found["ncu"])
    assert words[words.index("--nvtx-include") + 1] == "Mixed_5b.branch 1x1/" and words[-1] == "--once"
    assert words[:5] == ["ncu", "--profile-from-start", "off", "--set", "full"]


def test_the_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(gpu_profiler, "SIDE", 64)
    monkeypatch.setattr(gpu_profiler, "COPIED", 1 << 16)
    monkeypatch.setattr(gpu_profiler, "SECONDS", 0.0)
    before = torch.backends.cuda.matmul.allow_tf32
    peak = gpu_profiler.measure_gpu_peak("bfloat16", torch.device("cpu"), tf32=not before)
    assert peak.flops == pytest.approx(2 * 64**3 / 1e-3) and peak.bytes == pytest.approx(2 * (1 << 16) / 1e-3)
    assert torch.backends.cuda.matmul.allow_tf32 is before
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # after which torch refuses to say what the older name holds
    try:
        gpu_profiler.measure_gpu_peak("bfloat16", torch.device("cpu"))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "float16"], "dtype float16 on cpu; allowed: float32, bfloat16"),
        (["--once"], "--once is for the profilers of GPUs"),
        (["--device", "cuda", "--once", "--out", "x"], "--once measures nothing; drop --out and --json"),
        (["--device", "tpu"], "'tpu' is not known; allowed: cpu, cuda"),
    ],
)
def test_wrong_requests_get_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["profile", "inception_v1", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be profiled")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "inception_v1", "--device", "cuda", "--image-size", "64"]) == 2
    assert "profile --device cuda cannot run here: " in capsys.readouterr().err
