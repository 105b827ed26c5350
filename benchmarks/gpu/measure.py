"""What is timed on the device: layers, networks, tiles and pairs, beside their peers, after their numbers are right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from catalogue import BATCHES, LAYERS
from inception_fast.kernels.spec import ConvSpec, PairSpec
from inception_fast.kernels.triton import configs, convolve, launch, pairs, tune
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.convolve import Part
from timing import device_seconds, host_seconds, summary
from torch import Tensor

from inception_fast.backends import triton_gpu
from inception_fast.measure.compare import BUDGET, PEER_SHARE, calibrate

PAIR_SIZES = {
    "v3_192": (192, 192, 192),
    "v3_128": (128, 128, 192),
    "v4_256": (192, 224, 256),
    "resnet_192": (128, 160, 192),
}
PAIR_BATCH = 128
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


def layer_rows(n: int, dtype: str) -> list[dict[str, Any]]:
    """Every layer at one batch: ours, eager with cudnn.benchmark, XLA where it is installed."""
    torch.backends.cudnn.benchmark = True
    rows = []
    for name in LAYERS:
        spec = layer_spec(name, n, dtype)
        calls, wanted = layer_calls(spec)
        errors = {runtime: error_of(call(), wanted) for runtime, call in calls.items() if runtime != "xla"}
        right = {runtime: call for runtime, call in calls.items() if errors.get(runtime, 0) <= 2 * BUDGET[dtype]}
        times = device_seconds({r: c for r, c in right.items() if r != "xla"})
        walls = host_seconds({r: many(c) for r, c in right.items()}, rounds=9)
        for runtime in calls:
            row = {"layer": name, "batch": n, "dtype": dtype, "runtime": runtime, "rel_error": errors.get(runtime)}
            if runtime not in right:
                rows.append({**row, "status": "wrong"})
                continue
            if runtime in times:
                row |= summary(times[runtime])
                row["tflops"] = spec.flops() / row["median_ms"] / 1e9
            row["back_to_back_ms"] = summary(walls[runtime])["median_ms"] / REPEATS
            rows.append({**row, "status": "ok"})
    return rows


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


def layer_calls(spec: ConvSpec) -> tuple[dict[str, Callable[[], Any]], Tensor]:
    """The runtimes by name, and what they should give, in float64."""
    x, weight, scale, shift = draw(spec)
    folded = (weight.float() * scale[:, None, None, None]).to(x.dtype).contiguous(memory_format=torch.channels_last)
    bias = shift.to(x.dtype)
    padding = (spec.padding[0], spec.padding[2])
    wanted = F.conv2d(x.double(), weight.double(), None, spec.stride, padding)
    wanted = (
        wanted * scale.double()[:, None, None, None].reshape(1, -1, 1, 1) + shift.double().reshape(1, -1, 1, 1)
    ).relu()
    prepared = triton_gpu.prepare(spec, ((weight, scale, shift),), x, None, 1.0)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: triton_gpu.run(prepared, x, None, torch.channels_last),
        "eager": lambda: F.conv2d(x, folded, bias, spec.stride, padding).relu_(),
    }
    with contextlib.suppress(ImportError):
        calls["xla"] = xla_call(spec, x, folded, bias)
    return calls, wanted


def xla_call(spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    """The same by JAX. Raises ImportError where it is not installed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    top, bottom, left, right = spec.padding
    dimensions = ("NHWC", "HWIO", "NHWC")

    def conv(a: Any, w: Any, b: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            a, w, spec.stride, ((top, bottom), (left, right)), dimension_numbers=dimensions
        )
        return jax.nn.relu(y + b)

    compiled = jax.jit(conv)
    given = [jax.dlpack.from_dlpack(t.contiguous()) for t in (x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)]
    return lambda: compiled(*given)


def network_rows(model: str, n: int, dtype: str) -> list[dict[str, Any]]:
    """One network: ours as it chooses, all that the CUDA kernels take on these, eager channels_last with
    cudnn.benchmark, Inductor's max-autotune with CUDA graphs.
    """
    import inception_fast as fast

    torch.backends.cudnn.benchmark = True
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    net = fast.create_model(model).eval()
    size = net.data_config.input_size[-1]
    x = torch.randn(n, 3, size, size, device=DEVICE)
    calibrate(net, x[:2].cpu())
    with torch.inference_mode():
        wanted = fast.create_model(model).eval().to(DEVICE, torch.float64)
        wanted.load_state_dict({k: v.to(DEVICE) for k, v in net.state_dict().items()})
        truth = torch.cat([wanted(part.double()) for part in x.split(8)])
    del wanted
    peer = fast.create_model(model).eval()
    peer.load_state_dict(net.state_dict())
    peer = peer.to(DEVICE, kind, memory_format=torch.channels_last)
    given = x.to(kind).contiguous(memory_format=torch.channels_last)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "ours": lambda: (lambda m: lambda: m(x))(fast.optimize(net, x, dtype=kind)),
        "cuda": lambda: (lambda m: lambda: m(x))(fast.optimize(net, x, dtype=kind, backend="cuda")),
        "eager": lambda: lambda: peer(given),
        "compile": lambda: (lambda m: lambda: m(given).clone())(torch.compile(peer, mode="max-autotune")),
    }
    calls, rows = {}, {}
    with torch.no_grad():
        for runtime, make in makers.items():
            row: dict[str, Any] = {"model": model, "batch": n, "dtype": dtype, "runtime": runtime}
            try:
                call = make()
                error = error_of(call(), truth)
            except Exception as problem:
                rows[runtime] = {**row, "status": "failed", "note": f"{type(problem).__name__}: {problem}"[:400]}
                continue
            budget = BUDGET[dtype] * (1.0 if runtime in ("ours", "cuda") else PEER_SHARE[dtype])
            rows[runtime] = {**row, "rel_error": error, "status": "ok" if error <= budget else "wrong"}
            if error <= budget:
                calls[runtime] = call
        for runtime, seconds in host_seconds(calls).items():
            rows[runtime] |= summary(seconds)
    ours = rows["ours"].get("median_ms")
    for row in rows.values():
        row["ratio"] = row["median_ms"] / ours if ours and "median_ms" in row else None
    return list(rows.values())


def tuned_rows(layer: str, dtype: str) -> list[dict[str, Any]]:
    """The best tile of a layer at every batch, as rows of the shipped data."""
    arch = configs.arch_of(torch.cuda.get_device_capability())
    rows = []
    for n in BATCHES:
        spec = layer_spec(layer, n, dtype)
        tried = tune.tried(
            spec, *draw(spec), arch, lambda call: summary(device_seconds({"it": call}, 9)["it"])["median_ms"] / 1e3
        )
        best, seconds = min(tried.items(), key=lambda pair: pair[1])
        row = tune.row_of(spec, arch, best, seconds)
        rows.append(
            {"layer": layer, "batch": n, "row": [*row[:5], list(vars(best).values()), seconds], "tried": len(tried)}
        )
    return rows


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
