"""Tests on a GPU, each with a verdict of its own: what hangs, traps or dies costs its form, not the tests behind it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import journal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START = 120.0  # seconds until the first test begins
MOST = 40  # processes
WHOLE = (0, 1, 5)  # exit codes of a pytest that came to its end: all passed, some failed, none were left


def each(
    command: Sequence[str], environment: dict[str, str], patience: float, start: float = START
) -> Iterator[list[dict[str, Any]]]:
    """Rows of all tests so far that have ended, whenever there are more. `command` is pytest with its files,
    `patience` how many seconds a test may take.
    """
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        file = Path(folder) / "journal"
        for _ in range(MOST):
            before = len(journal.read(file))
            process = _started([*command, "-p", "journal", "--journal", str(file)], environment)
            try:
                yield from _watched(process, file, patience, start)
            finally:
                process.kill()
                code = process.wait()
            _close(file, code)
            yield verdicts(journal.read(file))
            lines = journal.read(file)
            if len(lines) == before or (code in WHOLE and not journal.unfinished(lines[before:])):
                return


def _started(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment, "PYTHONPATH": paths})


def _watched(
    process: subprocess.Popen[bytes], file: Path, patience: float, start: float
) -> Iterator[list[dict[str, Any]]]:
    """Until the process ends, or nothing has been written for too long."""
    size, since = file.stat().st_size if file.exists() else 0, time.monotonic()
    allowed = start
    while process.poll() is None:
        time.sleep(0.05)
        now = file.stat().st_size if file.exists() else 0
        if now != size:
            size, since, allowed = now, time.monotonic(), patience
            yield verdicts(journal.read(file))
        elif time.monotonic() - since > allowed:
            return


def _close(file: Path, code: int) -> None:
    """A test that was running when its process ended has a verdict too, and one whose own was not written whole."""
    last = {line["test"]: line["status"] for line in journal.read(file)}
    killed = code == -9
    note = "took too long" if killed else f"its process ended with exit code {code}"
    for test in (test for test, status in last.items() if status == "begun"):
        journal.append(file, test, "hung" if killed else "ended", note)


def verdicts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last word on each test that has ended."""
    last = {line["test"]: line for line in lines}
    return [line for line in last.values() if line["status"] != "begun"]
