"""A pytest plugin, `-p journal --journal FILE`: a line of JSON in FILE for the beginning and the end of each test.

Tests that FILE holds already are not run again. A kernel that traps takes the process's GPU context with it: the
process ends behind such a test, to be begun anew without the tests of its form, which is the first of its parameters,
in the same function or, with `--forms`, in all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ENDED = 70  # exit code of a process whose GPU is of no more use to it
LONG = 3000  # characters of what a failed test says


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--journal", type=Path, required=True)
    parser.addoption("--forms", action="store_true", help="a form that ends a process is left out of every function")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    lines, key = read(config.getoption("journal")), form_of if config.getoption("forms") else group_of
    held, dead = {line["test"] for line in lines}, {key(test) for test in unfinished(lines)}
    items[:] = [item for item in items if item.nodeid not in held]
    for item in items:
        if key(item.nodeid) in dead:
            _write(config, item.nodeid, "left out", "its form ended a process before")
    items[:] = [item for item in items if key(item.nodeid) not in dead]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: Any) -> None:
    _write(item.config, item.nodeid, "begun")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Ends(config), "journal-ends")


class _Ends:
    def __init__(self, config: Any) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
            broken = broken_context() if report.failed else ""
            said = report.longrepr[2] if report.skipped else report.longreprtext  # of a skip file, line and reason
            note = f"{said[-LONG:]}\n{broken}".strip() if not report.passed else ""
            _write(self.config, report.nodeid, "ended" if broken else status, note, report.duration)
            if broken:
                os._exit(ENDED)


def broken_context() -> str:
    """What CUDA says to everything from now on; empty where it still works, or was never started."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU context is lost: {str(error).splitlines()[0]}"
    return ""


def form_of(test: str) -> str:
    """The first parameter of a test, or the test itself where it has none."""
    name, _, parameters = test.partition("[")
    return parameters.rstrip("]").split("-")[0] or name


def group_of(test: str) -> str:
    """The function of a test and the first of its parameters."""
    return test.partition("[")[0] + form_of(test)


def unfinished(lines: list[dict[str, Any]]) -> list[str]:
    """Tests that ended their process, or in which it was ended."""
    last = {line["test"]: line["status"] for line in lines}
    return [test for test, status in last.items() if status in ("begun", "ended", "hung")]


def read(file: Path) -> list[dict[str, Any]]:
    """Whole lines; the last of each process may be torn."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def line(test: str, status: str, note: str = "", seconds: float = 0.0) -> str:
    found = {"test": test, "status": status, "seconds": round(seconds, 3)}
    return json.dumps(found | ({"note": note} if note else {})) + "\n"


def append(file: Path, *values: Any) -> None:
    """A line of its own, behind one that a process left torn as well."""
    with file.open("ab+") as out:
        out.seek(max(out.seek(0, os.SEEK_END) - 1, 0))
        torn = out.read(1) not in (b"", b"\n")
        out.write(("\n" if torn else "").encode() + line(*values).encode())


def _write(config: Any, *values: Any) -> None:
    append(config.getoption("journal"), *values)
