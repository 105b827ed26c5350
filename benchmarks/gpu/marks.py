"""Where the time of a block of the Hopper convolutions goes, by what its threads leave in a build with marks."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inception_fast.kernels.cuda import convolve
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.cuda.loader import Library
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec
from measure import draw
from timing import FLUSH_BYTES
from turns import alone

# As in kernels/cuda/marks.cuh.
TILE, READY, END, TURN, SPENT, ISSUED, SUMS, STORED = range(1, 9)
THREADS = ("x", "weights", "first", "second", "third", "fourth")  # that load, and warpgroups that multiply
MARKS = 2048
PREPARED = 400_000  # cycles of a backlog in which the host launches
# Products of a 1x1 with and without a residual, of few and of many channels, of a 3x3 and of lines, by every way of
# sharing tiles. (h, c, oc, kh, kw, residual): cuts.
SHAPES: dict[tuple[int, int, int, int, int, bool], tuple[str, ...]] = {
    (17, 384, 1088, 1, 1, True): (
        "64x224x64 s5 c2 in turn",
        "128x224x64 s4",
        "128x224x64 s3 behind",
        "128x224x64 s3 c2 behind",
        "128x192x64 s4 behind",
    ),
    (35, 128, 320, 1, 1, True): ("128x160x64 s5", "128x160x64 s4 behind"),
    (35, 384, 320, 1, 1, False): ("128x112x64 s6 in turn", "128x160x64 s5", "128x160x64 s4 behind"),
    (17, 192, 192, 1, 7, False): (
        "128x96x64 s6 in turn",
        "128x96x64 s6 behind",
        "128x192x64 s5",
        "128x192x64 s4 behind",
    ),
    (17, 224, 256, 7, 1, False): ("128x128x64 s5 in turn", "128x256x64 s4", "128x256x64 s3 behind"),
    (17, 1088, 320, 1, 1, False): (
        "128x112x64 s6 in turn",
        "128x160x64 s5",
        "64x160x64 s7 in turn",
        "128x160x64 s4 behind",
    ),
    (17, 1024, 896, 1, 1, False): (
        "128x128x64 s5 in turn",
        "64x256x64 s5 in turn",
        "128x256x64 s4",
        "128x256x64 s3 behind",
        "128x224x64 s3 behind",
    ),
    (35, 256, 256, 3, 3, False): (
        "128x128x64 s5 in turn",
        "64x256x64 s5 in turn",
        "128x256x64 s4",
        "128x256x64 s3 behind",
    ),
}
STORING = {"third": "stores first", "fourth": "stores second"}  # where tiles are stored behind: for whom
# What a thread does between a mark and the next one, by the later's kind. Who stores waits for results at its "turn".
LOADING = {READY: "sets up", END: "loads"}
MULTIPLYING = {TURN: "waits for its turn", ISSUED: "issues products", SUMS: "waits for sums", STORED: "stores"}


def mark_rows(library: Library, batch: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """A row for each cut and thread: medians of cycles a tile, and beside all of its cycles the launch's time, by which
    the clock is known; all so far.
    """
    rows: list[dict[str, Any]] = []
    for (size, c, oc, kh, kw, residual), names in SHAPES.items():
        padding = (kh // 2, kh // 2, kw // 2, kw // 2)
        spec = ConvSpec(batch, size, size, c, oc, kh, kw, (1, 1), padding, residual=residual, dtype=dtype)
        for name in names:
            about = {"runtime": "ours", "shape": str(spec), "config": name}
            try:
                found, microseconds = marked(library, spec, name)
            except (RuntimeError, ValueError) as problem:
                rows.append({**about, "status": "failed", "note": str(problem)[:400]})
            else:
                about |= {"status": "ok", "us": microseconds}
                rows += [{**about, **row} for row in summaries(found, "behind" in name)]
            yield rows


def marked(library: Library, spec: ConvSpec, name: str) -> tuple[np.ndarray[Any, Any], float]:
    """[thread, mark, (kind, cycles)] of a launch with cold caches, behind one that warms nothing but the code, and its
    microseconds by events.
    """
    x, weight, scale, shift = draw(spec)
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    packed = convolve.pack(weight, scale, shift, x.dtype, x.device)
    y = torch.empty(spec.n, spec.oh, spec.ow, spec.oc, dtype=x.dtype, device=x.device)
    old = dense(torch.randn_like(y)) if spec.residual else None
    problem = Problem(spec, source, packed, (Target(dense(y), spec.relu),), old)
    launch = convolve.group("marks", library, [problem], Cut(library.config(name)))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=x.device)
    found = np.zeros((len(THREADS), MARKS, 2), np.uint32)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with alone():
        for _ in range(2):
            taken(library, None)
            flush.zero_()
            torch.cuda._sleep(PREPARED)
            begin.record()
            launch.run()
            end.record()
            torch.cuda.synchronize()
        taken(library, found)
    return found, begin.elapsed_time(end) * 1e3


def taken(library: Library, to: np.ndarray[Any, Any] | None) -> None:
    """The marks of the last launch, which are gone then. Raises RuntimeError where there are none to be had."""
    call = ctypes.CDLL(str(library.file)).hopper_marks
    call.argtypes = (ctypes.c_void_p,)
    if call(None if to is None else to.ctypes.data):
        raise RuntimeError("the marks cannot be read")


def summaries(found: np.ndarray[Any, Any], behind: bool = False) -> Iterator[dict[str, Any]]:
    """Of each thread that left marks, its tiles, the cycles from its first mark to its last, and the median cycles of
    each part of a tile, the first tile left out.
    """
    for who, marks in zip(THREADS, found.tolist(), strict=True):
        parts: dict[str, list[int]] = {}
        tiles, before, first = -1, 0, marks[0][1]
        for kind, cycles in marks:
            if kind == 0:
                break
            if kind == SPENT:
                if tiles > 0:
                    parts.setdefault("waits for stages", []).append(cycles)
                continue
            tiles += kind == TILE
            name = (LOADING | MULTIPLYING).get(kind, "goes on")
            if tiles > 0:
                parts.setdefault(name, []).append((cycles - before) % (1 << 32))
            before = cycles
        if tiles >= 0:
            medians = {name: statistics.median(values) for name, values in parts.items()}
            thread = STORING.get(who, who) if behind else who
            yield {"thread": thread, "tiles": tiles + 1, "span": (before - first) % (1 << 32), "cycles": medians}


def library_of(file: Path) -> Library:
    """Raises RuntimeError for one that was built without marks."""
    library = Library(file)
    if not hasattr(ctypes.CDLL(str(file)), "hopper_marks"):
        raise RuntimeError(f"{file} leaves no marks; allowed: the target hopper_marks")
    return library
