"""Measured tiles for a network's own convolutions, and the network with tiles that were measured before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuts
import torch
from inception_fast.kernels.plan import PairStep
from inception_fast.kernels.spec import PairSpec
from inception_fast.kernels.triton import configs, tune
from inception_fast.kernels.triton.configs import Config, Row
from inception_fast.kernels.triton.convolve import pack
from measure import draw
from networks import network_of
from store import read_results
from timing import device_seconds, summary

import inception_fast as fast
from inception_fast.backends import triton_gpu
from inception_fast.engine.gpu_hopper import pair_of
from inception_fast.engine.gpu_plan import GpuPlan
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.gpu_tune import Wanted, pools_of, triton_call, wanted

TRIED = 6  # wide tiles and the cost model's favourites
ROUNDS = 5
LEAST_GAIN = 0.98  # of the first proposal's time: less is noise, and the first stays
PARTS = ("", "cuda", "new")


def tile_rows(model: str, n: int, dtype: str, part: str = "", cuda: bool = True) -> Iterator[list[dict[str, Any]]]:
    """The best tile of every convolution that the network's plan has and, with `cuda` and where the CUDA kernels run,
    the best of these for it, for its pairs and for it with its pool, as rows of the shipped data; all so far. `part`
    "cuda": only the CUDA kernels, beside the tile that ships; "new": these for shapes without a shipped row of their
    own. Raises ValueError for another.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} of a network; allowed: none, {', '.join(filter(None, PARTS))}")
    alone, done = bool(part), cuts.shipped_seconds() if part == "new" else {}
    arch = configs.arch_of(torch.cuda.get_device_capability())
    plans = plans_of(model, n, dtype)
    every = wanted(task for plan in plans for task in plan.tasks)
    if alone:
        every = [one for one in every if not one.stem]
    fastest = {one.spec: seconds for one in every if (seconds := done.get(cuts.shape_of(one.spec))) is not None}
    every = [one for one in every if one.spec not in fastest]
    compile_beside(every, arch, alone)
    hopper = cuda and cuda_here()
    rows: list[dict[str, Any]] = []
    for one in every:
        spec = one.spec
        about = {"model": model, "batch": n, "dtype": dtype, "shape": str(spec)}
        about["columns"] = [group.oc for group in one.groups]
        try:
            row, call = shipped_tile(one, arch) if alone else tile_row(one, arch)
        except RuntimeError as problem:
            rows.append({**about, "status": "failed", "note": str(problem)[:400]})
            yield rows
            continue
        raced = cuts.guarded(cuts.conv_row, one, call) if hopper else {}
        times = [ms for ms in (row.get("best_ms"), raced.get("triton_ms"), raced.get("cuda_ms")) if ms is not None]
        if times:
            fastest[spec] = min(times) / 1e3
        rows.append({**about, **row, **raced})
        yield rows
    for spec in chains_of(plans) if hopper else ():
        if cuts.shape_of(spec.second, "pair") in done:
            continue
        halves = [replace(half, residual=False) for half in (spec.first, spec.second)]
        if all(half in fastest for half in halves):
            about = {"model": model, "batch": n, "dtype": dtype, "shape": str(spec), "status": "ok"}
            rows.append({**about, **cuts.guarded(cuts.pair_row, spec, sum(fastest[half] for half in halves))})
            yield rows
    for conv, pool in pools_of(plans) if hopper else ():
        if cuts.shape_of(conv, "pooled") in done or conv not in fastest:
            continue
        about = {"model": model, "batch": n, "dtype": dtype, "shape": f"{conv} then {pool}", "status": "ok"}
        rows.append({**about, **cuts.guarded(cuts.pooled_row, conv, pool, fastest[conv])})
        yield rows


def tile_row(one: Wanted, arch: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The best tile's row, and a call of it. Raises RuntimeError where none runs."""
    spec, (x, parts) = one.spec, one.drawn(draw)
    found = tune.tried(spec, x, parts, arch, _seconds, count=TRIED, stem=one.stem, residual=one.old(x.device))
    first, best = next(iter(found)), min(found, key=found.__getitem__)
    best = best if found[best] < LEAST_GAIN * found[first] else first
    kept = tune.row_of(spec, arch, best, found[best])
    times = {"first_ms": found[first] * 1e3, "best_ms": found[best] * 1e3}
    row = [*kept[:5], list(vars(best).values()), found[best]]
    about = {"status": "ok", "row": row, "config": str(best), "tried": len(found), **times}
    return about, triton_call(one, x, parts, best)


def shipped_tile(one: Wanted, arch: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """A call of the tile that ships for a convolution, not timed here."""
    x, parts = one.drawn(draw)
    groups = pack(parts, getattr(torch, one.spec.dtype), x.device).groups
    config = tune.proposals(one.spec, arch, groups=groups)[0]
    return {"status": "ok", "config": str(config)}, triton_call(one, x, parts, config)


def plans_of(model: str, n: int, dtype: str) -> list[GpuPlan]:
    """The network's plans, on Triton's kernels."""
    net, x = network_of(model, n)
    made = fast.optimize(net, x, dtype=getattr(torch, dtype), backend="triton")
    executable, _ = made._session.executable([x])
    assert isinstance(executable, GpuCompiled)
    return list(executable.native.values())


def chains_of(plans: Sequence[GpuPlan]) -> list[PairSpec]:
    """The distinct pairs that could be one launch."""
    steps = [step for plan in plans for step in plan.plan.steps if isinstance(step, PairStep)]
    return list(dict.fromkeys(pair_of(step) for step in steps if step.kind == "chain"))


def cuda_here() -> bool:
    return bool(fast.backend_status()["cuda"])


def compile_beside(every: Sequence[Wanted], arch: str, shipped: bool = False) -> list[str]:
    """Fills Triton's cache by all cores: compiling one after the other takes ten times as long as timing. What failed,
    which fails again, and is reported, where it is timed.
    """
    if not every:
        return []
    context = multiprocessing.get_context("spawn")
    workers = min(len(every), os.cpu_count() or 1, 16)
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        done = [pool.submit(_compiled, one, arch, shipped) for one in every]
        return [f"{type(error).__name__}: {error}" for future in done if (error := future.exception())]


def _compiled(one: Wanted, arch: str, shipped: bool) -> None:
    torch.set_num_threads(1)
    if shipped:
        shipped_tile(one, arch)[1]()
        return
    x, parts = one.drawn(draw)
    tune.tried(one.spec, x, parts, arch, lambda call: 0.0, count=TRIED, stem=one.stem, residual=one.old(x.device))


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
