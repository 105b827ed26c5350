"""What is timed on the device: layers, tiles and pairs, beside their peers, after their numbers are right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import xla
from catalogue import BATCHES, LAYERS
from inception_fast.kernels.spec import ConvSpec, PairSpec
from inception_fast.kernels.triton import configs, convolve, launch, pairs, tune
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.convolve import Part
from timing import device_seconds, host_seconds, summary
from torch import Tensor

from inception_fast.backends import triton_gpu

PAIR_SIZES = {
    "v3_192": (192, 192, 192),
    "v3_128": (128, 128, 192),
    "v4_256": (192, 224, 256),
    "resnet_192": (128, 160, 192),
}
PAIR_BATCH = 128
CHECKED = 8  # images of a batch that are compared with float64
# The worst element of one layer whose weights were folded and rounded, then its result: two roundings, and some for
# the sums over products of rounded weights. A tap or a column that is missing is off by 0.1 and more.
LAYER_BUDGET = {"bfloat16": 2e-2, "float16": 2.5e-3}
DEVICE = torch.device("cuda")


def layer_spec(name: str, n: int, dtype: str) -> ConvSpec:
    size, c, oc, kernel, stride, padding = LAYERS[name]
    return ConvSpec(n, size, size, c, oc, *kernel, (stride, stride), padding, dtype=dtype)


def draw(spec: ConvSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in channels_last, weight, scale and shift; random, since zeros shift clocks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    kind = getattr(torch, spec.dtype)
    x = torch.randn(spec.n, spec.c, spec.h, spec.w, device=DEVICE, generator=generator).to(kind)
    weight = torch.randn(spec.oc, spec.c, spec.kh, spec.kw, device=DEVICE, generator=generator)
    weight = (weight / (spec.c * spec.kh * spec.kw) ** 0.5).to(kind)
    scale = torch.rand(spec.oc, device=DEVICE, generator=generator) + 0.5
    shift = torch.randn(spec.oc, device=DEVICE, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), weight, scale, shift


def layer_rows(n: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """Every layer at one batch, ours, eager with cudnn.benchmark, XLA; all rows so far, a layer at a time."""
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    for name in LAYERS:
        spec = layer_spec(name, n, dtype)
        makers, wanted = layer_calls(spec)
        about = {"layer": name, "batch": n, "dtype": dtype}
        found, calls = checked(makers, about, wanted, lambda runtime: LAYER_BUDGET[dtype])
        times = device_seconds({r: c for r, c in calls.items() if r != "xla"}) if calls else {}
        walls = host_seconds({r: many(c) for r, c in calls.items()}, rounds=9) if calls else {}
        for runtime, seconds in times.items():
            found[runtime] |= summary(seconds)
            found[runtime]["tflops"] = spec.flops() / found[runtime]["median_ms"] / 1e9
        for runtime, seconds in walls.items():
            found[runtime]["back_to_back_ms"] = summary(seconds)["median_ms"] / REPEATS
        rows += found.values()
        yield rows


Maker = Callable[[], Callable[[], Any]]


def checked(
    makers: dict[str, Maker], about: dict[str, Any], wanted: Tensor, budget: Callable[[str], float]
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[], Any]]]:
    """A row for each runtime, and the calls whose first `len(wanted)` results are within the budget. A runtime that is
    not installed, or fails, has a row that says so and keeps none of the others from being timed.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for runtime, make in makers.items():
        row = rows[runtime] = {**about, "runtime": runtime}
        try:
            call = make()
            y = as_tensor(call())[: len(wanted)]
            error = error_of(y, wanted)
        except ImportError as problem:
            row |= {"status": "unavailable", "note": str(problem)[:400]}
            continue
        except Exception as problem:
            row |= {"status": "failed", "note": f"{type(problem).__name__}: {problem}"[:400]}
            continue
        right = error <= budget(runtime)  # a NaN is not
        row |= {"rel_error": error if math.isfinite(error) else None, "status": "ok" if right else "wrong"}
        if right:
            calls[runtime] = call
        else:
            row["note"] = worst_of(y, wanted, budget(runtime))
    return rows, calls


def worst_of(y: Tensor, wanted: Tensor, budget: float) -> str:
    """What is wrong about y: how many elements are beyond the budget, where they lie, the first and the worst."""
    off = (y.double() - wanted).abs().nan_to_num(math.inf, math.inf) / wanted.abs().max()
    places = (off > budget).nonzero()
    axes = zip(places.T, y.shape, strict=True)
    spans = ", ".join(f"{axis.min().item()}..{axis.max().item()} of {n}" for axis, n in axes)
    worst = torch.unravel_index(off.argmax(), off.shape)
    named = {"first": tuple(places[0].tolist()), "worst": tuple(int(i) for i in worst)}
    values = ", ".join(f"{name} {at} is {y[at].item():g} for {wanted[at].item():g}" for name, at in named.items())
    return f"{len(places)} of {y.numel()} elements of {tuple(y.shape)} beyond {budget:g}, in {spans}; {values}"


def as_tensor(y: Any) -> Tensor:
    """A result of any runtime, as torch's tensor."""
    if isinstance(y, Tensor):
        return y
    y = torch.from_dlpack(y)
    return y.permute(0, 3, 1, 2) if y.dim() == 4 else y


REPEATS = 20


def many(call: Callable[[], Any]) -> Callable[[], Any]:
    """Calls in a row: what is left of the host's share when it runs ahead."""

    def repeated() -> None:
        for _ in range(REPEATS):
            result = call()
        with contextlib.suppress(AttributeError):
            result.block_until_ready()

    return repeated


def error_of(y: Tensor, wanted: Tensor) -> float:
    return ((y.double() - wanted).abs().max() / wanted.abs().max()).item()


def layer_calls(spec: ConvSpec) -> tuple[dict[str, Maker], Tensor]:
    """The runtimes by name, and what they should give, in float64, of the first images."""
    x, weight, scale, shift = draw(spec)
    folded = (weight.float() * scale[:, None, None, None]).to(x.dtype).contiguous(memory_format=torch.channels_last)
    bias = shift.to(x.dtype)
    padding = (spec.padding[0], spec.padding[2])
    wanted = F.conv2d(x[:CHECKED].double(), weight.double(), None, spec.stride, padding)
    wanted = (wanted * scale.double().reshape(1, -1, 1, 1) + shift.double().reshape(1, -1, 1, 1)).relu()

    def ours() -> Callable[[], Tensor]:
        prepared = triton_gpu.prepare(spec, ((weight, scale, shift),), x, None, 1.0)
        return lambda: triton_gpu.run(prepared, x, None, torch.channels_last)

    makers: dict[str, Maker] = {
        "ours": ours,
        "eager": lambda: lambda: F.conv2d(x, folded, bias, spec.stride, padding).relu_(),
        "xla": lambda: xla.layer(spec, x, folded, bias),
    }
    return makers, wanted


def tuned_rows(layer: str, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """The best tile of a layer at every batch, as rows of the shipped data; all so far, a batch at a time."""
    arch = configs.arch_of(torch.cuda.get_device_capability())
    rows: list[dict[str, Any]] = []
    for n in BATCHES:
        spec = layer_spec(layer, n, dtype)
        x, *given = draw(spec)
        parts = [Part(*given, (spec.padding[0], spec.padding[2]), spec.relu)]
        tried = tune.tried(
            spec, x, parts, arch, lambda call: summary(device_seconds({"it": call}, 9)["it"])["median_ms"] / 1e3
        )
        best, seconds = min(tried.items(), key=lambda pair: pair[1])
        row = tune.row_of(spec, arch, best, seconds)
        rows.append(
            {"layer": layer, "batch": n, "row": [*row[:5], list(vars(best).values()), seconds], "tried": len(tried)}
        )
        yield rows


def pair_once(name: str, form: str) -> None:
    """One call of a pair under the profiler, after two that compile and warm."""
    c, mid, oc = PAIR_SIZES[name]
    first = ConvSpec(PAIR_BATCH, 17, 17, c, mid, 1, 7, (1, 1), (0, 0, 3, 3), dtype="bfloat16")
    second = ConvSpec(PAIR_BATCH, 17, 17, mid, oc, 7, 1, (1, 1), (3, 3, 0, 0), dtype="bfloat16")
    x, *one = draw(first)
    _, *two = draw(second)
    packed = (
        convolve.pack([Part(*one, (0, 3), True)], x.dtype, DEVICE),
        convolve.pack([Part(*two, (3, 0), True)], x.dtype, DEVICE),
    )
    middle, y = (launch.dense(torch.empty(PAIR_BATCH, 17, 17, k, dtype=x.dtype, device=DEVICE)) for k in (mid, oc))
    fused = Config(block_m=128, block_n=128, block_k=64, warps=8) if form == "fused" else None
    spec, choose = PairSpec(first, second), triton_gpu.chooser(DEVICE)
    launches = pairs.chain("pair", spec, triton_gpu.nhwc(x), packed, middle, y, choose, fused=fused)
    for _ in range(2):
        for one_launch in launches:
            one_launch.run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for one_launch in launches:
        one_launch.run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
