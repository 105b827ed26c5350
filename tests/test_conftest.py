"""The test run itself: it fails when it proved nothing, counts its skips, and hands out poisoned memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from checkout import ROOT, project_files

BODIES = {
    "nothing": "",
    "all skipped": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass\n",
    "no reason": "import pytest\n@pytest.mark.skip\ndef test_a(): pass\ndef test_b(): pass\n",
    "fails": "def test_a(): assert False\n",
    "passes": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass\ndef test_b(): pass\n",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_run_passes_only_when_a_test_ran_and_every_skip_has_a_reason(body: str, pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(BODIES[body])
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert (done.ret == pytest.ExitCode.OK) == (body == "passes")
    if body == "passes":
        done.stdout.fnmatch_lines(["*1 skipped*", "    1  no GPU"])
    if body in ("nothing", "all skipped"):
        done.stdout.fnmatch_lines(["no test was executed*"])


# Each test writes when it ran, and that of others; `alone` ones are long enough to be met by those of the other worker.
TIMED = """
import json, os, time
import pytest

def timed(name, seconds):
    start = time.monotonic()
    time.sleep(seconds)
    with open(os.environ["TIMES"], "a") as file:
        file.write(json.dumps([name, start, time.monotonic(), "PYTEST_XDIST_WORKER" in os.environ]) + "\\n")
"""
TOGETHER = """
from timed import *

@pytest.mark.parametrize("number", range(30))
def test_many(number): timed("together", 0.05)
"""
ALONE = """
from timed import *

@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_quiet(number): timed("alone", 0.2)

@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass

@pytest.mark.skip
def test_left_out(): pass

def test_beside(): timed("together", 0.3)
"""


def test_of_two_workers_tests_none_runs_beside_one_that_is_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a skip without a reason fails their run too."""
    pytest.importorskip("xdist")
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = alone: x\npythonpath = .\n")
    pytester.makepyfile(timed=TIMED, test_a=ALONE, test_b=TOGETHER)
    monkeypatch.setenv("TIMES", str(pytester.path / "times"))
    done = pytester.runpytest_subprocess("-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=34, skipped=2)
    done.stdout.fnmatch_lines(["    1  no GPU", "    1  unconditional skip"])
    rows = [json.loads(line) for line in (pytester.path / "times").read_text().splitlines()]
    alone = [(start, end) for name, start, end, _ in rows if name == "alone"]
    meetings = [
        (mine, name, start)
        for mine in alone
        for name, start, end, _ in rows
        if (start, end) != mine and start < mine[1] and mine[0] < end
    ]
    assert len(rows) == 34 and len(alone) == 3 and not meetings
    together = sorted((start, end) for name, start, end, _ in rows if name == "together")
    assert any(a[1] > b[0] for a, b in pairwise(together)), "two workers took turns throughout"
    assert not any(worker for *_, worker in rows), "what a test starts would take itself for a worker"


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()


def test_a_run_of_workers_that_is_ended_says_what_failed(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile("""
        import os, signal, time
        def test_a(): assert False, "this one"
        def test_b():
            time.sleep(3)  # the report of the other is on its way
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)
    """)
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "1")
    assert done.ret == pytest.ExitCode.INTERRUPTED
    done.stdout.fnmatch_lines(["*this one*", "FAILED*test_a*"])


@pytest.mark.parametrize("without", ["repository", "git"])
def test_the_files_of_an_unpacked_archive_are_found_without_git(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = project_files()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for built in (".venv/lib/a.py", "build/b.cpp", "kernels/cpu/_native.so", "tests/__pycache__/c.py"):
        (tmp_path / built).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / built).touch()
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    if without == "git":
        (tmp_path / ".git").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path))
    assert project_files(root=tmp_path) == files
