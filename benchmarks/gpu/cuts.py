"""The CUDA kernels on a network's own convolutions and pairs beside Triton's best tiles, as rows of shipped data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hopper import fused_call, pair_truth
from inception_fast.kernels import cuda
from inception_fast.kernels.cuda import abi, choices, convolve, pair, pooled, tune
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.cuda.loader import Config
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from journal import broken_context
from measure import CHECKED, DEVICE, LAYER_BUDGET, checked, draw
from store import read_results
from timing import device_seconds, summary
from torch import Tensor
from torch.nn import functional as F

from inception_fast.backends import hopper_gpu
from inception_fast.engine.gpu_tune import Wanted, pool_call, scattered

QUICK, ROUNDS = 3, 11  # of all, then of the best
PREPARED = 400_000  # cycles of a backlog in which the host launches what is prepared


def shape_of(spec: ConvSpec, kernel: str = "conv") -> Shape | None:
    """By which a row is looked up; None in a format that has none."""
    return hopper_gpu.shape_of(spec, kernel) if spec.dtype in abi.TYPES else None


def shipped_seconds() -> dict[Shape | None, float]:
    """The time of every shape that ships with a row measured on this GPU, by these kernels or Triton's."""
    gpu = torch.cuda.get_device_name()
    return {row.shape: min(row.seconds, row.against) for row in choices.shipped() if row.gpu == gpu}


def conv_row(one: Wanted, triton: Callable[[], Tensor]) -> dict[str, Any]:
    """The fastest cut, raced with Triton's best tile, both with all destinations; a note where these kernels do not run
    the convolution. Raises RuntimeError where the two kinds do not agree.
    """
    spec = one.spec
    why = hopper_gpu.spec_reasons(cuda.library(), spec)
    if why:
        return {"cuda": "; ".join(why)}
    x, *params = draw(spec)
    found = tune.tried(cuda.library(), spec, x, *params, _quick, residual=one.old(x.device))
    made = scattered(one, *one.drawn(draw), found)
    if not made:
        return {"cuda": f"none of {len(found)} cuts scatters to {[group.oc for group in one.groups]} columns"}
    wanted, calls = triton().float(), {f"{cut.config.name} in {cut.splits}": call for cut, call in made.items()}
    for name, call in calls.items():
        off = float((call().float() - wanted).abs().max() / wanted.abs().max())
        if not off <= LAYER_BUDGET[spec.dtype]:
            raise RuntimeError(f"{name} is off Triton's result by {off:.3g} of the largest value")
    best, times = list(made), medians({"triton": triton, **calls})
    name = min(calls, key=times.__getitem__)
    cut: Cut = best[list(calls).index(name)]
    won = (cut.config.name, cut.splits, times[name], times["triton"])
    choice = [torch.cuda.get_device_name(), *hopper_gpu.shape_of(spec), *won]
    others = {name: times[name] * 1e3 for name in calls}
    about = {"residual": one.residual, "cuda_ms": times[name] * 1e3, "triton_ms": times["triton"] * 1e3}
    return {"cuda": name, **about, "cuts_ms": others, "choice": choice}


def pair_row(spec: PairSpec, separate: float) -> dict[str, Any]:
    """The fastest fused kernel of a pair, beside its two convolutions by whatever is faster for each."""
    able = {config.name: config for config in pair.able(cuda.library(), spec)}
    if not able:
        return {"cuda": "; ".join(pair.spec_reasons(cuda.library(), spec))}
    x, *one = draw(spec.first)
    _, *two = draw(spec.second)
    params = (tuple(one), tuple(two))
    makers: dict[str, Any] = {n: lambda config=c: fused_call(spec, x, params, config) for n, c in able.items()}
    wanted = pair_truth(spec, x[:CHECKED], params)
    rows, calls = checked(makers, {}, wanted, lambda runtime: 2 * LAYER_BUDGET[spec.first.dtype])
    if not calls:
        return {"cuda": "wrong", "status": "failed", "note": str(rows)[:400]}
    times = medians(calls)
    name = min(times, key=times.__getitem__)
    shape = hopper_gpu.shape_of(spec.second, "pair")
    choice = [torch.cuda.get_device_name(), *shape, name, 1, times[name], separate]
    wrong = {n: row for n, row in rows.items() if n not in calls}
    said = {"status": "failed", "note": str(wrong)[:400]} if wrong else {}
    return {"cuda": name, "cuda_ms": times[name] * 1e3, "separate_ms": separate * 1e3, "choice": choice, **said}


def pooled_row(spec: ConvSpec, pool: PoolSpec, separate: float) -> dict[str, Any]:
    """The fastest kernel of a convolution with the maximum behind it, beside the convolution by whatever is faster,
    `separate` seconds, and Triton's pool, timed here.
    """
    why = pooled.spec_reasons(cuda.library(), spec, pool)
    if why:
        return {"cuda": "; ".join(why)}
    x, *params = draw(spec)
    able = {config.name: config for config in pooled.able(cuda.library(), spec, pool)}
    makers: dict[str, Any] = {n: lambda config=c: pooled_call(spec, pool, x, params, config) for n, c in able.items()}
    rows, calls = checked(makers, {}, pooled_truth(spec, pool, x[:CHECKED], params), lambda _: LAYER_BUDGET[spec.dtype])
    if not calls:
        return {"cuda": "wrong", "status": "failed", "note": str(rows)[:400]}
    times = medians({**calls, "pool": pool_call(pool, DEVICE)})
    alone = times.pop("pool")
    name = min(times, key=times.__getitem__)
    shape = hopper_gpu.shape_of(spec, "pooled")
    choice = [torch.cuda.get_device_name(), *shape, name, 1, times[name], separate + alone]
    parts = {"pool_ms": alone * 1e3, "separate_ms": (separate + alone) * 1e3}
    others = {one: seconds * 1e3 for one, seconds in times.items()}
    wrong = {n: row for n, row in rows.items() if n not in calls}
    said = {"status": "failed", "note": str(wrong)[:400]} if wrong else {}
    return {"cuda": name, "cuda_ms": times[name] * 1e3, **parts, "cuts_ms": others, "choice": choice, **said}


def pooled_truth(spec: ConvSpec, pool: PoolSpec, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """In float64 all through."""
    weight, scale, shift = (tensor.double() for tensor in params)
    beyond = (spec.padding[2], spec.padding[3], spec.padding[0], spec.padding[1])
    y = torch.conv2d(F.pad(x.double(), beyond), weight)
    y = y * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    y = F.max_pool2d(y, 3, 2, ceil_mode=pool.overhang != (0, 0))
    return y.relu() if spec.relu else y


def pooled_call(
    spec: ConvSpec, pool: PoolSpec, x: Tensor, params: Sequence[Tensor], config: Config
) -> Callable[[], Tensor]:
    """A prepared launch and its result, logically NCHW."""
    y = torch.empty(pool.n, pool.oh, pool.ow, pool.c, dtype=x.dtype, device=x.device)
    weight, scale, shift = params
    packed = convolve.pack(weight, scale, shift, x.dtype, x.device)
    target = (Target(dense(y), spec.relu),)
    problem = Problem(spec, hopper_gpu.nhwc(x), packed, target, pooled=(pool.oh, pool.ow))
    launch = convolve.group("pooled", cuda.library(), [problem], Cut(config))

    def call() -> Tensor:
        launch.run()
        return y.permute(0, 3, 1, 2)

    return call


def guarded(race: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What a race finds, or its failure. Raises RuntimeError where nothing else can run after it."""
    try:
        return race(*given)
    except (RuntimeError, ValueError) as problem:
        lost = broken_context()
        if lost:
            raise RuntimeError(lost) from problem
        return {"cuda": "failed", "status": "failed", "note": f"{type(problem).__name__}: {problem}"[:800]}


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    return {name: summary(s)["median_ms"] / 1e3 for name, s in device_seconds(calls, ROUNDS).items()}


def _quick(call: Callable[[], Any]) -> float:
    return summary(device_seconds({"it": call}, QUICK, backlog=PREPARED)["it"])["median_ms"] / 1e3


def measured(results: Path) -> list[Row]:
    """The choices in a file of results: of single layers, then of networks' own shapes, which win where both are, then
    of walks.
    """
    found = read_results(results)
    kinds = [
        [result for name, result in found.items() if name.startswith(kind)]
        for kind in ("hopper/", "tiles/", "network/")
    ]
    rows = [row for kind in kinds for result in kind for row in result.get("rows", [])]
    return [choices.row_of(row["choice"]) for row in rows if "choice" in row]


@contextlib.contextmanager
def known(rows: Iterable[Row]) -> Iterator[None]:
    """Inside, ours chooses by these as well, as if the user's cache held them."""
    before, more = hopper_gpu.measured, tuple(rows)

    def measured_here(device: torch.device) -> tuple[str, tuple[Row, ...]]:
        gpu, shipped = before(device)
        return gpu, (*shipped, *more)

    hopper_gpu.measured = measured_here  # type: ignore[assignment]
    try:
        yield
    finally:
        hopper_gpu.measured = before
