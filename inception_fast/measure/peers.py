"""The runtimes compared: ours and those a user would otherwise take, each behind the same three steps.

A runtime is asked for its `reasons` not to run, then builds a network once, then binds inputs: what happens once per
network or once per input is outside the timed call.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .machine import version
from .timer import Plan, interleave, summarise

Thunk = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TimeLimit(BaseException):
    """A step took longer than it was given. Not an Exception, or a library under test would swallow it and carry on."""


@dataclass(frozen=True)
class Built:
    """A network ready to run: `bind(x)` returns the call to time, `result(call())` its output as float32 logits."""

    bind: Callable[[Tensor], Thunk]
    result: Callable[[object], Tensor]
    note: str = ""


class Runtime(Protocol):
    """One way to run a network. `name` is its value of --against; `package` the distribution it comes from."""

    name: str
    package: str

    def reasons(self, dtype: str) -> list[str]:
        """Why this machine cannot run it in `dtype`; an empty list when it can."""
        ...

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        """Prepares the float32 `model`, in eval mode, for inputs like `x`; raises what the library raises."""
        ...


def _float(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"output of type {type(output).__name__}; allowed: a tensor")
    return output.float()


def _first_array(output: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(output[0], dtype=np.float32))  # type: ignore[index]


def _missing(*packages: str) -> list[str]:
    return [f"{p} is not installed" for p in packages if version(p) is None]


class Ours:
    """The engine of this package."""

    name, package = "inception_fast", "inception-fast"

    def reasons(self, dtype: str) -> list[str]:
        from .. import Unavailable, backend_status

        status = backend_status()["cpu"]
        return [status.reason] if isinstance(status, Unavailable) else []

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        from .. import optimize

        fast = optimize(model, (x,), dtype=DTYPES[dtype])
        return Built(lambda x: lambda: fast(x), _float)


class OursWinograd(Ours):
    """The engine with Winograd's algorithm, which rounds otherwise: a row beside the exact one, never in its place."""

    name = "inception_fast+winograd"

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        from .. import optimize

        fast = optimize(model, (x,), dtype=DTYPES[dtype], winograd=True)
        counts = fast.report().counts
        note = f"{counts['winograd_convolutions']} of {counts['convolutions']} convolutions"
        return Built(lambda x: lambda: fast(x), _float, note)


class Layers(Ours):
    """The model with this package's layers in it, called as the module that it is, without a plan."""

    def __init__(self, winograd: bool = False) -> None:
        self.winograd, self.name = winograd, f"layers{'+winograd' if winograd else ''}"

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        from .. import replace_layers

        net = replace_layers(_cast(model, dtype, torch.channels_last), winograd=self.winograd)
        report: Any = net.replacement_report

        def bind(x: Tensor) -> Thunk:
            x = x.to(DTYPES[dtype], memory_format=torch.channels_last)
            return lambda: net(x)

        return Built(bind, _float, f"{len(report.swapped)} swapped, {len(report.left)} left")


class Eager:
    """torch as it is, in the faster of its two memory formats."""

    name, package = "eager", "torch"

    def reasons(self, dtype: str) -> list[str]:
        return []

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
        models = {name: _cast(model, dtype, form) for name, form in formats.items()}

        def bind(name: str, x: Tensor) -> Thunk:
            x, net = x.to(DTYPES[dtype], memory_format=formats[name]), models[name]
            return lambda: net(x)

        trial = interleave({name: bind(name, x) for name in formats}, Plan(seconds=1e-6, least=3, most=3, warmup=1))
        best = min(formats, key=lambda name: summarise(trial[name]).median)
        return Built(lambda x: bind(best, x), _float, best)


class Compile:
    """torch.compile: Inductor with frozen weights."""

    name, package = "compile", "torch"

    def reasons(self, dtype: str) -> list[str]:
        return []

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        torch._dynamo.reset()
        cast = _cast(model, dtype, torch.channels_last)
        compiled = torch.compile(cast, dynamic=False, options={"freezing": True})

        def bind(x: Tensor) -> Thunk:
            x = x.to(DTYPES[dtype], memory_format=torch.channels_last)
            return lambda: compiled(x)

        bind(x)()
        return Built(bind, _float, "freezing")


class OnnxRuntime:
    """ONNX Runtime's CPU provider, all graph optimisations on."""

    name, package = "onnxruntime", "onnxruntime"

    def reasons(self, dtype: str) -> list[str]:
        if dtype != "float32":
            return [f"its CPU provider has no {dtype} convolution"]
        return _missing("onnxruntime", "onnx")

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def bind(x: Tensor) -> Thunk:
            feed = {name: x.contiguous().numpy()}
            return lambda: session.run(None, feed)

        return Built(bind, _first_array)


class OpenVino:
    """OpenVINO's CPU plug-in with the latency hint."""

    name, package = "openvino", "openvino"

    def reasons(self, dtype: str) -> list[str]:
        return _missing("openvino")

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        import openvino

        precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if dtype != "float32" and precision.upper() not in capabilities:
            raise RuntimeError(f"no {precision} on this machine; its CPU plug-in offers {', '.join(capabilities)}")
        converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
        request = core.compile_model(converted, "CPU", settings).create_infer_request()

        def bind(x: Tensor) -> Thunk:
            feed = [x.contiguous().numpy()]
            return lambda: request.infer(feed, share_inputs=True, share_outputs=True)

        return Built(bind, _first_array)


RUNTIMES: dict[str, Runtime] = {r.name: r for r in (Eager(), Compile(), OnnxRuntime(), OpenVino())}


def _cast(model: nn.Module, dtype: str, layout: torch.memory_format) -> nn.Module:
    """A copy of the network with its floating-point weights in `dtype` and its 4-D ones in `layout`.

    They are ordinary parameters, as models have them, in inference mode too: of tensors made there, which count no
    versions, our layers read every value in each call to see whether it changed.
    """
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(model).to(dtype=DTYPES[dtype]).to(memory_format=layout)  # type: ignore[call-overload]


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    """By the TorchScript exporter: 4 s on inception_resnet_v2, where the newer one takes 34 s for the same network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False)
        return path.read_bytes()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the remarks of the peers' exporters out of the results and off standard output; errors still raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeLimit inside the block after `seconds`. Only the main thread of a POSIX process can be stopped so."""
    stoppable = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not stoppable or math.isinf(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeLimit(f"gave up after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def named(names: Sequence[str]) -> list[Runtime]:
    """The peers of these names, in their order; an unknown one raises ValueError."""
    for name in names:
        if name not in RUNTIMES:
            raise ValueError(f"unknown runtime {name!r}; allowed: {', '.join(RUNTIMES)}")
    return [RUNTIMES[name] for name in names]
