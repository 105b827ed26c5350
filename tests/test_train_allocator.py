"""What a training step frees stays with the process: no page of it is asked for again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from inception_fast.train import keep_freed_memory
from inception_fast.train.allocator import uses_glibc

# Three blocks of 40 MiB, above what glibc keeps by itself, taken, filled and freed in turns, as a step does.
TURNS = """
import resource, sys, torch
from inception_fast.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def turn():
    blocks = [torch.zeros(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(3)]
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    turn()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_minflt - before, usage.ru_maxrss)
"""
PAGES = 3 * (40 << 20) // 4096


def turns(how: str) -> tuple[int, int]:
    """(page faults of five turns, peak of resident memory in KiB) in a process of its own."""
    out = subprocess.run([sys.executable, "-c", TURNS, how], check=True, capture_output=True, text=True).stdout
    faults, peak = out.split()
    return int(faults), int(peak)


@pytest.mark.skipif(not uses_glibc(), reason="the C library is not glibc, and keeps memory in its own way")
def test_what_is_freed_is_used_again() -> None:
    plain, peak = turns("plain")
    kept, kept_peak = turns("keep")
    if os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        # Huge pages make a fault fetch up to 512 pages.
        assert plain >= 5 * PAGES // 512
    assert kept < PAGES // 512, f"{kept} page faults, {plain} with memory given back"
    assert kept_peak < 1.1 * peak


def test_without_glibc_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def refuse(*_: object) -> None:
        raise AssertionError("no library may be opened")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for answer in (ValueError("unrecognized configuration name"), None):

        def confstr(name: str, answer: Exception | None = answer) -> str | None:
            if answer is not None:
                raise answer
            return None

        monkeypatch.setattr(os, "confstr", confstr)
        assert keep_freed_memory() is False


@pytest.mark.parametrize("refused", [-3, -1], ids=["block size", "trimming"])
def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    import ctypes

    class Library:
        def __init__(self, name: None) -> None:
            def mallopt(what: int, value: int) -> int:
                return int(what != refused)

            self.mallopt = mallopt

    monkeypatch.setattr("inception_fast.train.allocator.uses_glibc", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert keep_freed_memory() is False
