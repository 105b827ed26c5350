"""A slice of the measuring queue that is ended from outside, by a time limit: what it had is kept, nothing goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from queue_modules import FOLDER, living, loaded


def test_a_signal_ends_the_jobs_and_keeps_what_they_have(tmp_path: Path) -> None:
    """As a time limit would, at any moment; the next run goes on."""
    out, script = slow_queue(tmp_path)
    with subprocess.Popen([sys.executable, str(script), "--out", str(out)], stdout=subprocess.PIPE, text=True) as done:
        child = begun(out)
        done.send_signal(signal.SIGTERM)
        said, _ = done.communicate(timeout=20)
    assert done.returncode == 3 and "layers/1/x: failed cut off with its slice" in said, said
    assert [file.name for file in out.iterdir()] == ["result.json"] and not living(child)
    found = json.loads((out / "result.json").read_text())
    assert found["status"]["layers/1/x"]["note"] == "cut off with its slice" and found["jobs"] == 3
    assert found["rows"] == [{"job": "layers/1/x", "runtime": "ours"}] and "layers/2/x" not in found["results"]


def test_after_a_kill_the_next_run_takes_over(tmp_path: Path) -> None:
    """What was done is in the file, with its summary; what the running job had is taken over; the job itself ends."""
    out, script = slow_queue(tmp_path)
    with subprocess.Popen([sys.executable, str(script), "--out", str(out)], stdout=subprocess.DEVNULL) as done:
        child = begun(out)
        done.kill()
    before = json.loads((out / "result.json").read_text())
    assert before["done"] == 1 and before["rows"] == []
    merged = subprocess.run([sys.executable, str(script), "--out", str(out), "--merge"], capture_output=True, text=True)
    assert merged.returncode == 3 and "1 of 3 jobs done, 2 left" in merged.stdout, merged.stderr
    assert [file.name for file in out.iterdir()] == ["result.json"]
    found = json.loads((out / "result.json").read_text())
    assert found["rows"] == [{"job": "layers/1/x", "runtime": "ours"}] and found["done"] == 1
    assert found["results"]["layers/1/x"]["tries"] == 1
    end = time.monotonic() + 10
    while living(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert not living(child), "a job outlives its queue"


def test_a_second_run_in_the_folder_is_refused_and_takes_nothing(tmp_path: Path) -> None:
    """It would take the rows of a running job for those of a dead one, and its folder away."""
    out, script = slow_queue(tmp_path)
    with subprocess.Popen([sys.executable, str(script), "--out", str(out)], stdout=subprocess.DEVNULL) as done:
        begun(out)
        call = [sys.executable, str(script), "--out", str(out), "--merge"]
        second = subprocess.run(call, capture_output=True, text=True)
        assert (out / "running" / "layers+1+x.json").exists()
        done.send_signal(signal.SIGTERM)
    assert second.returncode == 2 and "another run is at work there" in second.stderr
    assert done.returncode == 3 and subprocess.run(call, capture_output=True).returncode == 3


def test_what_is_taken_over_is_red_where_its_exact_test_failed(tmp_path: Path) -> None:
    """It was asked for by --red; whole or not, nobody ships it."""
    out, script = slow_queue(tmp_path)
    (out / "running").mkdir(parents=True)
    results = {"exact/conv": {"status": "failed", "tries": 2}, "build": {"status": "ok", "tries": 1}}
    (out / "result.json").write_text(json.dumps({"results": results}))
    (out / "running" / "layers+1+x.json").write_text(json.dumps({"status": "ok", "rows": [{"runtime": "ours"}]}))
    (out / "running" / "marks+1.json").write_text(json.dumps({"status": "ok", "rows": [{"runtime": "mark"}]}))
    subprocess.run([sys.executable, str(script), "--out", str(out), "--merge"], capture_output=True)
    found = json.loads((out / "result.json").read_text())
    assert found["results"]["layers/1/x"]["red"] and found["status"]["layers/1/x"]["red"]
    assert {row["job"]: row.get("red") for row in found["rows"]} == {"layers/1/x": True, "marks/1": None}


def test_neighbours_end_when_they_end(tmp_path: Path) -> None:
    """The first to end takes nothing from the others; the last is ended at its own limit."""
    out, script = slow_queue(tmp_path, NEIGHBOURS)
    done = subprocess.run([sys.executable, str(script), "--out", str(out)], capture_output=True, text=True)
    status = json.loads((out / "result.json").read_text())["status"]
    assert done.returncode == 3 and [file.name for file in out.iterdir()] == ["result.json"]
    assert [status[f"exact/{name}"]["status"] for name in ("0", "0.7", "9")] == ["ok", "ok", "failed"], status
    assert status["exact/9"]["note"] == "took longer than 2 s"


# The queue's own way of doing a job, with jobs of its own.
OTHER_WORK = """
import os, sys, time
import real

def build():
    return {"status": "ok"}

def exact(name):
    time.sleep(float(name))
    return {"status": "ok", "note": name}

def layers(number, kind, *, report):
    report([{"runtime": "ours"}])
    with open(sys.argv[2] + ".pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)

real.WORK, real.IN_PARTS = {"build": build, "exact": exact, "layers": layers}, (layers,)
sys.exit(real.main(sys.argv[1:]))
"""


LONG = "[Job('build', 1, 60), Job('layers/1/x', 1, 60), Job('layers/2/x', 1, 60)]"
NEIGHBOURS = (
    "[Job('build', 1, 60), Job('exact/0', 1, 60, 'e'), Job('exact/0.7', 1, 60, 'e'), Job('exact/9', 1, 1.5, 'e')]"
)


def slow_queue(tmp_path: Path, jobs: str = LONG) -> tuple[Path, Path]:
    """Where results go, and the queue with a build that works and two jobs that take long, or with others."""
    folder = tmp_path / "benchmarks" / "gpu"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "work.py").rename(folder / "real.py")
    (folder / "work.py").write_text(OTHER_WORK)
    (folder / "catalogue.py").write_text(f"from store import Job\n\ndef jobs():\n    return {jobs}\n")
    return tmp_path / "out", folder / "run.py"


def begun(out: Path) -> int:
    """Waits until the long job has written its rows; its process."""
    mark, end = out / "running" / "layers+1+x.json.pid", time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    child = int(mark.read_text())
    mark.unlink()
    return child


@pytest.mark.parametrize("batches", ["²", "8,²", "0", "8,"])
def test_batches_that_are_no_numbers_are_refused(
    batches: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digits that int() does not take as well."""
    with loaded("alone") as modules, pytest.raises(SystemExit):
        modules["alone"].main(["--out", str(tmp_path), "--batches", batches])
    assert f"--batches {batches!r}; allowed: numbers from 1 on" in capsys.readouterr().err


def test_alone_refuses_what_holds_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before anything is built."""
    (tmp_path / "result.json").write_text('{"mine": 1}')
    for given in (["--out", str(tmp_path)], ["--out", str(tmp_path / "out"), "--earlier", str(tmp_path / "none")]):
        with loaded("alone") as modules, pytest.raises(SystemExit) as ended:
            modules["alone"].main(given)
        assert ended.value.code == 2 and "allowed: " in capsys.readouterr().err
