"""Where the time of a block of the Hopper convolutions goes, by what its threads leave in a build with marks."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from inception_fast.kernels.cuda import convolve
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.cuda.loader import Library
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from measure import draw
from timing import FLUSH_BYTES
from turns import alone

# As in kernels/cuda/marks.cuh.
TILE, READY, END, TURN, SPENT, ISSUED, SUMS, STORED = range(1, 9)
THREADS = ("x", "weights", "first", "second", "third", "fourth")  # that load, and warpgroups that multiply
MARKS = 2048
PREPARED = 400_000  # cycles of a backlog in which the host launches


class Shape(NamedTuple):
    """A convolution on a square map of `size`. Its padding keeps the map where `same`."""

    size: int
    c: int
    oc: int
    kh: int = 1
    kw: int = 1
    residual: bool = False
    same: bool = True

    def spec(self, batch: int, dtype: str) -> ConvSpec:
        padding = (self.kh // 2, self.kh // 2, self.kw // 2, self.kw // 2) if self.same else (0, 0, 0, 0)
        sizes = (batch, self.size, self.size, self.c, self.oc, self.kh, self.kw)
        return ConvSpec(*sizes, padding=padding, residual=self.residual, dtype=dtype)


# Products of a 1x1 with and without a residual, of few and of many channels, of lines, of a 3x3 and of the stem's, by
# every way of sharing tiles.
SHAPES: dict[Shape, tuple[str, ...]] = {
    Shape(17, 384, 1088, residual=True): (
        "64x224x64 s5 c2 in turn",
        "128x224x64 s4",
        "128x224x64 s3 behind",
        "128x224x64 s3 c2 behind",
        "128x192x64 s4 behind",
    ),
    Shape(35, 128, 320, residual=True): ("128x160x64 s5", "128x160x64 s4 behind"),
    Shape(35, 384, 320): ("128x112x64 s6 in turn", "128x160x64 s5", "128x160x64 s4 behind"),
    Shape(17, 192, 192, 1, 7): (
        "128x96x64 s6 in turn",
        "128x96x64 s6 behind",
        "128x192x64 s5",
        "128x192x64 s4 behind",
        "128x192x64 halo",
    ),
    Shape(17, 224, 256, 7, 1): ("128x128x64 s5 in turn", "128x256x64 s4", "128x256x64 s3 behind"),
    Shape(17, 1088, 320): (
        "128x112x64 s6 in turn",
        "128x160x64 s5",
        "64x160x64 s7 in turn",
        "128x160x64 s4 behind",
    ),
    Shape(17, 1024, 896): (
        "128x128x64 s5 in turn",
        "64x256x64 s5 in turn",
        "128x256x64 s4",
        "128x256x64 s3 behind",
        "128x224x64 s3 behind",
    ),
    Shape(35, 256, 256, 3, 3): (
        "128x128x64 s5 in turn",
        "64x256x64 s5 in turn",
        "128x256x64 s4",
        "128x256x64 s3 behind",
    ),
    Shape(35, 96, 96, 3, 3): ("384x96x32 halo", "128x96x64 s6 in turn"),
    Shape(149, 32, 32, 3, 3, same=False): ("512x32x32 halo by 4", "512x32x32 halo"),
    Shape(147, 32, 64, 3, 3): ("384x64x32 halo by 3", "512x64x32 halo", "256x64x32 pooled"),
    Shape(73, 80, 192, 3, 3, same=False): ("512x64x32 halo", "384x96x32 halo", "256x96x32 pooled"),
}
# Who the last two are where tiles are stored by others, and where these are pooled.
OTHERS = {"behind": ("stores first", "stores second"), "pooled": ("pools first", "pools second")}
# What a thread does between a mark and the next one, by the later's kind. Who stores waits for results at its "turn".
LOADING = {READY: "sets up", END: "loads"}
MULTIPLYING = {TURN: "waits for its turn", ISSUED: "issues products", SUMS: "waits for sums", STORED: "stores"}


def mark_rows(library: Library, batch: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """A row for each cut and thread: medians of cycles a tile, and beside all of its cycles the launch's time, by which
    the clock is known; all so far.
    """
    rows: list[dict[str, Any]] = []
    for shape, names in SHAPES.items():
        spec = shape.spec(batch, dtype)
        for name in names:
            about = {"runtime": "ours", "shape": str(spec), "config": name}
            try:
                found, microseconds = marked(library, spec, name)
            except (RuntimeError, ValueError) as problem:
                rows.append({**about, "status": "failed", "note": str(problem)[:400]})
            else:
                about |= {"status": "ok", "us": microseconds}
                rows += [{**about, **row} for row in summaries(found, name.rpartition(" ")[2])]
            yield rows


def marked(library: Library, spec: ConvSpec, name: str) -> tuple[np.ndarray[Any, Any], float]:
    """[thread, mark, (kind, cycles)] of a launch with cold caches, behind one that warms nothing but the code, and its
    microseconds by events.
    """
    x, weight, scale, shift = draw(spec)
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    packed = convolve.pack(weight, scale, shift, x.dtype, x.device)
    config, pooled = library.config(name), (0, 0)
    if config.pooled:
        pool = PoolSpec(spec.n, spec.oh, spec.ow, spec.oc, 3, 3, (2, 2), dtype=spec.dtype)
        pooled = (pool.oh, pool.ow)
    y = torch.empty(spec.n, *(pooled if config.pooled else (spec.oh, spec.ow)), spec.oc, dtype=x.dtype, device=x.device)
    old = dense(torch.randn_like(y)) if spec.residual else None
    problem = Problem(spec, source, packed, (Target(dense(y), spec.relu),), old, pooled=pooled)
    launch = convolve.group("marks", library, [problem], Cut(config))
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


def summaries(found: np.ndarray[Any, Any], form: str = "") -> Iterator[dict[str, Any]]:
    """Of each thread that left marks, its tiles, the cycles from its first mark to its last, and the median cycles of
    each part of a tile, the first tile left out. `form`: the last word of the configuration's name.
    """
    names = (*THREADS[:-2], *OTHERS.get(form, THREADS[-2:]))
    for who, marks in zip(names, found.tolist(), strict=True):
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
            yield {"thread": who, "tiles": tiles + 1, "span": (before - first) % (1 << 32), "cycles": medians}


def library_of(file: Path) -> Library:
    """Raises RuntimeError for one that was built without marks."""
    library = Library(file)
    if not hasattr(ctypes.CDLL(str(file)), "hopper_marks"):
        raise RuntimeError(f"{file} leaves no marks; allowed: the target hopper_marks")
    return library
