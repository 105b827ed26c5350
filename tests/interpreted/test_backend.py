"""The "triton" backend's three functions on CPU tensors, in the interpreter, against the float64 reference."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import numerics
import op_calls
from inception_fast import _fused
from inception_fast.backends import triton_gpu, truth

from .maps import DEVICE

HALF, FLOAT = torch.float16, torch.float32


def both(
    spec: Any, x: Tensor, params: Any, residual: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What the backend gives, and the reference in float64."""
    assert triton_gpu.reasons(spec) == []
    there = tuple(tuple(t.to(DEVICE) for t in triple) for triple in params)
    given, old_there = x.to(DEVICE), None if residual is None else residual.to(DEVICE)
    prepared = triton_gpu.prepare(spec, there, given, old_there, scale)
    y = triton_gpu.run(prepared, given, old_there, torch.channels_last).cpu()
    wide = tuple(tuple(t.double() for t in triple) for triple in params)
    old = None if residual is None else residual.double()
    wanted = truth.run(truth.prepare(spec, wide, x.double(), old, scale), x.double(), old, torch.channels_last)
    assert y.stride() == wanted.stride() and y.dtype is x.dtype
    return y, wanted


@pytest.mark.parametrize("case", op_calls.CONVS)
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_conv(case: str, dtype: torch.dtype) -> None:
    (x, *params), options = op_calls.conv_arguments(case, dtype, n=5)
    residual = None
    call = _fused.conv_call(x, *params, None, list(options["stride"]), list(options["padding"]))
    if x.shape[1] > 4:
        residual = numerics.random(*call.shape(), seed=8, dtype=dtype)
        call = _fused.conv_call(x, *params, residual, list(options["stride"]), list(options["padding"]), True, 0.5)
    y, wanted = both(call.spec(), x, (tuple(params),), residual, 0.5 if residual is not None else 1.0)
    numerics.assert_close_budget(y, wanted)


@pytest.mark.parametrize("kind", ("chain", "split"))
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_pair(kind: str, dtype: torch.dtype) -> None:
    x, *params = op_calls.pair_arguments(kind, dtype)
    spec = _fused.pair_call(kind, x, *params).spec()
    y, wanted = both(spec, x, (tuple(params[:3]), tuple(params[3:])))
    numerics.assert_close_budget(y, wanted, roundings=2 if kind == "chain" else 1)


@pytest.mark.parametrize("include_pad", (False, True))
@pytest.mark.parametrize("oc", (6, 40), ids=("conv_first", "pool_first"))
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_pool_project(dtype: torch.dtype, oc: int, include_pad: bool) -> None:
    x, *params = op_calls.pool_arguments(dtype, oc)
    spec = _fused.pool_project_call(x, *params, [3, 3], [1, 1], [1, 1], include_pad).spec()
    assert spec.conv_first == (oc == 6)
    y, wanted = both(spec, x, (tuple(params),))
    numerics.assert_close_budget(y, wanted, roundings=1 if spec.conv_first else 2)


def test_layouts_give_the_same_numbers() -> None:
    (x, *params), options = op_calls.conv_arguments("wide_1x7", FLOAT)
    spec = _fused.conv_call(x, *params, None, list(options["stride"]), list(options["padding"])).spec()
    there = (tuple(t.to(DEVICE) for t in params),)
    prepared = triton_gpu.prepare(spec, there, x.to(DEVICE), None, 1.0)
    results = [
        triton_gpu.run(prepared, numerics.as_layout(x, layout).to(DEVICE), None, torch.contiguous_format)
        for layout in numerics.LAYOUTS
    ]
    assert all(torch.equal(results[0], y) for y in results[1:]) and results[0].is_contiguous()


def test_weights_are_packed_once_and_again_after_a_change() -> None:
    (x, *params), options = op_calls.conv_arguments("pointwise", FLOAT)
    spec = _fused.conv_call(x, *params, None, list(options["stride"]), list(options["padding"])).spec()
    first = triton_gpu.prepare(spec, (tuple(params),), x, None, 1.0)
    assert triton_gpu.prepare(spec, (tuple(params),), x, None, 1.0).compiled is first.compiled
    params[0].mul_(2)
    assert triton_gpu.prepare(spec, (tuple(params),), x, None, 1.0).compiled is not first.compiled


@pytest.mark.parametrize("asked", ("by precision", "by backend"))
def test_tf32_is_only_for_those_who_ask(asked: str) -> None:
    """By either of torch's ways, of which the second makes it refuse to say what the first would."""
    (x, *params), options = op_calls.conv_arguments("pointwise", FLOAT)
    spec = _fused.conv_call(x, *params, None, list(options["stride"]), list(options["padding"])).spec()
    prepared = triton_gpu.prepare(spec, (tuple(params),), x, None, 1.0)
    matmul = torch.backends.cuda.matmul
    assert triton_gpu._Call(prepared, x, None).launches()[0].arguments["PRECISION"] == "ieee"
    before = matmul.fp32_precision
    try:
        if asked == "by precision":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
            with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
                torch.get_float32_matmul_precision()
        assert triton_gpu._Call(prepared, x, None).launches()[0].arguments["PRECISION"] == "tf32"
    finally:
        if asked == "by precision":
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert triton_gpu._Call(prepared, x, None).launches()[0].arguments["PRECISION"] == "ieee"


def test_another_stream_waits_for_weights_that_are_being_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for streams of a GPU: packing is ordered on its own alone."""
    streams, waits, reads = [1, 1, 2, 2], list[int](), list[int]()
    stream = SimpleNamespace(cuda_stream=1, record_event=lambda: 1, wait_event=waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: reads.append(stream.cuda_stream))
    (x, *params), options = op_calls.conv_arguments("pointwise", FLOAT)
    spec = _fused.conv_call(x, *params, None, list(options["stride"]), list(options["padding"])).spec()
    packed = triton_gpu.prepare(spec, (tuple(params),), x, None, 1.0).compiled
    monkeypatch.setattr(triton_gpu, "_pack", lambda *ignored: packed)
    on_gpu: Any = SimpleNamespace(dtype=x.dtype, device=torch.device("cuda", 0))
    for stream.cuda_stream in streams:
        assert triton_gpu.prepare(spec, (tuple(params),), on_gpu, None, 1.0).compiled is packed
    assert waits == [1] and reads == [2, 2, 2], "weight, scale and shift"


class FromTheHost(TorchDispatchMode):
    """Notes copies to another device, which a stream that is being captured does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {one.device for one in (result, *args) if isinstance(one, Tensor)}
        self.copies += [str(func)] if len(devices) > 1 else []
        return result


def test_a_split_behind_its_first_call_takes_nothing_from_the_host() -> None:
    """So that it can be captured; a device without memory stands in for the GPU."""
    x, *params = (t.to("meta") for t in op_calls.pair_arguments("split", HALF))
    spec, triples = _fused.pair_call("split", x, *params).spec(), (tuple(params[:3]), tuple(params[3:]))
    for copies in (True, False):
        prepared = triton_gpu.Prepared(triton_gpu._pack(spec, triples, x), spec, 1.0)
        with FromTheHost() as seen:
            launches = triton_gpu._Call(prepared, x, None).launches()
        assert len(launches) == 1 and bool(seen.copies) is copies
