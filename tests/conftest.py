"""Runs every test from the same seed with the same number of threads, and refuses a run that proved nothing.

In a run of several workers (`-n 2 --dist loadfile`) a test marked `alone` waits until no other test runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from inception_fast.weights._tensorflow import settle_triton

SEED = 20140917
THREADS = min(2, os.cpu_count() or 1)
# The files that take longest, first: no worker then begins a long one when the others have nothing left to do.
LONGEST = ("test_native_driver.py", "test_triton.py", "test_tf_models.py", "test_packaging.py", "test_winograd.py")
ROOM, GATE = Path(__file__), Path(__file__).parent  # what tests hold while they run, and pass through before
_ran: Counter[str] = Counter()
_skips: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """Names a folder, too, in which the run's processes find what another has compiled for the emulated device."""
    torch.set_num_threads(THREADS)
    settle_triton()  # some tests import tensorflow themselves
    if in_worker(config):
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            del os.environ[name]  # what a test starts is no worker
        return
    if config.getoption("numprocesses", None):  # the process that runs no test itself
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended says what failed until then
    if "EMULATED_OBJECTS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="emulated-")
        os.environ["EMULATED_OBJECTS"] = folder.name
        config.add_cleanup(lambda: os.environ.pop("EMULATED_OBJECTS"))
        config.add_cleanup(folder.cleanup)


def pytest_report_header(config: pytest.Config) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {THREADS} threads, {capability}, seed {SEED}"


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds every generator, asks torch for deterministic algorithms and undoes what a test did to either.

    torch then fills memory that it hands out uninitialised with NaN, so a kernel that reads what nobody wrote shows.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back() -> Iterator[None]:
    """A worker runs half of all files, and glibc keeps what they free: after a training it has been told to."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def in_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For several workers: the longest files first, those with tests that run alone last, and these at their ends."""
    if not in_worker(config):
        return
    quiet = {item.path for item in items if item.get_closest_marker("alone")}

    def place(item: pytest.Item) -> tuple[int, bool, Path, bool]:
        name = item.path.name
        rank = LONGEST.index(name) if name in LONGEST else len(LONGEST)
        return rank, item.path in quiet, item.path, item.get_closest_marker("alone") is not None

    items.sort(key=place)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Outside of what is timed and of what a timeout ends."""
    if not in_worker(item.config):
        return (yield)
    with _room(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _room(alone: bool) -> Iterator[None]:
    """Held by one test alone or by several together. Who waits to be alone keeps the others from entering."""
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    gate, room = (os.open(place, os.O_RDONLY) for place in (GATE, ROOM))
    try:
        fcntl.flock(gate, how)
        fcntl.flock(room, how)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
    finally:
        for place in (room, gate):
            fcntl.flock(place, fcntl.LOCK_UN)  # a forked child may still have it open
            os.close(place)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skips[_reason(report)] += 1
    elif report.when == "call":
        _ran[report.outcome] += 1


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected failure: {report.wasxfail}"
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that executed no test has failed, whatever the reason; so has one that skipped without saying why."""
    if session.config.option.collectonly:
        return
    proved_nothing = not _ran and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    unexplained = any(reason in ("", "unconditional skip") for reason in _skips)
    if proved_nothing or (unexplained and exitstatus == pytest.ExitCode.OK):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skips:
        terminalreporter.section(f"{sum(_skips.values())} skipped")
        for reason, count in _skips.most_common():
            terminalreporter.line(f"{count:5}  {reason or 'NO REASON GIVEN: that fails the run'}")
    if not _ran and not terminalreporter.config.option.collectonly:
        terminalreporter.line("no test was executed: that fails the run", red=True)
