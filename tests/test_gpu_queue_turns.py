"""What the measuring queue does side by side: jobs that prepare together and measure in turn; natives of elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from queue_modules import FOLDER, loaded

# Prepares for a while, measures twice, and writes when each began and ended.
JOB = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import turns
from pathlib import Path
spans = []
def span(kind, seconds):
    begin = time.monotonic()
    time.sleep(seconds)
    spans.append((kind, begin, time.monotonic()))
turns.join(Path(sys.argv[2]))
for _ in range(2):
    span('prepares', float(sys.argv[4]))
    with turns.alone():
        span('measures', 0.1)
Path(sys.argv[3]).write_text(json.dumps(spans))
"""
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import turns
from pathlib import Path
turns.join(Path(sys.argv[2]))
with turns.alone():
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    with loaded("store", "catalogue", "run", "work", "provenance", "turns", "timing", "networks", "natives") as modules:
        yield modules


def test_nobody_measures_beside_another(tmp_path: Path) -> None:
    """Preparing overlaps, measuring overlaps with nothing, and all of them end."""
    lock, files = tmp_path / "deep" / "turn", [tmp_path / f"{i}.json" for i in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", JOB, str(FOLDER), str(lock), str(file), str(0.1 + 0.1 * i)])
        for i, file in enumerate(files)
    ]
    assert [process.wait(60) for process in processes] == [0] * 3
    spans = [(i, *span) for i, file in enumerate(files) for span in json.loads(file.read_text())]
    measured = [span for span in spans if span[1] == "measures"]
    assert len(measured) == 6
    for who, _, begin, end in measured:
        others = [span for span in spans if span[0] != who]
        assert not [span for span in others if span[2] < end and begin < span[3]], "alone"
    prepared = sorted((span for span in spans if span[1] == "prepares"), key=lambda span: float(span[2]))
    assert any(b[2] < a[3] for a, b in pairwise(prepared)), "these need not wait for each other"


def test_a_turn_ends_with_its_process(tmp_path: Path) -> None:
    lock, file = tmp_path / "turn", tmp_path / "spans.json"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(FOLDER), str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiting = subprocess.Popen([sys.executable, "-c", JOB, str(FOLDER), str(lock), str(file), "0"])
    time.sleep(0.5)
    assert waiting.poll() is None and not file.exists(), "who joins waits for the turn to end"
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    holder.stdout.close()
    assert waiting.wait(30) == 0 and len(json.loads(file.read_text())) == 4


@pytest.fixture
def turn(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True at the end while somebody has the turn."""
    held = [False]

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        held.append(True)
        try:
            yield
        finally:
            held.append(False)

    for module in (queue["turns"], queue["timing"], queue["networks"]):
        monkeypatch.setattr(module, "alone", alone)
    return held


def test_times_are_taken_in_turn(queue: dict[str, Any], turn: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that warm as well: they would disturb who measures."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen = list[bool]()
    queue["timing"].host_seconds({"it": lambda: seen.append(turn[-1])}, rounds=2)
    assert seen == [True] * 5 and not turn[-1]


def test_a_profile_has_the_gpu_alone(queue: dict[str, Any], turn: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures in a process of its own, which has not joined."""
    seen = list[bool]()
    monkeypatch.setattr(queue["work"], "ran", lambda command, **home: seen.append(turn[-1]) or {"status": "failed"})
    assert queue["work"].profile("inception_v3", "1", "bfloat16") == {"status": "failed"} and seen == [True]


def test_kernels_that_hang_lose_their_turn(
    queue: dict[str, Any], turn: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer runs while a network's CUDA kernels are made, and while it is timed, not while the turn is waited for."""
    networks, log = queue["networks"], list[str]()

    @contextlib.contextmanager
    def ended_after(seconds: float) -> Iterator[None]:
        assert seconds == networks.CUDA_SECONDS
        log.append("timer in its turn" if turn[-1] else "timer")
        yield
        log.append("over")

    def checked_calls(makers: dict[str, Any], *about: Any) -> Any:
        (name,) = makers
        log.append(name)
        return {name: {"runtime": name, "status": "ok", "dtype": "bfloat16", "batch": 1}}, {}

    monkeypatch.setattr(networks, "ended_after", ended_after)
    monkeypatch.setattr(networks, "checked_calls", checked_calls)
    monkeypatch.setattr(networks, "network_calls", lambda *about: (dict.fromkeys(("ours", "graphs", "cuda")), None))
    list(networks.network_rows("m", 1, "bfloat16", cuda=True))
    assert log == ["ours", "graphs", "timer in its turn", "over", "timer", "cuda", "over", "timer in its turn", "over"]


def test_inductor_freezes_only_when_told(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    frozen, modes = list[bool](), list[str]()

    def compile_(module: Any, mode: str, dynamic: bool) -> Any:
        modes.append(mode)
        return lambda x: frozen.append(inductor.freezing) or x

    monkeypatch.setattr(torch, "compile", compile_)
    before = inductor.freezing
    for freezing in (True, False):
        call = queue["networks"].compiled(torch.nn.Identity(), torch.zeros(1), "reduce-overhead", freezing=freezing)
        assert frozen.pop() == freezing and inductor.freezing == before and float(call()) == 0
        frozen.clear()
    assert modes == ["reduce-overhead"] * 2


def test_who_has_not_joined_is_not_held_up(queue: dict[str, Any]) -> None:
    with queue["turns"].alone(), queue["turns"].alone():
        assert queue["turns"]._open is None


def test_a_job_joins_before_it_works(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But for the build, which nobody waits for; a call without a file to write measures nothing for the queue."""
    work, log = queue["work"], list[str]()
    monkeypatch.setattr(work, "end_with_parent", lambda: None)
    monkeypatch.setattr(work.turns, "join", lambda: log.append("joined"))
    for kind in ("build", "machine"):
        monkeypatch.setitem(work.WORK, kind, lambda kind=kind: log.append(kind) or {"status": "ok"})
    monkeypatch.setattr(work, "build", work.WORK["build"])
    for name, target in (("build", tmp_path / "b"), ("machine", tmp_path / "m"), ("machine", os.devnull)):
        assert work.main([name, str(target)]) == 0
    assert log == ["build", "joined", "machine", "machine"]


def test_results_name_files_of_the_checkout_and_no_path_of_the_machine(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = queue["work"]
    monkeypatch.setattr(work, "end_with_parent", lambda: None)
    monkeypatch.setattr(work.turns, "join", lambda: None)
    said = f'File "{work.ROOT}/benchmarks/gpu/work.py", line 1'
    monkeypatch.setitem(work.WORK, "machine", lambda: {"status": "failed", "note": said})
    assert work.main(["machine", str(tmp_path / "m")]) == 0
    assert json.loads((tmp_path / "m").read_text())["note"] == 'File "benchmarks/gpu/work.py", line 1'


def test_a_group_takes_as_long_as_its_longest_and_what_the_others_measure(queue: dict[str, Any]) -> None:
    store = queue["store"]
    jobs = [store.Job("build", 10, 20), store.Job("a", 50, 60, "x", 10), store.Job("b", 60, 90, "x", 20)]
    jobs += [store.Job("c", 30, 60, "x", 5), store.Job("d", 7, 9)]
    assert store.planned_seconds(jobs) == 10 + (60 + 10 + 5) + 7
    assert [[job.name for job in part] for part in store.plan_slices(jobs, 86)] == [
        ["build", "a", "b", "c"],
        ["build", "d"],
    ]
    with pytest.raises(ValueError, match="a takes about 85 s with build"):
        store.plan_slices(jobs, 84)


def test_so_many_timed_jobs_at_once(queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compiles by several cores; jobs that measure nothing start all together."""
    run, job, now, most = queue["run"], queue["store"].Job, list[str](), list[int]()
    monkeypatch.setattr(run, "BESIDE", 2)

    def worked(one: Any, store: Any, limit: float) -> dict[str, Any]:
        now.append(one.name)
        most.append(len(now))
        time.sleep(0.1)
        now.remove(one.name)
        return {"status": "ok"}

    for alone, expected in ((1.0, 2), (0.0, 5)):
        most.clear()
        jobs = [job("build", 0, 1), *(job(f"{alone}/{i}", 1, 2, "x", alone) for i in range(5))]
        assert run.run_slice(jobs, queue["store"].Store(tmp_path / str(alone)), 99, worked) == []
        assert max(most) == expected


def test_what_is_a_part_of_another_runs_only_when_named(queue: dict[str, Any]) -> None:
    run, jobs = queue["run"], queue["catalogue"].jobs()
    asked = [job for job in jobs if job.asked]
    assert {job.name for job in asked} >= {"exact/hopper_device/few", "tiles/inception_v4/128/bfloat16/new"}
    assert not [job for job in asked if run.named(job, ())]
    assert [job.name for job in jobs if run.named(job, ["exact/hopper_device/few"])] == ["exact/hopper_device/few"]


def test_a_few_of_the_cuda_kernels_tests(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By an expression for pytest; the forms that they prove count beside those of all tests."""
    work, commands = queue["work"], list[list[str]]()

    def each(command: list[str], environment: Any, patience: float) -> Iterator[list[dict[str, Any]]]:
        commands.append(command)
        yield [{"test": "f[twos64c1-1x7]", "status": "ok"}]

    monkeypatch.setattr(work, "each", each)
    monkeypatch.setattr(work, "no_hopper", lambda: "")
    found = work.exact("hopper_device", "few", report=lambda rows: None)
    assert found["status"] == "ok" and commands[0][-2:] == ["-k", work.FEW_HOPPER]
    work.exact("hopper_device", report=lambda rows: None)
    assert "-k" not in commands[1]
    file = tmp_path / "result.json"
    monkeypatch.setattr(work, "earlier", file)
    whole = [{"test": "f[turns64c1-1x7]", "status": "ok"}, {"test": "f[halo64-1x7]", "status": "failed"}]
    few = [*found["rows"], {"test": "f[halo64-same]", "status": "ok"}]
    results = {"exact/hopper_device": {"status": "failed", "rows": whole}}
    for more, forms in (
        ({}, {"turns64c1"}),
        ({"exact/hopper_device/few": {"status": "ok", "rows": few}}, {"turns64c1", "twos64c1"}),
    ):
        file.write_text(json.dumps({"results": {**results, **more}}))
        assert work.right() == forms


@pytest.fixture
def checkout(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout of few sources, of which nothing is built."""
    for place in ("cpu", "cuda"):
        (tmp_path / "kernels" / place).mkdir(parents=True)
    for name in ("CMakeLists.txt", "kernels/cuda/CMakeLists.txt", "kernels/cuda/conv.cuh"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(queue["provenance"], "ROOT", tmp_path)
    for name, value in (
        ("ROOT", tmp_path),
        ("BUILT", tmp_path / "build" / "built.json"),
        ("link_package", lambda package: None),
    ):
        monkeypatch.setattr(queue["natives"], name, value)
    return tmp_path


@pytest.mark.parametrize("broken", [False, True], ids=["no nvcc", "what does not build"])
def test_a_library_of_other_sources_is_not_measured(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, checkout: Path, broken: bool
) -> None:
    """Where none is built instead it would be taken for one of these."""
    natives, library = queue["natives"], checkout / "kernels/cuda/_hopper.so"
    library.write_text("old")

    def compiled(options: Any) -> dict[str, Any]:
        return {"status": "failed" if broken and options[-1] == "-DHOPPER=AUTO" else "ok", "note": ""}

    monkeypatch.setattr(natives, "compiled", compiled)
    found = natives.build()
    assert found["status"] == "ok" and found["note"].startswith("without the CUDA kernels")
    assert not library.exists() and not natives.BUILT.exists()


def test_natives_that_were_built_elsewhere_are_taken_while_their_sources_stay(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    natives, provenance, steps = queue["natives"], queue["provenance"], list[str]()
    library, module = (
        checkout / "kernels/cuda/_hopper.so",
        f"_native.{sys.implementation.cache_tag}-x86_64-linux-gnu.so",
    )
    monkeypatch.setattr(provenance, "nvcc", lambda: "13.0")

    def compiled(options: Any) -> dict[str, Any]:
        steps.append(options[-1])
        (checkout / "kernels" / "cpu" / module).write_text("")
        if with_cuda:
            library.write_text("")
        return {"status": "ok"}

    monkeypatch.setattr(natives, "compiled", compiled)
    with_cuda = False
    assert "no nvcc" in natives.build()["note"] and not natives.BUILT.exists(), (
        "without the CUDA kernels it is no whole"
    )
    with_cuda = True
    assert natives.build()["note"] == "with the CUDA kernels" and natives.BUILT.exists()
    steps.clear()
    assert natives.build() == {"status": "ok", "note": "with the CUDA kernels, built before by nvcc 13.0"} and not steps
    changes = {
        "a source": lambda: (checkout / "kernels/cuda/conv.cuh").write_text("2"),
        "how": lambda: (checkout / "CMakeLists.txt").write_text("2"),
        "a library is gone": library.unlink,
        "a module of another Python": lambda: (checkout / "kernels" / "cpu" / module).unlink(),
        "a torn file": lambda: natives.BUILT.write_text("{"),
        "another interpreter's": lambda: natives.BUILT.write_text(
            json.dumps({**natives.sources(), "python": "cpython-3"})
        ),
    }
    for what, change in changes.items():
        change()
        assert natives.build()["note"] == "with the CUDA kernels" and steps == ["-DHOPPER=AUTO"], what
        steps.clear()
        assert "built before" in natives.build()["note"] and not steps, what
