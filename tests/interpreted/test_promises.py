"""What a GPU backend promises beside its numbers: 64-bit addresses, the device and the stream of the caller, sums in a
fixed order, captures that meet neither each other nor a caller's stream.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import gc
import mmap
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inception_fast.kernels.plan import EltwiseStep, View
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from inception_fast.kernels.triton import convolve, launch, norms, pools
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.launch import Map
from torch import Tensor
from torch.nn import functional as F

import numerics
from checkout import ROOT
from inception_fast.backends import batch_norm_gpu, triton_gpu
from inception_fast.engine import gpu_runner, gpu_segment, gpu_session

from .maps import DEVICE, run

HALF = torch.float16
PITCH = (1 << 30) + 64  # elements; the third of three pixels so far apart lies beyond 2^31
C = 16


@pytest.fixture(scope="module")
def far() -> Tensor:
    """float16 elements, 2^31 and more on either side of the middle, where an offset that wraps would still find memory.
    Pages that nobody touches cost nothing.
    """
    count = 2 * (2 * PITCH + 1024)
    if DEVICE.type == "cuda":
        return torch.zeros(count, dtype=HALF, device=DEVICE)
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux has it, Python names it from 3.13 on
    memory = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    return torch.from_numpy(np.frombuffer(memory, np.float16))


def spread(far: Tensor, x: Tensor, at: int) -> Map:
    """x [1, c, 1, 3] with pixels PITCH apart, `at` elements behind the middle."""
    data = far[far.numel() // 2 + at :]
    data.as_strided((3, x.shape[1]), (PITCH, 1)).copy_(x[0, :, 0].T)
    return Map(data, 1, 1, 3, x.shape[1], PITCH)


def gathered(y: Map) -> Tensor:
    return y.data.as_strided((3, y.c), (PITCH, 1)).T.reshape(1, y.c, 1, 3).cpu()


KINDS = ("conv", "split", "pool", "eltwise", "statistics", "backward")


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_beyond_32_bits_are_found(kind: str, far: Tensor) -> None:
    """Offsets of 2^31 and more in what is read, and in what is written."""
    x, nothing = numerics.integers(1, C, 1, 3, seed=1, dtype=HALF, limit=3), torch.zeros(1, C, 1, 3, dtype=HALF)
    source, target = spread(far, x, 0), spread(far, nothing - 1, 512)
    weight = numerics.integers(C, C, 1, 1, seed=2, dtype=HALF)
    ones, zeros = torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    if kind in ("conv", "split"):
        packed = convolve.pack([convolve.Part(weight, None, None, (0, 0), False)], HALF, DEVICE)
        config = Config(block_m=16, block_n=16, block_k=16, split=1 if kind == "conv" else 2)
        spec = ConvSpec(1, 1, 3, C, C, 1, 1, relu=False, dtype="float16")
        run(convolve.convolution("conv", spec, source, packed, [target], config))
        wanted = F.conv2d(x.double(), weight.double())
    elif kind == "pool":
        run(pools.pooled(PoolSpec(1, 1, 3, C, 1, 3, (1, 1), (0, 0, 1, 1), dtype="float16"), source, target))
        wanted = F.max_pool2d(x.double(), (1, 3), 1, (0, 1))
    elif kind == "eltwise":
        run(launch.eltwise(EltwiseStep("", View(0, 0, C), View(0, 0, C)), source, target))
        wanted = x.double()
    elif kind == "statistics":
        launches, parts = norms.statistics(source)
        merges, both = norms.merged(parts, 3, moments=True)
        run([*launches, *merges])
        assert numerics.rel_l2(both[0].cpu(), x.double().mean((0, 2, 3))) <= numerics.FP32_REL_L2
        run(norms.forward(source, target, norms.Norm(ones, zeros, zeros, ones), 0.0))
        wanted = x.double().relu()
    else:
        slope = spread(far, numerics.integers(1, C, 1, 3, seed=3, dtype=HALF, limit=3), 256)
        dbias = torch.empty(C, device=DEVICE)
        of = norms.Norm(ones, ones * 9, zeros, ones)  # a bias that opens every ReLU
        run(norms.backward(slope, source, of, 0.0, target, torch.empty(C, device=DEVICE), dbias))
        g, off = gathered(slope).double(), x.double()
        numerics.assert_exact(dbias.cpu(), g.sum((0, 2, 3)))
        wanted = g - g.mean(3, keepdim=True) - off * (g * off).mean(3, keepdim=True)
        numerics.assert_close_budget(gathered(target), wanted)
        return
    numerics.assert_exact(gathered(target), wanted)


@pytest.mark.parametrize("kind", ("conv", "import"))
def test_more_pixels_than_32_bits_count_are_all_there(kind: str) -> None:
    """The first tile of them, all in one place: products of the sizes that wrap would leave it out."""
    n, size = 24100, 299
    y = torch.zeros(64 * C, dtype=HALF, device=DEVICE)
    places = Map(y, n, size, size, C, 0)
    if kind == "import":
        (one,) = launch.imported(torch.ones(1, 1, 1, 1, device=DEVICE).expand(n, C, size, size), places)
    else:
        packed = convolve.pack([convolve.Part(torch.ones(C, C, 1, 1), None, None, (0, 0), False)], HALF, DEVICE)
        spec, x = ConvSpec(n, size, size, C, C, 1, 1, relu=False, dtype="float16"), torch.ones_like(y)
        config = Config(block_m=16, block_n=16, block_k=16)
        (one,) = convolve.convolution("conv", spec, Map(x, n, size, size, C, 0), packed, [places], config)
    run([replace(one, grid=(1,) * len(one.grid))])
    assert y[:C].tolist() == [1.0 if kind == "import" else C] * C


def test_no_kernel_adds_in_an_order_of_chance() -> None:
    """Atomics would make sums, and so their bits, depend on which program comes first."""
    called = set()
    for file in sorted((ROOT / "kernels" / "triton").glob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text()))
        called |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {"dot", "store", "sum"} <= called and not {name for name in called if name.startswith("atomic")}


class Device:
    """torch.cuda.device of a machine with several GPUs, and what ran on which."""

    current, ran = 0, list[tuple[str, int]]()

    def __init__(self, device: torch.device) -> None:
        self.index, self.before = device.index or 0, 0

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.index

    def __exit__(self, *error: object) -> None:
        Device.current = self.before


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(Device, "ran", [])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Device.current)
    return torch.device("cuda", 1)


def test_operations_run_on_the_device_of_their_tensor(second: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    note = SimpleNamespace(run=lambda: Device.ran.append(("kernel", Device.current)))
    made = SimpleNamespace(launches=lambda: [note], y=torch.zeros(1, 2, 2, 3))
    monkeypatch.setattr(triton_gpu, "_Call", lambda *arguments: made)
    x: Any = SimpleNamespace(device=second, is_cuda=True)
    triton_gpu.run(None, x, None, torch.channels_last)  # type: ignore[arg-type]
    with batch_norm_gpu._on(x):
        batch_norm_gpu._run([note])  # type: ignore[list-item]
    assert Device.ran == [("kernel", 1)] * 2 and Device.current == 0


def test_programs_follow_the_callers_stream_on_their_device(
    second: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call waits, where it comes from another stream, for the one before it, and marks its own end there."""
    streams = [SimpleNamespace(wait_event=lambda event, name=name: said(f"wait on {name}"), name=name) for name in "ab"]

    def said(words: str) -> None:
        Device.ran.append((words, Device.current))

    class Event:
        def record(self, stream: Any) -> None:
            said(f"mark on {stream.name}")

        def synchronize(self) -> None:
            said("awaited")

    class Run:
        def __init__(self, *arguments: object) -> None: ...

        def run(self) -> list[Any]:
            said("run")
            return []

    program = gpu_runner.GpuCompiled.__new__(gpu_runner.GpuCompiled)
    program.device, program._static, program._done = second, SimpleNamespace(bytes=1), None  # type: ignore[assignment]
    program._stream = None
    program._lock, program._keeper = gpu_runner.threading.Lock(), SimpleNamespace(admit=lambda one: None)  # type: ignore[assignment]
    monkeypatch.setattr(gpu_runner, "_Run", Run)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for stream in (*streams, streams[1]):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        program.run([])
    assert program.release() and not program.held_bytes
    words = ["run", "mark on a", "wait on b", "run", "mark on b", "run", "mark on b", "awaited"]
    assert [word for word, _ in Device.ran] == words
    assert [device for _, device in Device.ran[:-1]] == [1] * 7
    Device.ran.clear()
    del program
    assert [word for word, _ in Device.ran] == ["awaited"], "memory is given back no earlier than the device is done"


def test_plans_are_made_for_what_their_device_can(second: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are asked about the current device."""
    session = gpu_session.GpuSession.__new__(gpu_session.GpuSession)
    session.device, session.dtype, session.invariant, session.tf32 = second, "float32", False, False
    session.packs = session.choose = session.keeper = session.hopper = None  # type: ignore[assignment]
    monkeypatch.setattr(gpu_session, "lower", lambda *words: Device.ran.append(("planned", Device.current)))
    monkeypatch.setattr(gpu_session, "GpuCompiled", lambda *words, **options: None)
    session.compiled(None, [])  # type: ignore[arg-type]
    assert Device.ran == [("planned", 1)] and Device.current == 0


class Stream:
    """What a capture asks of a stream; `waits` are what it waited for."""

    def __init__(self, device: Any = None) -> None:
        self.device, self.waits = device, list[Any]()

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: Any) -> None:
        self.waits.append(stream)


class Capture:
    """torch.cuda.graph: begins by waiting for the device, which fails while anybody captures."""

    open, streams = 0, list[Stream]()

    def __init__(self, graph: object, *, stream: Stream, capture_error_mode: str) -> None:
        Capture.streams.append(stream)

    def __enter__(self) -> None:
        assert not Capture.open, "two captures at once"
        assert not gc.isenabled(), "garbage may be given back in the middle of a capture"
        Capture.open += 1
        time.sleep(0.02)

    def __exit__(self, *error: object) -> None:
        Capture.open -= 1


@pytest.fixture
def captures(second: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A machine whose captures are recorded; nothing runs."""
    monkeypatch.setattr(Capture, "streams", [])
    monkeypatch.setattr(gpu_segment, "_STREAMS", {})
    for name, stub in (("graph", Capture), ("Stream", Stream), ("CUDAGraph", SimpleNamespace)):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(device))
    return second


def segment(device: torch.device, streams: int) -> Any:
    tasks = [SimpleNamespace(stream=i, waits=()) for i in range(streams)]
    made = gpu_segment.Segment.__new__(gpu_segment.Segment)
    made.plan = SimpleNamespace(device=device, tasks=tasks)  # type: ignore[assignment]
    made.launches = [[] for _ in tasks]
    return made


def test_captures_follow_one_another(captures: torch.device) -> None:
    """Those of programs that are first called by several threads; what fails in one thread fails the test."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(segment(captures, 2)._capture) for _ in range(4)]
    assert [one.result() for one in found] == [None] * 4 and len(Capture.streams) == 4 and gc.isenabled()


def test_captures_take_no_streams_from_the_callers(captures: torch.device) -> None:
    """All on a device go through the same few; each of them forks from the captured one and joins it."""
    for count in (1, 3, 2):
        segment(captures, count)._capture()
    segment(torch.device("cuda", 0), 1)._capture()
    assert len(set(map(id, Capture.streams))) == 2, "one for each device"
    main, *others = gpu_segment._STREAMS[captures]
    assert len(others) == 2 and len(gpu_segment._STREAMS) == 2
    assert main.waits == [others[0], others[1], others[0]] and [len(stream.waits) for stream in others] == [2, 1]


def test_a_capture_that_fails_leaves_no_stream_behind(captures: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph leaves its own stream the current one where the capture cannot end, as with streams that have
    not joined it; the error is the launch's, not that of the end.
    """
    current, able = [Stream(captures)], [True]
    here = current[0]

    @contextlib.contextmanager
    def entered(stream: Stream) -> Any:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    class Graph(Capture):
        def __enter__(self) -> None:
            super().__enter__()
            current[0] = Capture.streams[-1]

        def __exit__(self, *error: object) -> None:
            super().__exit__()
            main, *others = gpu_segment._STREAMS[captures]
            if not able[0] or [one for one in others if one not in main.waits]:
                raise RuntimeError("the capture cannot end")
            current[0] = here

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    made = segment(captures, 3)
    monkeypatch.setattr(made, "_in_order", lambda: None)
    made.launches[1] = [SimpleNamespace(run=interrupted)]
    for ends, said in ((True, KeyboardInterrupt), (False, RuntimeError)):
        able[0] = ends
        with pytest.raises(said):
            made._capture()
        assert current == [here] and gc.isenabled() and not gpu_segment._CAPTURING.locked()


def test_a_call_that_fails_still_marks_its_end(captures: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it launched before may still run when the next call, from another stream, writes the same memory."""

    class Run:
        def __init__(self, *arguments: object) -> None: ...

        def run(self) -> list[Any]:
            raise torch.OutOfMemoryError("no room for the results")

    marks: list[object] = []
    program = gpu_runner.GpuCompiled.__new__(gpu_runner.GpuCompiled)
    program.device, program._static, program._stream = captures, SimpleNamespace(bytes=1), None  # type: ignore[assignment]
    program._done = SimpleNamespace(record=marks.append)  # type: ignore[assignment]
    program._lock, program._keeper = gpu_runner.threading.Lock(), SimpleNamespace(admit=lambda one: None)  # type: ignore[assignment]
    monkeypatch.setattr(gpu_runner, "_Run", Run)
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: captures.index)
    with pytest.raises(torch.OutOfMemoryError):
        program.run([])
    assert marks == [stream] and not program._lock.locked()
