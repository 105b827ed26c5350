"""Runs every test from the same seed with the same number of threads, and refuses a run that proved nothing."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from inception_fast.weights._tensorflow import settle_triton

SEED = 20140917
THREADS = min(2, os.cpu_count() or 1)
_ran: Counter[str] = Counter()
_skips: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    settle_triton()  # some tests import tensorflow themselves


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
