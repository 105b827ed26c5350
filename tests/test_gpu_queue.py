"""The measuring queue without a GPU: what is planned, what is done again, what a failure keeps from running."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT
from queue_modules import FOLDER, living, loaded

NAMES = ("store", "catalogue", "run", "work", "natives", "provenance", "counters")


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    """The queue's scripts."""
    with loaded(*NAMES) as modules:
        yield modules


# What a long job does: it writes what it has, says something, and goes on.
SLOW_WORK = """
import json, sys, time
open(sys.argv[2], 'w').write(json.dumps({'status': 'failed', 'rows': [{'runtime': 'ours'}]}))
print('begun', flush=True)
time.sleep(30)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def small(queue: dict[str, Any]) -> list[Any]:
    job = queue["store"].Job
    names = ("build", "exact/norm", "exact/conv", "layers/1/x", "network/m/1/x")
    return [job(name, 100, 150) for name in names]


def runner(clock: Clock, ran: list[str], failing: tuple[str, ...] = (), seconds: float = 100) -> Any:
    def run(job: Any, store: Any, limit: float) -> dict[str, Any]:
        ran.append(job.name)
        clock.now += seconds
        return {"status": "failed" if job.name in failing else "ok", "rows": [{"value": 1}]}

    return run


def test_slices_go_on_where_the_last_stopped(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran = Clock(), list[str]()
    store = queue["store"].Store(tmp_path)
    left = queue["run"].run_slice(small, store, 350, runner(clock, ran), clock)
    assert ran == ["build", "exact/norm", "exact/conv"]
    assert [job.name for job in left] == ["layers/1/x", "network/m/1/x"]
    ran.clear()
    again = queue["store"].Store(tmp_path / "fresh", [tmp_path])
    left = queue["run"].run_slice(small, again, 350, runner(clock, ran), clock)
    assert ran == ["build", "layers/1/x", "network/m/1/x"] and left == []
    summary = again.summary()
    assert summary["done"] == 5 and {row["job"] for row in summary["rows"]} == {job.name for job in small}


def test_a_job_is_started_only_when_it_fits(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran = Clock(), list[str]()
    queue["run"].run_slice(small, queue["store"].Store(tmp_path), 199, runner(clock, ran), clock)
    assert ran == ["build"] and clock.now <= 199


def test_wrong_kernels_are_not_timed(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran, store = Clock(), list[str](), queue["store"].Store(tmp_path)
    left = queue["run"].run_slice(small, store, 1000, runner(clock, ran, ("exact/conv",)), clock)
    assert ran == ["build", "exact/norm", "exact/conv"] and [job.name for job in left] == ["exact/conv"]
    ran.clear()
    queue["run"].run_slice(small, store, 1000, runner(clock, ran), clock)
    assert ran == ["build", "exact/conv", "layers/1/x", "network/m/1/x"]


def test_wrong_cuda_kernels_hold_up_their_own_times_alone(queue: dict[str, Any], tmp_path: Path) -> None:
    """And wrong Triton kernels do not hold up theirs, which leave out their own wrong forms by themselves."""
    job = queue["store"].Job
    names = ("build", "exact/conv", "exact/hopper_device", "hopper/1/x", "layers/1/x")
    for wrong, timed in (("exact/hopper_device", ["hopper/1/x", "layers/1/x"]), ("exact/conv", ["hopper/1/x"])):
        jobs, clock, ran = [job(name, 100, 150) for name in names], Clock(), list[str]()
        store = queue["store"].Store(tmp_path / wrong)
        queue["run"].run_slice(jobs, store, 1000, runner(clock, ran, (wrong,)), clock)
        assert ran == ["build", "exact/conv", "exact/hopper_device", *timed]


def test_without_the_cuda_kernels_their_jobs_are_unavailable(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = queue["work"]
    monkeypatch.setattr(work, "no_hopper", lambda: "not built")
    monkeypatch.setattr(work, "ran", lambda command, **_: {"status": "ok", "files": command})
    for result in (
        work.exact("hopper_device", report=lambda rows: None),
        work.hopper("1", "bfloat16", report=lambda rows: None),
        work.probe("hopper"),
    ):
        assert result == {"status": "unavailable", "note": "not built"}
    assert not any("test_hopper" in str(word) for word in work.sanitizer("memcheck")["files"])
    monkeypatch.setattr(work, "no_hopper", lambda: "")
    assert "tests/interpreted/test_hopper_device.py" in work.sanitizer("memcheck")["files"]


def test_a_failure_is_tried_twice(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran, store = Clock(), list[str](), queue["store"].Store(tmp_path)
    for _ in range(3):
        queue["run"].run_slice(small, store, 1000, runner(clock, ran, ("layers/1/x",)), clock)
    assert ran.count("layers/1/x") == 2 and ran.count("network/m/1/x") == 1
    assert store.summary()["status"]["layers/1/x"]["status"] == "failed"


def test_without_a_build_nothing_runs(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran = Clock(), list[str]()
    queue["run"].run_slice(small, queue["store"].Store(tmp_path), 1000, runner(clock, ran, ("build",)), clock)
    assert ran == ["build"]


def test_a_torn_result_counts_for_nothing(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    store = queue["store"].Store(tmp_path)
    store.put(small[1], {"status": "ok"})
    assert not store.wants(small[1])
    file = tmp_path / "result.json"
    file.write_text(file.read_text()[:10])
    assert queue["store"].Store(tmp_path).wants(small[1])
    with pytest.raises(ValueError, match=r"holds no results; allowed: the result\.json of a former slice"):
        queue["store"].Store(tmp_path / "new", [file])


DAMAGES = (
    '{"rows": []}',
    '{"status": 1}',
    '{"status": "ok", "rows": null}',
    '{"status": "ok", "rows": [1]}',
    '{"status": "ok", "rows": [{"ms": NaN}]}',
    '{"status": "failed", "tries": "x"}',
    '{"status": "ok", "machine": 1}',
    "[]",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_counts_for_nothing(
    damage: str, queue: dict[str, Any], small: list[Any], tmp_path: Path
) -> None:
    """In a file of former slices, in this one's, and in what a job left behind; the others in the file count."""
    file, there = tmp_path / "old.json", queue["store"].Store(tmp_path / "out")
    file.write_text(f'{{"results": {{"exact/norm": {damage}, "machine": {damage}, "exact/conv": {{"status": "ok"}}}}}}')
    there.file.write_text(file.read_text())
    left = there.running(small[3])
    left.parent.mkdir()
    left.write_text(damage)
    for store in (queue["store"].Store(tmp_path / "new", [file]), queue["store"].Store(tmp_path / "out")):
        assert [store.wants(job) for job in small[1:3]] == [True, False]
        store.put(small[1], {"status": "ok"})
        assert json.loads(store.file.read_text())["status"]["exact/norm"] == {"status": "ok"}
    assert store.results["layers/1/x"]["status"] == "failed"


@pytest.mark.parametrize("text", ('{"best": 1}', "[1]", '{"results": []}'))
def test_a_file_of_others_is_not_written_over(text: str, queue: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SystemExit):
        queue["run"].main(["--merge", "--out", str(tmp_path)])
    assert [file.read_text() for file in tmp_path.iterdir()] == [text]


def test_a_job_that_hangs_or_dies_has_failed(
    queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, job = queue["store"].Store(tmp_path), queue["store"].Job("no_such_work/x", 1, 2)
    result = queue["run"].run_job(job, store, 30)
    assert result["status"] == "failed" and "KeyError" in result["note"]
    result = queue["run"].run_job(job, store, 0.001)
    assert result["status"] == "failed" and "took longer" in result["note"]


@pytest.mark.parametrize("limit", [60.0, 3.0], ids=["in time", "too late"])
def test_what_a_job_started_ends_with_it(queue: dict[str, Any], tmp_path: Path, limit: float) -> None:
    """A grandchild that holds the GPU, and the pipe to its parent, must not outlive its job, which may end first."""
    mark = tmp_path / "child"
    child = "import time; time.sleep(120)"
    program = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(mark)!r}, 'w').write(str(child.pid)); time.sleep({0 if limit > 10 else 120})"
    )
    begin = time.monotonic()
    output, ended = queue["run"].finished([sys.executable, "-c", program], limit)
    assert ended == (limit > 10) and output == "" and time.monotonic() - begin < 60
    end, process = time.monotonic() + 30, int(mark.read_text())
    while living(process) and time.monotonic() < end:
        time.sleep(0.02)
    assert not living(process)


def test_rows_outlive_a_job_that_takes_too_long(
    queue: dict[str, Any], small: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling a peer may take longer than a slice; what was timed before is kept."""
    (tmp_path / "work.py").write_text(SLOW_WORK)
    monkeypatch.setattr(queue["run"], "HERE", tmp_path)
    store = queue["store"].Store(tmp_path / "out")
    result = queue["run"].run_job(small[3], store, 2.0)
    note, log = "took longer than 2 s", "begun\n"
    assert result == {"status": "failed", "rows": [{"runtime": "ours"}], "note": note, "log": log}
    store.put(small[3], result)
    assert store.summary()["rows"] == [{"job": "layers/1/x", "runtime": "ours"}]
    assert store.wants(small[3])


def test_a_long_job_reports_its_parts(queue: dict[str, Any]) -> None:
    parts: list[list[dict[str, Any]]] = []
    right, wrong = {"runtime": "ours", "status": "ok"}, {"runtime": "ours", "status": "failed", "note": "no"}
    assert queue["work"].timed(iter([[right], [right, right]]), parts.append)["status"] == "ok"
    assert [len(rows) for rows in parts] == [1, 2]
    result = queue["work"].timed(iter([[right, wrong]]), parts.append)
    assert result["status"] == "failed" and result["note"] == "ours: no" and len(result["rows"]) == 2
    assert queue["work"].timed(iter([]), parts.append)["note"] == "ours: no row"


def test_wrong_numbers_fail_the_job_that_found_them(queue: dict[str, Any]) -> None:
    """Of any kernel of ours, in rows that name no runtime too; what a peer gives, or what has no kernel, does not."""
    timed = queue["work"].timed
    cut = {"layer": "l", "runtime": "cuda", "config": "64x32", "median_ms": 1.0}
    layers = [cut, {**cut, "status": "unavailable"}, {**cut, "runtime": "cudnn", "status": "wrong"}]
    assert timed(iter([layers]), print, ("cudnn",))["status"] == "ok"
    for runtime in ("cuda", "pair 256", "triton"):
        result = timed(iter([[*layers, {**cut, "runtime": runtime, "status": "wrong"}]]), print, ("cudnn",))
        assert (result["status"], result["note"]) == ("failed", f"l by {runtime}: wrong") and len(result["rows"]) == 4
    tiles = [{"shape": "s", "status": "ok"}, {"shape": "s", "status": "failed", "cuda": "failed", "note": "off by 0.5"}]
    assert timed(iter([tiles]), print)["note"] == "s by ours: off by 0.5"
    network = [{"runtime": "ours", "status": "ok"}, {"runtime": "separate", "status": "wrong"}]
    assert timed(iter([network]), print)["status"] == "ok", "what ships is right"


def test_counters_that_a_gpu_lacks_are_left_out(queue: dict[str, Any]) -> None:
    said = "==ERROR== Failed to find metric sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active\n==PROF== x"
    found = queue["counters"].unknown_metrics(said, queue["counters"].METRICS)
    assert found == ["sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"]
    assert queue["counters"].unknown_metrics("==PROF== done", queue["counters"].METRICS) == []


def test_the_dry_run_lists_every_job_in_slices_that_fit() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--dry-run"], capture_output=True, text=True, check=True
    )
    slices = [line for line in done.stdout.splitlines() if line.startswith("slice")]
    assert len(slices) > 10 and all(float(line.split()[3]) <= 570 for line in slices)
    for name in (
        "exact/conv",
        "exact/hopper_device",
        "hopper/128/bfloat16",
        "probe/hopper",
        "sanitizer/racecheck",
        "layers/256/float16",
        "network/inception_v4/1/bfloat16",
    ):
        assert any(line.split()[0] == name for line in done.stdout.splitlines()), name
    wrong = subprocess.run([sys.executable, str(FOLDER / "run.py")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--out is needed" in wrong.stderr


def test_slices_too_short_are_refused() -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--dry-run", "--slice-seconds", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "allowed: slices of at least that" in done.stderr


def test_the_package_is_linked_as_it_is_installed(queue: dict[str, Any], tmp_path: Path) -> None:
    """In every slice anew, where the one before left what Python compiled beside the links."""
    package = tmp_path / "inception_fast"
    program = "import inception_fast, inception_fast.kernels.spec as s; print(inception_fast.__file__, s.__name__)"
    for _ in range(2):
        queue["natives"].link_package(package)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        )  # fmt: skip
        assert done.stdout.startswith(str(tmp_path)) and done.stdout.rstrip().endswith("inception_fast.kernels.spec")
        assert (package / "__pycache__").is_dir()


def test_tests_meet_the_linked_package_and_not_the_checkout(queue: dict[str, Any], tmp_path: Path) -> None:
    """They start in the checkout, whose inception_fast has no kernels in it."""
    queue["natives"].link_package(tmp_path / "linked" / "inception_fast")
    decoy = tmp_path / "checkout" / "inception_fast"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the checkout was imported')")
    start = queue["work"].PYTEST[: queue["work"].PYTEST.index("-m")]
    done = subprocess.run(
        [*start, "-m", "inception_fast", "list", "--json"], capture_output=True, text=True, cwd=decoy.parent,
        env={"PYTHONPATH": str(tmp_path / "linked"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0 and "inception_v3" in done.stdout, done.stderr


def test_counters_are_read_from_the_profiler(queue: dict[str, Any]) -> None:
    text = "\n".join(
        (
            "==PROF== Connected to process 1",
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","conv_kernel","dram__bytes_read.sum","Mbyte","21.5"',
            '"0","conv_kernel","lts__t_sector_hit_rate.pct","%","83.1"',
            '"1","conv_kernel","dram__bytes_read.sum","Mbyte","1.5"',
        )
    )
    first, second = queue["counters"].counted(text)
    assert first == {
        "kernel": "conv_kernel",
        "dram__bytes_read.sum": "21.5 Mbyte",
        "lts__t_sector_hit_rate.pct": "83.1 %",
    }
    assert second["dram__bytes_read.sum"] == "1.5 Mbyte"


def test_results_are_json_without_nan(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    store = queue["store"].Store(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.put(small[1], {"status": "ok", "rows": [{"median_ms": float("nan")}]})
    assert store.get(small[1]) is None and not list(tmp_path.iterdir())
    store.put(small[1], {"status": "ok"})
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["results"] == {"exact/norm": {"status": "ok", "tries": 1}} and found["done"] == 1


def test_neighbours_run_at_once_and_their_slice_waits_for_the_longest(queue: dict[str, Any], tmp_path: Path) -> None:
    job, run = queue["store"].Job, queue["run"]
    jobs = [job("build", 1, 9), *(job(f"exact/{name}", 5, 9, "exact") for name in "abc"), job("machine", 3, 9)]
    meet = threading.Barrier(3, timeout=20)

    def together(one: Any, store: Any, limit: float) -> dict[str, Any]:
        if one.together:
            meet.wait()
        if one.name == "exact/b":
            raise OSError("no memory")
        return {"status": "ok"}

    store = queue["store"].Store(tmp_path)
    left = run.run_slice(jobs, store, 9, together, lambda: 0.0)
    assert [one.name for one in left] == ["exact/b"] and store.results["exact/b"]["note"] == "OSError: no memory"
    assert queue["store"].planned_seconds(jobs) == 9 and [len(g) for g in queue["store"].grouped(jobs)] == [1, 3, 1]
    assert [[one.name for one in s] for s in queue["store"].plan_slices(jobs, 6)] == [
        ["build", "exact/a", "exact/b", "exact/c"],
        ["build", "machine"],
    ]


def test_a_job_too_long_for_the_rest_lets_a_shorter_one_run(queue: dict[str, Any], tmp_path: Path) -> None:
    job, clock, ran = queue["store"].Job, Clock(), list[str]()
    jobs = [job("build", 100, 100), job("peers/m/1/x", 300, 400), job("machine", 50, 60)]
    left = queue["run"].run_slice(jobs, queue["store"].Store(tmp_path), 200, runner(clock, ran), clock)
    assert ran == ["build", "machine"] and [one.name for one in left] == ["peers/m/1/x"]


def test_what_is_red_is_timed_when_asked_and_says_so(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    clock, ran, store = Clock(), list[str](), queue["store"].Store(tmp_path)
    failing = ("exact/conv",)
    queue["run"].run_slice(small, store, 1000, runner(clock, ran, failing), clock, red=True)
    assert ran == ["build", "exact/norm", "exact/conv", "layers/1/x", "network/m/1/x"]
    marks = {row["job"]: row.get("red") for row in store.summary()["rows"]}
    assert marks == {"build": None, "exact/norm": None, "exact/conv": None, "layers/1/x": True, "network/m/1/x": True}


def test_rows_that_stay_of_a_red_failure_are_red(queue: dict[str, Any], small: list[Any], tmp_path: Path) -> None:
    """Behind its exact test, which came right the second time, the job was cut off before it had as many."""
    store, layers = queue["store"].Store(tmp_path), small[3]
    wrong = {"status": "failed", "rows": [{"value": 1}, {"value": 2}], "red": True}
    store.put(layers, wrong)
    store.put(layers, {"status": "failed", "rows": [{"value": 3}]})
    assert store.summary()["rows"] == [{"job": "layers/1/x", "value": value, "red": True} for value in (1, 2)]
    store.put(layers, {"status": "ok", "rows": [{"value": 4}]})
    assert store.summary()["rows"] == [{"job": "layers/1/x", "value": 4}]


def test_every_kind_of_job_is_known(queue: dict[str, Any]) -> None:
    """Names of jobs are functions of `work` with as many arguments; what is red refers to tests that exist."""
    jobs = queue["catalogue"].jobs()
    assert len({job.name for job in jobs}) == len(jobs) and all(job.seconds <= job.limit for job in jobs)
    for job in jobs:
        kind, *arguments = job.name.split("/")
        given = {"report": None} if queue["work"].WORK[kind] in queue["work"].IN_PARTS else {}
        inspect.signature(queue["work"].WORK[kind]).bind(*arguments, **given)
    kinds = {job.name.split("/")[0] for job in jobs}
    untimed = {"build", "machine", "exact", "sanitizer", "probe"}
    assert kinds - untimed == set(queue["run"].STANDS_ON)
    timed = [job for job in jobs if job.name.split("/")[0] not in untimed]
    assert all(bool(job.together) == (0 < job.alone < job.seconds) for job in timed), "together, but timed in turn"
    joined = {"network", "tiles", "peers", "steady"}  # whose times are taken inside of turns.alone()
    assert {job.name.split("/")[0] for job in timed if job.together} == joined
    assert {name for names in queue["run"].STANDS_ON.values() for name in names} <= set(queue["catalogue"].TESTS)
    for name in queue["catalogue"].TESTS:
        assert (ROOT / "tests" / "interpreted" / f"test_{name}.py").exists()


def test_the_log_of_a_command_outlives_its_job(queue: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    found = queue["work"].ran([sys.executable, "-u", "-c", program])
    assert found == {"status": "failed", "note": "err", "log": "out\nerr\n"} and capsys.readouterr().out == "out\nerr\n"
    assert queue["work"].ran([sys.executable, "-c", "print('good')"]) == {"status": "ok", "note": "good"}
    assert queue["work"].ran(["no-such-command"])["status"] == "unavailable"


def test_without_cuda_kernels_the_rest_is_built(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    natives, asked = queue["natives"], list[Any]()

    def built(broken: tuple[str, ...]) -> dict[str, Any]:
        def compiled(options: Any) -> dict[str, Any]:
            asked.append(options[-1])
            wrong = any(option in broken for option in options)
            return {"status": "failed", "note": "ptxas", "log": "ptxas"} if wrong else {"status": "ok", "note": ""}

        monkeypatch.setattr(natives, "compiled", compiled)
        return natives.build()

    linked: list[Path] = []
    monkeypatch.setattr(natives, "ROOT", tmp_path)
    monkeypatch.setattr(natives, "built_before", lambda: False)
    monkeypatch.setattr(natives, "link_package", linked.append)
    found = built(("-DHOPPER=AUTO",))
    assert found["status"] == "ok" and "do not build" in found["note"] and found["log"] == "ptxas" and len(linked) == 1
    assert asked == ["-DHOPPER=AUTO", "-DHOPPER=OFF"]
    assert built(("-DHOPPER=AUTO", "-DHOPPER=OFF"))["status"] == "failed" and len(linked) == 1


def test_a_result_names_its_sources(queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the tree has no history; the digest tells it from another."""
    provenance = queue["provenance"]
    for folder in ("kernels", "inception_fast", "benchmarks/gpu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kernels" / "a.py").write_text("1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    first = provenance.sources()
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert provenance.sources() != first and len(first) == 16
    monkeypatch.setattr(provenance, "printed", lambda *command: "")
    monkeypatch.setattr(provenance, "on_device", lambda: {"problem": "no driver"})
    assert "no driver" in queue["work"].machine()["note"] and queue["work"].machine()["status"] == "failed"
    monkeypatch.setattr(provenance, "on_device", lambda: {"name": "A GPU", "capability": "9.0"})
    assert queue["work"].machine()["machine"]["name"] == "A GPU"  # without nvidia-smi


def test_kernels_that_may_hang_join_a_network_only_after_their_test(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those forms of them that came out right, as the network's job is told."""
    work, file = queue["work"], tmp_path / "result.json"
    monkeypatch.setattr(work, "earlier", file)
    assert work.right() is None
    good, bad = {"test": "f[a-1]", "status": "ok"}, {"test": "f[b-1]", "status": "hung"}
    for rows, forms in (([], set()), ([bad], set()), ([good, bad], {"a"})):
        file.write_text(json.dumps({"results": {"exact/hopper_device": {"status": "failed", "rows": rows}}}))
        assert work.right() == forms
