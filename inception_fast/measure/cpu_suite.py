"""Studies of the native kernels beside whole networks: fused pairs, how cost grows with the work, the first call."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.plan import ALIGNMENT, Buffer, ConvStep, Output, PairStep, Plan, View
from ..kernels.spec import ConvSpec, PairSpec
from .timer import Plan as Rounds
from .timer import interleave, summarise

BATCHES = (4, 8, 16, 32, 64)
SETTLE = 10  # untimed calls before a timed one of some hundred microseconds
SIDES = (75, 107, 139, 203, 267, 299, 427, 600)


@dataclass(frozen=True)
class PairRow:
    """A 1xn, nx1 pair: microseconds of our two convolutions, of our fused operator, of oneDNN's two through torch.

    `fused` says which form the plans take, `gflops` is the rate of that form, and `mixed_us` its time right after a
    call of oneDNN's, where a program mixes plans with torch's operators; the other times are those of settled calls.
    """

    pair: str
    count: int
    batch: int
    dtype: str
    separate_us: float
    fused_us: float
    onednn_us: float
    mixed_us: float
    fused: bool
    gflops: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def distinct_pairs(models: Iterable[nn.Module], size: int = 299) -> dict[PairSpec, int]:
    """The chains in the plans of some networks for one image, with how often each occurs."""
    from ..engine import optimize

    found: dict[PairSpec, int] = {}
    for model in models:
        fast = optimize(model, torch.zeros(1, 3, size, size))
        for step in (step for plan in fast.native_plans() for step in plan.steps):
            if isinstance(step, PairStep) and step.kind == "chain":
                pair = PairSpec(step.first.spec, step.second.spec)
                found[pair] = found.get(pair, 0) + 1
    return found


def resized(pair: PairSpec, batch: int, dtype: str) -> PairSpec:
    return PairSpec(replace(pair.first, n=batch, dtype=dtype), replace(pair.second, n=batch, dtype=dtype))


def time_pair(pair: PairSpec, count: int, threads: int, rounds: Rounds) -> PairRow:
    """Our two forms, which must give the same bits, and oneDNN's, in turns."""
    a, b = pair.first, pair.second
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s.oc, s.c, s.kh, s.kw, generator=generator) / (s.c * s.kh * s.kw) ** 0.5 for s in (a, b)]
    x = torch.randn(a.n, a.c, a.h, a.w, generator=generator).relu()
    forms = {"separate": _runner(pair, weights, x, threads, False), "fused": _runner(pair, weights, x, threads, True)}
    if not torch.equal(*(form() for form in forms.values())):
        raise AssertionError(f"the fused pair differs from its two convolutions: {pair}")
    calls: dict[str, Callable[[], object]] = {**forms, "onednn": _onednn(pair, weights, x)}
    # Behind another runtime's call the first ones share the cores with its waiting threads.
    settled = replace(rounds, settle=max(rounds.settle, SETTLE)) if a.n == 1 else rounds
    samples = interleave(calls, settled)
    fused = cpu.fuses(pair, threads)
    form = "fused" if fused else "separate"
    samples["mixed"] = interleave({form: forms[form]}, replace(rounds, settle=0), before=calls["onednn"])[form]
    medians = {name: summarise(times).median for name, times in samples.items()}
    best = medians[form]
    separate, together, onednn, mixed = (1e6 * medians[name] for name in ("separate", "fused", "onednn", "mixed"))
    shape = f"{a.h}x{a.w} {a.c}-{a.oc}-{b.oc} {a.kh}x{a.kw} {b.kh}x{b.kw}"
    return PairRow(shape, count, a.n, a.dtype, separate, together, onednn, mixed, fused, pair.flops() / best / 1e9)


def _runner(pair: PairSpec, weights: list[Tensor], x: Tensor, threads: int, fused: bool) -> Callable[[], Tensor]:
    a, b = pair.first, pair.second
    dtype = getattr(torch, a.dtype)
    x = x.to(dtype, memory_format=torch.channels_last)
    middle = Buffer(a.n, a.oh, a.ow, a.oc, "local" if fused else "arena", 0, a.dtype)
    buffers = (
        Buffer(a.n, a.h, a.w, a.c, "input", 0, a.dtype),
        middle,
        Buffer(b.n, b.oh, b.ow, b.oc, "output", 0, b.dtype),
    )
    views = [View(i, 0, buffer.c) for i, buffer in enumerate(buffers)]
    steps = [
        ConvStep("conv", spec, views[i], weights[i].numpy(), *_affine(spec), (Output(views[i + 1], True),))
        for i, spec in enumerate((a, b))
    ]
    plan = Plan(buffers, (PairStep("pair", "chain", *steps),), ((a.n, a.c, a.h, a.w),), middle.bytes)
    compiled = cpu.compile(plan)
    whole = torch.empty(middle.bytes + ALIGNMENT, dtype=torch.uint8)
    arena = -(-whole.data_ptr() // ALIGNMENT) * ALIGNMENT
    y = torch.empty(b.n, b.oh, b.ow, b.oc, dtype=dtype)
    n, c, h, w = x.stride()
    arguments = [(x.data_ptr(), a.dtype, (n, c, h, w))]

    def run() -> Tensor:
        assert whole is not None and x is not None  # they live as long as their addresses are used
        compiled.run(arguments, [y.data_ptr()], arena, threads)
        return y

    return run


def _affine(spec: ConvSpec) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(spec.oc, np.float32), np.zeros(spec.oc, np.float32)


def _onednn(pair: PairSpec, weights: list[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """torch's convolutions, which oneDNN runs, with batch norm folded in, channels_last, ReLU in place."""
    dtype = getattr(torch, pair.first.dtype)
    layout = torch.channels_last
    x, first, second = (t.to(dtype, memory_format=layout) for t in (x, *weights))
    one, two = (torch.zeros(w.shape[0], dtype=dtype) for w in weights)
    pads = [(s.padding[0], s.padding[2]) for s in (pair.first, pair.second)]

    def run() -> Tensor:
        with torch.inference_mode():
            return F.conv2d(F.conv2d(x, first, one, 1, pads[0]).relu_(), second, two, 1, pads[1]).relu_()

    return run


def growth(
    model: nn.Module, dtype: str, threads: Iterable[int], batches: Iterable[int], sides: Iterable[int], rounds: Rounds
) -> Iterator[dict[str, Any]]:
    """Rows of ours alone: {"axis": "batch" or "side", "value", "threads", "dtype", "ms_per_image", "gflops"}."""
    from ..engine import optimize
    from .flops import layers, totals

    before = torch.get_num_threads()
    axes = [("batch", value, (value, 3, 299, 299)) for value in batches]
    axes += [("side", value, (1, 3, value, value)) for value in sides]
    for axis, value, shape in axes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        fast = optimize(model, x, dtype=getattr(torch, dtype))
        macs, _ = totals(layers(model, x[:1]))
        for count in threads:
            torch.set_num_threads(count)
            own = rounds if count > 1 else replace(rounds, warm=0.0)  # one thread has no other to wake
            try:
                median = summarise(interleave({"ours": lambda: fast(x)}, own)["ours"]).median / len(x)  # noqa: B023
            finally:
                torch.set_num_threads(before)
            row = {"axis": axis, "value": value, "threads": count, "dtype": dtype, "ms_per_image": 1e3 * median}
            yield row | {"gflops": 2 * macs / median / 1e9}


def first_call(model: nn.Module, dtype: str, x: Tensor | None = None, winograd: bool = False) -> dict[str, Any]:
    """What a network costs before it is fast: seconds of optimising, of packing alone, of the first call; bytes.

    `grew_bytes` is by how much the process's peak of resident memory rose from before `optimize` to after the call,
    `files_bytes` what of it are pages of files, as of torch's code where it first ran: the system can drop them.
    """
    from ..engine import optimize

    if x is None:
        x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    before, files = _peak_bytes(reset=True), _status_bytes("RssFile")
    start = time.perf_counter()
    fast = optimize(model, x, dtype=getattr(torch, dtype), winograd=winograd)
    optimised = time.perf_counter()
    risen = _peak_bytes()
    resident = _peak_bytes(reset=True)
    fast(x)
    called = time.perf_counter()
    called_peak, called_files = _peak_bytes(), _status_bytes("RssFile")
    again = time.perf_counter()
    packed = [cpu.compile(plan) for plan in fast.native_plans()]
    return {
        "dtype": dtype,
        "winograd": winograd,
        "optimize_s": optimised - start,
        "packing_s": time.perf_counter() - again,
        "first_call_s": called - optimised,
        "packed_bytes": sum(compiled.packed_bytes for compiled in packed),
        "arena_bytes": max(compiled.arena_bytes for compiled in packed),
        "first_call_grew_bytes": max(0, called_peak - resident),
        "grew_bytes": max(0, risen - before, called_peak - before),
        "files_bytes": max(0, called_files - files),
    }


def first_call_alone(name: str, dtype: str, winograd: bool = False, threads: int = 1) -> dict[str, Any]:
    """`first_call` of a fresh `name` in a process of its own: in one that had networks before, theirs hide its memory.

    A small convolution runs there first, so that imports are not counted; what capturing the network leaves behind is.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_first_call_of, name, dtype, winograd, threads).result()


def _first_call_of(name: str, dtype: str, winograd: bool, threads: int) -> dict[str, Any]:
    from .. import create_model, optimize

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.zeros(1, 3, 5, 5)
        optimize(nn.Conv2d(3, 8, 3).eval(), x)(x)
        return first_call(create_model(name).eval(), dtype, winograd=winograd)


def _peak_bytes(reset: bool = False) -> int:
    """The largest resident set since the last reset; 0 where the system does not tell."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """A size of the process's memory by its name in Linux's `proc_pid_status(5)`; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
