"""The Hopper kernels on the device: every cut of every layer beside cuDNN and Triton, and what they stand on."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from catalogue import LAYERS
from inception_fast.kernels import cuda
from inception_fast.kernels.cuda import convolve, pair, tune
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec, PairSpec
from journal import broken_context
from measure import CHECKED, DEVICE, LAYER_BUDGET, PAIR_SIZES, checked, draw, layer_calls, layer_spec
from timing import device_seconds, host_seconds, summary
from torch import Tensor

from inception_fast.backends import hopper_gpu, triton_gpu

HERE = Path(__file__).resolve().parent
TRIED, CHAIN = 5, 64
FIRST = "17_"  # of the layers: half of the networks' products


def layer_rows(n: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """Every layer that the kernels take: cuDNN, Triton, each cut, and the best one as a row of the shipped data; all
    rows so far, a layer at a time, the convolutions and pairs at 17x17 first.
    """
    torch.backends.cudnn.benchmark = True
    kernels, rows = cuda.library(), list[dict[str, Any]]()
    first = [name for name in LAYERS if name.startswith(FIRST)]
    for name in (*first, *PAIR_SIZES, *(name for name in LAYERS if name not in first)):
        head = {"layer": name, "batch": n, "dtype": dtype}
        spec = layer_spec(name, n, dtype) if name in LAYERS else pair_spec(PAIR_SIZES[name], n, dtype)
        why = hopper_gpu.spec_reasons(kernels, spec)
        if why:
            rows.append({**head, "runtime": "cuda", "status": "unavailable", "note": "; ".join(why)})
        else:
            rows += unless_lost(raced if isinstance(spec, ConvSpec) else raced_pair, spec, head)
        yield rows


def unless_lost(race: Callable[[Any, dict[str, Any]], list[dict[str, Any]]], spec: Any, head: dict[str, Any]) -> Any:
    """The rows of a race, or the one of its failure. Raises RuntimeError where nothing else can run after it."""
    try:
        return race(spec, head)
    except (RuntimeError, ValueError) as problem:
        lost = broken_context()
        if lost:
            raise RuntimeError(f"{head['layer']}: {lost}") from problem
        return [{**head, "runtime": "cuda", "status": "failed", "note": f"{type(problem).__name__}: {problem}"[:800]}]


def raced(spec: ConvSpec, head: dict[str, Any]) -> list[dict[str, Any]]:
    """One layer's rows."""
    given = draw(spec)
    found = tune.tried(cuda.library(), spec, *given, lambda call: median(call, TRIED))
    best = min(found, key=found.__getitem__)
    makers, wanted = layer_calls(spec)
    racing: dict[str, Any] = {"triton": makers["ours"], "cudnn": makers["eager"]}
    racing["cuda"] = lambda: best_call(spec, given, best)
    rows, calls = checked(racing, head, wanted, lambda runtime: LAYER_BUDGET[spec.dtype])
    for runtime, seconds in device_seconds(calls).items() if calls else ():
        rows[runtime] |= summary(seconds)
        rows[runtime]["tflops"] = spec.flops() / rows[runtime]["median_ms"] / 1e9
    cuts = [
        {
            **head,
            "runtime": "cuda",
            "config": cut.config.name,
            "splits": cut.splits,
            "median_ms": s * 1e3,
            "rounds": TRIED,
        }
        for cut, s in found.items()
    ]
    times = [rows[runtime].get("median_ms") for runtime in ("cuda", "triton")]
    if None not in times:
        cut = (best.config.name, best.splits, times[0] / 1e3, times[1] / 1e3)
        choice = [torch.cuda.get_device_name(), *hopper_gpu.shape_of(spec), *cut]
        cuts.append({**head, "runtime": "cuda", "choice": choice})
    return [*rows.values(), *cuts]


def pair_spec(sizes: tuple[int, int, int], n: int, dtype: str) -> PairSpec:
    c, mid, oc = sizes
    first = ConvSpec(n, 17, 17, c, mid, 1, 7, (1, 1), (0, 0, 3, 3), dtype=dtype)
    return PairSpec(first, ConvSpec(n, 17, 17, mid, oc, 7, 1, (1, 1), (3, 3, 0, 0), dtype=dtype))


def raced_pair(spec: PairSpec, head: dict[str, Any]) -> list[dict[str, Any]]:
    """A pair by two launches of Triton, by two of the CUDA kernels, and fused by every configuration."""
    x, *one = draw(spec.first)
    _, *two = draw(spec.second)
    params = (tuple(one), tuple(two))
    wanted = pair_truth(spec, x[:CHECKED], params)

    def by(backend: Any) -> Callable[[], Any]:
        prepared = backend.prepare(spec, params, x, None, 1.0)
        return lambda: backend.run(prepared, x, None, torch.channels_last)

    makers: dict[str, Any] = {"triton": lambda: by(triton_gpu), "cuda": lambda: by(hopper_gpu)}
    fused = {config.name: config for config in pair.able(cuda.library(), spec)}
    makers |= {name: lambda config=config: fused_call(spec, x, params, config) for name, config in fused.items()}
    rows, calls = checked(makers, head, wanted, lambda runtime: 2 * LAYER_BUDGET[spec.first.dtype])
    for runtime, seconds in device_seconds(calls).items() if calls else ():
        rows[runtime] |= summary(seconds)
        rows[runtime]["tflops"] = spec.flops() / rows[runtime]["median_ms"] / 1e9
    times = {runtime: row["median_ms"] / 1e3 for runtime, row in rows.items() if "median_ms" in row}
    right, apart = {r: t for r, t in times.items() if r in fused}, [times[r] for r in ("triton", "cuda") if r in times]
    if not right or not apart:
        return list(rows.values())
    best = min(right, key=right.__getitem__)
    cut = (best, 1, right[best], min(apart))
    choice = [torch.cuda.get_device_name(), *hopper_gpu.shape_of(spec.second, "pair"), *cut]
    return [*rows.values(), {**head, "runtime": "cuda", "choice": choice}]


def pair_truth(spec: PairSpec, x: Tensor, params: Any) -> Tensor:
    """In float64 all through."""
    y = x.double()
    for part, (weight, scale, shift) in zip((spec.first, spec.second), params, strict=True):
        y = torch.conv2d(y, weight.double(), None, 1, (part.padding[0], part.padding[2]))
        y = (y * scale.double().reshape(1, -1, 1, 1) + shift.double().reshape(1, -1, 1, 1)).relu()
    return y


def fused_call(spec: PairSpec, x: Tensor, params: Any, config: Any) -> Callable[[], Any]:
    """A prepared launch and its result, logically NCHW."""
    last = spec.second
    y = torch.empty(last.n, last.oh, last.ow, last.oc, dtype=x.dtype, device=DEVICE)
    packed = tuple(convolve.pack(*triple, x.dtype, DEVICE) for triple in params)
    launch = pair.launch("pair", cuda.library(), spec, hopper_gpu.nhwc(x), packed, dense(y), config)

    def call() -> Any:
        launch.run()
        return y.permute(0, 3, 1, 2)

    return call


def median(call: Callable[[], Any], rounds: int) -> float:
    return summary(device_seconds({"it": call}, rounds)["it"])["median_ms"] / 1e3


def best_call(spec: ConvSpec, given: Any, cut: Cut) -> Callable[[], Any]:
    """A prepared launch and its result, logically NCHW."""
    x, weight, scale, shift = given
    y = torch.empty(spec.n, spec.oh, spec.ow, spec.oc, dtype=x.dtype, device=DEVICE)
    packed = convolve.pack(weight, scale, shift, x.dtype, DEVICE)
    problem = Problem(spec, hopper_gpu.nhwc(x), packed, (Target(dense(y), spec.relu),))
    launch = convolve.group("layer", cuda.library(), [problem], cut)

    def call() -> Any:
        launch.run()
        return y.permute(0, 3, 1, 2)

    return call


def probe_rows(build: Path) -> list[dict[str, Any]]:
    """Shifted operands, right or wrong by the shift; the gap between dependent kernels, early starts or not."""
    return [*shift_rows(compiled_probe(build)), *gap_rows()]


def compiled_probe(build: Path) -> Callable[..., int]:
    build.mkdir(parents=True, exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
    target = build / "probe.so"
    include = HERE.parents[1] / "kernels" / "cuda"
    subprocess.run(
        [*command, "-cudart", "static", f"-I{include}", str(HERE / "probe.cu"), "-o", str(target)], check=True
    )
    return ctypes.CDLL(str(target)).probe_shift


def shift_rows(probe: Callable[..., int], device: torch.device = DEVICE, make: Any = None) -> Iterator[dict[str, Any]]:
    """`make` copies a tensor to where the probe may read it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (64, 64), generator=generator).bfloat16() for _ in range(2))
    make = make or (lambda tensor: tensor.to(device))
    left, right, d = make(a), make(b), make(torch.zeros(64, 8))
    for swizzled in (False, True):
        for shift in range(0, 57):
            code = probe(*(ctypes.c_void_p(t.data_ptr()) for t in (left, right, d)), shift, int(swizzled))
            wanted = a[:, 16:32].float() @ b[shift : shift + 8, 16:32].float().T
            right_here = code == 0 and torch.equal(d.cpu(), wanted)
            row = {"probe": "shifted rows", "swizzle": 128 if swizzled else 0, "shift": shift}
            yield row | {"status": "ok" if right_here else "wrong", "code": code}


def gap_rows() -> Iterator[dict[str, Any]]:
    """Microseconds a kernel in a graph of dependent small convolutions, at 17x17 and at 8x8."""
    for size, c in ((17, 192), (8, 384)):
        spec = ConvSpec(1, size, size, c, c, 1, 1, dtype="bfloat16")
        for cut in (Cut(config) for config in convolve.able(cuda.library(), spec)):
            graphs = {f"overlap {overlap}": chain(spec, cut, overlap).replay for overlap in (False, True)}
            for name, seconds in host_seconds(graphs).items():
                figures = summary(seconds)
                row = {"probe": "gap", "map": size, "config": cut.config.name, "form": name, **figures}
                yield {**row, "us_per_kernel": figures["median_ms"] * 1e3 / CHAIN}


def chain(spec: ConvSpec, cut: Cut, overlap: bool) -> torch.cuda.CUDAGraph:
    """A graph of `CHAIN` convolutions, each reading what the one ahead wrote."""
    _, weight, scale, shift = draw(spec)
    packed = convolve.pack(weight, scale, shift, torch.bfloat16, DEVICE)
    size = (1, spec.h, spec.w, spec.c)
    maps = [dense(torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2)]
    launches = [
        convolve.group(
            "chain", cuda.library(), [Problem(spec, maps[i % 2], packed, (Target(maps[1 - i % 2], True),))], cut,
            overlap=overlap and i > 0,
        )
        for i in range(CHAIN)
    ]  # fmt: skip
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch.run()
    # The graph's launches point into these.
    graph.kept = launches  # type: ignore[attr-defined]
    return graph
