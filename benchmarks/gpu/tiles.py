"""Measured tiles for a network's own convolutions, and the network with tiles that were measured before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton import configs, tune
from inception_fast.kernels.triton.configs import Config, Row
from measure import draw
from networks import network_of
from store import read_results
from timing import device_seconds, summary

import inception_fast as fast
from inception_fast.backends import triton_gpu
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.gpu_tune import wanted_specs

TRIED = 8  # of the cost model's favourites, each in both forms
ROUNDS = 9
LEAST_GAIN = 0.98  # of the first proposal's time: less is noise, and the first stays


def tile_rows(model: str, n: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """The best tile of every convolution that the network's plan has, as rows of the shipped data; all so far."""
    arch = configs.arch_of(torch.cuda.get_device_capability())
    specs = specs_of(model, n, dtype)
    compile_beside(specs, arch)
    rows: list[dict[str, Any]] = []
    for spec in specs:
        about = {"model": model, "batch": n, "dtype": dtype, "shape": str(spec)}
        try:
            found = tune.tried(spec, *draw(spec), arch, _seconds, count=TRIED)
        except RuntimeError as problem:
            rows.append({**about, "status": "failed", "note": str(problem)[:400]})
            yield rows
            continue
        first, best = next(iter(found)), min(found, key=found.__getitem__)
        best = best if found[best] < LEAST_GAIN * found[first] else first
        kept = tune.row_of(spec, arch, best, found[best])
        row = [*kept[:5], list(vars(best).values()), found[best]]
        times = {"first_ms": found[first] * 1e3, "best_ms": found[best] * 1e3}
        rows.append({**about, "status": "ok", "row": row, "config": str(best), "tried": len(found), **times})
        yield rows


def specs_of(model: str, n: int, dtype: str) -> list[ConvSpec]:
    """The network's distinct convolutions as the plan has them, siblings merged."""
    net, x = network_of(model, n)
    made = fast.optimize(net, x, dtype=getattr(torch, dtype), backend="triton")
    executable, _ = made._session.executable([x])
    assert isinstance(executable, GpuCompiled)
    return wanted_specs([task for plan in executable.native.values() for task in plan.tasks])


def compile_beside(specs: Sequence[ConvSpec], arch: str) -> list[str]:
    """Fills Triton's cache by all cores: compiling one after the other takes ten times as long as timing. What failed,
    which fails again, and is reported, where it is timed.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(len(specs), os.cpu_count() or 1, 16)
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        done = [pool.submit(_compiled, spec, arch) for spec in specs]
        return [f"{type(error).__name__}: {error}" for future in done if (error := future.exception())]


def _compiled(spec: ConvSpec, arch: str) -> None:
    torch.set_num_threads(1)
    tune.tried(spec, *draw(spec), arch, lambda call: 0.0, count=TRIED)


def _seconds(call: Any) -> float:
    return summary(device_seconds({"it": call}, ROUNDS)["it"])["median_ms"] / 1e3


def measured(results: Path) -> list[Row]:
    """The tiles in a file of results, of every job that measured some on a GPU of this kind."""
    arch = configs.arch_of(torch.cuda.get_device_capability())
    found = read_results(results)
    tiles = [row for name, result in found.items() if name.startswith("tiles/") for row in result.get("rows", [])]
    given = [row["row"] for row in tiles if "row" in row]
    rows = [Row(r[0], r[1], int(r[2]), int(r[3]), int(r[4]), Config(*r[5]), r[6]) for r in given]
    return [row for row in rows if row.arch == arch]


@contextlib.contextmanager
def known(rows: Sequence[Row]) -> Iterator[None]:
    """Inside, ours looks tiles up among these as well, as if the user's cache held them."""
    before = configs.tuned
    triton_gpu._rows.cache_clear()
    configs.tuned = lambda gpu: (*before(gpu), *rows)
    try:
        yield
    finally:
        configs.tuned = before
        triton_gpu._rows.cache_clear()
