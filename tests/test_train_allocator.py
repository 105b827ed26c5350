"""What a training step frees stays with the process: no page of it is asked for again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inception_fast.train import keep_freed_memory
from inception_fast.train.allocator import uses_glibc

# Three blocks of 40 MiB, above what glibc keeps by itself, taken, filled and freed in turns, as a step does. Its heap
# grows over the first turns: a freed block is too short for an aligned one of the same length.
TURNS = """
import resource, sys, torch
from inception_fast.train.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def turns(count):
    for _ in range(count):
        blocks = [torch.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF)
before, after = turns(8), turns(8)
print(after.ru_minflt - before.ru_minflt, before.ru_maxrss, after.ru_maxrss)
"""
PAGES = 3 * (40 << 20) // 4096


def turns(how: str) -> tuple[int, int, int]:
    """(page faults of eight later turns, peaks of resident memory in KiB before and after them) in an own process."""
    out = subprocess.run([sys.executable, "-c", TURNS, how], check=True, capture_output=True, text=True).stdout
    faults, before, after = map(int, out.split())
    return faults, before, after


@pytest.mark.skipif(not uses_glibc(), reason="the C library is not glibc, and keeps memory in its own way")
def test_what_is_freed_is_used_again() -> None:
    plain, _, _ = turns("plain")
    kept, before, after = turns("keep")
    # A fault brings a page, or where the system has huge ones, up to 512.
    assert plain >= 8 * PAGES // 512
    assert kept < PAGES // 512, f"{kept} page faults, {plain} with memory given back"
    assert after < 1.02 * before, "memory grows from turn to turn"


HUGE = """
import re, torch
from inception_fast.train.allocator import keep_freed_memory
assert keep_freed_memory()
block = torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
for line in open("/proc/self/smaps"):
    found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
    if found:
        low, high = (int(part, 16) for part in found.groups())
    elif line.startswith("VmFlags:") and low <= block.data_ptr() + (20 << 20) < high:
        print("hg" in line.split())
"""


@pytest.mark.skipif(
    not (uses_glibc() and Path("/sys/kernel/mm/transparent_hugepage").exists()), reason="a system without huge pages"
)
def test_the_heap_is_to_be_of_huge_pages() -> None:
    out = subprocess.run([sys.executable, "-c", HUGE], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["True"]


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
