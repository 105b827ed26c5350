"""Marks of the Hopper convolutions without a GPU: what they sum up to, and that a build with them compiles, as does the
probe of rates.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkout import ROOT
from queue_modules import loaded

HEADER = ROOT / "kernels" / "cuda" / "marks.cuh"


@pytest.fixture(scope="module")
def marks() -> Iterator[Any]:
    with loaded("marks") as modules:
        yield modules["marks"]


def test_both_sides_count_alike(marks: Any) -> None:
    text = HEADER.read_text()
    names = re.search(r"enum class Passed : uint32_t \{ TILE = 1, ([^}]*) \}", text)
    assert names is not None
    kinds = ["TILE", *names[1].split(", ")]
    assert [getattr(marks, name) for name in kinds] == list(range(1, len(kinds) + 1))
    sizes = dict(re.findall(r"constexpr int (MARKED_THREADS|MARKS) = (\d+);", text))
    assert sizes == {"MARKED_THREADS": str(len(marks.THREADS)), "MARKS": str(marks.MARKS)}


def test_each_thread_has_the_medians_of_its_parts(marks: Any) -> None:
    """Without the first tile, whose caches are cold; a clock that goes round; who left no marks has no row."""
    found = np.zeros((len(marks.THREADS), marks.MARKS, 2), np.uint32)

    def leave(who: int, sequence: list[tuple[int, int]]) -> None:
        found[who, : len(sequence)] = np.array(sequence, np.int64) % (1 << 32)

    loading, multiplying = list[tuple[int, int]](), list[tuple[int, int]]()
    for tile, (begin, slow) in enumerate(((-1000, 900), (0, 10), (400, 20), (800, 30))):
        loading += [(marks.TILE, begin), (marks.READY, begin + slow), (marks.SPENT, 7), (marks.END, begin + slow + 100)]
        parts = (
            (marks.TURN, 50 + tile),
            (marks.SPENT, slow),
            (marks.ISSUED, 150),
            (marks.SUMS, 170),
            (marks.STORED, 300),
        )
        multiplying += [(marks.TILE, begin), *((k, v if k == marks.SPENT else begin + v) for k, v in parts)]
    leave(0, loading)
    leave(3, multiplying)
    x, second = list(marks.summaries(found))
    assert (x["thread"], x["tiles"], second["thread"], second["tiles"]) == ("x", 4, "second", 4)
    leave(
        4, [(marks.TILE, 0), (marks.TURN, 5), (marks.STORED, 9), (marks.TILE, 10), (marks.TURN, 17), (marks.STORED, 30)]
    )
    assert [row["thread"] for row in marks.summaries(found)] == ["x", "second", "third"]
    assert list(marks.summaries(found, "behind"))[2] == {
        "thread": "stores first", "tiles": 2, "span": 30,
        "cycles": {"goes on": 1, "waits for its turn": 7, "stores": 13},
    }  # fmt: skip
    assert (x["span"], second["span"]) == (1930, 2100)
    assert [row["thread"] for row in marks.summaries(found, "pooled")] == ["x", "second", "pools first"]
    assert x["cycles"] == {"goes on": 280, "sets up": 20, "waits for stages": 7, "loads": 100}
    assert second["cycles"] == {
        "goes on": 100, "waits for its turn": 52, "waits for stages": 20, "issues products": 98, "waits for sums": 20,
        "stores": 130,
    }  # fmt: skip


def test_a_cut_that_does_not_run_has_a_row_that_says_so(marks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(library: Any, spec: Any, name: str) -> Any:
        if "in turn" in name:
            raise ValueError(f"configuration {name!r}; allowed: others")
        return np.array([[[marks.TILE, 1], [marks.STORED, 5], [0, 0]]] * len(marks.THREADS), np.uint32), 2.5

    monkeypatch.setattr(marks, "marked", marked)
    *_, rows = marks.mark_rows(None, 2, "bfloat16")
    cuts = [name for names in marks.SHAPES.values() for name in names]
    assert [row["config"] for row in rows if row["status"] == "failed"] == [name for name in cuts if "in turn" in name]
    assert len([row for row in rows if row["status"] == "ok"]) == len(marks.THREADS) * sum(
        "in turn" not in name for name in cuts
    )
    assert {row.get("us") for row in rows} == {None, 2.5}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_probe_of_rates_compiles(tmp_path: Path) -> None:
    """Into a library that has what the job calls."""
    with loaded("rates") as modules:
        library = ctypes.CDLL(str(modules["rates"].compiled(tmp_path / "rates.so")))
    names = ("rate_products", "rate_copies", "rate_lines", "rate_exchanges", "rate_clusters")
    assert all(hasattr(library, name) for name in names) and not hasattr(library, "rate_nothing")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["launch.cu", "conv_bfloat16_behind.cu", "pooled_bfloat16.cu", "walk_launch.cu"])
def test_a_build_with_marks_compiles(source: str, tmp_path: Path) -> None:
    """The other one, without, is what everything else compiles."""
    command = ["nvcc", "-std=c++17", "-DINCEPTION_FAST_MARKS", "-gencode=arch=compute_90a,code=sm_90a", "-c"]
    subprocess.run([*command, str(HEADER.with_name(source)), "-o", str(tmp_path / "it.o")], check=True, timeout=300)
    symbols = subprocess.run(["nm", "-C", str(tmp_path / "it.o")], capture_output=True, text=True, check=True).stdout
    assert ("T hopper_marks" in symbols) == (source == "launch.cu") and "all_marks" in symbols
