"""Whole networks on the device, beside their peers, after their numbers are right."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import xla
from journal import ENDED
from measure import DEVICE, Maker, checked
from timing import host_seconds, summary
from torch import Tensor, nn
from turns import alone

import inception_fast as fast
from inception_fast.backends import triton_gpu
from inception_fast.engine import gpu_walk
from inception_fast.engine.plan import lower
from inception_fast.measure.compare import BUDGET, PEER_SHARE, calibrate
from inception_fast.measure.gpu_profiler import tasks_of

CHECKED = 16  # images of a batch that are compared with float64
CUDA_SECONDS = 60.0  # to make, prove and time a network on the CUDA kernels
# As it chooses, without the CUDA kernels, all that these take on them, the same with a launch for each step, and as it
# chooses for every batch alike.
OURS = ("ours", "triton", "cuda", "separate", "invariant")
# Made and timed part by part, with all before: what tells most first, for any part may be the last of a slice, and the
# CUDA kernels last, since nothing else could run in the same process should they do what no test has seen.
LAST = ("separate", "cuda")
RACED = {
    "network": (("ours", "graphs", "unfrozen"), ("triton", "eager"), LAST),
    "peers": (("ours", "eager"), ("xla",), ("triton", "compile")),
    "xla": (("ours",), ("xla",)),
    "invariant": (("ours", "invariant"),),
}
ALL_CUDA = 32  # images, up to which a launch's start counts, so that more of them can pay than single layers say
INSTEAD = {"unfrozen": ("graphs",), "eager": ("graphs", "unfrozen")}  # only where none of those is right
# Where Inductor's freezing gives wrong logits in bfloat16: on an H200 torch 2.11 gives -2.8 for -0.4
# (benchmarks/results/nvidia-h200/2026-11-26-gpu-13.json).
FROZEN_WRONG = ("inception_resnet_v2",)


def network_rows(model: str, n: int, dtype: str, tiles: int = 0, cuda: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Ours, Inductor with CUDA graphs and freezing, without the latter where that is wrong, ours on Triton alone where
    there are CUDA kernels too, eager channels_last with cudnn.benchmark where Inductor is wrong, then, with `cuda`, all
    that the CUDA kernels take, at batches that have walks without these first. `tiles`: how many measured ones ours
    knows.
    """
    return _raced(model, n, dtype, tiles, [part for part in RACED["network"] if cuda or part != LAST])


def peer_rows(model: str, n: int, dtype: str, tiles: int = 0, which: str = "peers") -> Iterator[list[dict[str, Any]]]:
    """Ours, then eager as well, XLA, Inductor's max-autotune with CUDA graphs and freezing; with `which` "xla" ours and
    XLA alone, with "invariant" ours and what it is where every batch has the same bits.
    """
    return _raced(model, n, dtype, tiles, RACED[which])


def _raced(
    model: str, n: int, dtype: str, tiles: int, parts: Sequence[Sequence[str]]
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far: with one more as each is made, and with all times anew after each part."""
    makers, truth = network_calls(model, n, dtype)
    about = {"model": model, "batch": n, "dtype": dtype, "tiles": tiles}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for part in parts:
        before = len(rows)
        for name in part:
            if name not in makers or (name in INSTEAD and _right(rows, INSTEAD[name])):
                continue
            with ended_after(CUDA_SECONDS) if name in LAST else contextlib.nullcontext():
                some, right = checked_calls({name: makers[name]}, about, truth, dtype)
            rows, calls = {**rows, **some}, {**calls, **right}
            yield list(rows.values())
        if len(rows) > before:
            with alone(), ended_after(CUDA_SECONDS):  # the turn is waited for before
                _timed(rows, calls)
            yield list(rows.values())


def _right(rows: dict[str, dict[str, Any]], names: Sequence[str]) -> bool:
    return any(rows.get(name, {}).get("status") == "ok" for name in names)


def _timed(rows: dict[str, dict[str, Any]], calls: dict[str, Callable[[], Any]]) -> None:
    """Gives each row its times beside all others."""
    with torch.no_grad():
        for runtime, seconds in host_seconds(calls).items() if calls else ():
            rows[runtime] |= summary(seconds)
    choice = walk_choice(rows, calls)
    if choice is not None:
        rows["cuda"]["choice"] = choice
    ours = rows["ours"].get("median_ms")
    for row in rows.values():
        row["ratio"] = row["median_ms"] / ours if ours and "median_ms" in row else None


class Network:
    """A network of ours on its images."""

    def __init__(self, made: Any, x: Tensor) -> None:
        self.made, self.x = made, x

    def __call__(self) -> Tensor:
        return self.made(self.x)

    @property
    def jobs(self) -> int:
        """Of its walks."""
        tasks = tasks_of(self.made, self.x) if self.made.backend in ("cuda", "triton") else []
        return sum(len(task.walk.members) for _, task in tasks if task.walk is not None)


def walk_choice(rows: dict[str, dict[str, Any]], calls: dict[str, Callable[[], Any]]) -> list[Any] | None:
    """The row by which plans choose walks: the network's time with them beside the shortest of ours without."""
    jobs = {name: call.jobs for name, call in calls.items() if isinstance(call, Network)}
    apart = [rows[name]["median_ms"] / 1e3 for name, count in jobs.items() if count == 0]
    if not jobs.get("cuda") or not apart:
        return None
    cuda = rows["cuda"]
    shape = gpu_walk.shape_of(cuda["dtype"], cuda["batch"], jobs["cuda"])
    return [torch.cuda.get_device_name(), *shape, "walk", 1, cuda["median_ms"] / 1e3, min(apart)]


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends the process when what is inside takes longer: nothing else gets out of a kernel that hangs."""

    def end() -> None:
        print(f"the CUDA kernels took longer than {seconds:.0f} s", flush=True)
        os._exit(ENDED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def checked_calls(
    makers: dict[str, Maker], about: dict[str, Any], truth: Tensor, dtype: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[], Any]]]:
    with torch.no_grad():
        return checked(
            makers, about, truth, lambda runtime: BUDGET[dtype] * (1.0 if runtime in OURS else PEER_SHARE[dtype])
        )


def network_calls(model: str, n: int, dtype: str) -> tuple[dict[str, Maker], Tensor]:
    """The runtimes by name, and the logits of the first images in float64."""
    kind = getattr(torch, dtype)
    net, x = network_of(model, n)
    calibrate(net, x[:2].cpu())
    truth = _truth(net, model, x[:CHECKED])
    torch.backends.cudnn.benchmark = True
    peer = _copied(net, model).to(DEVICE, kind, memory_format=torch.channels_last)
    given = x.to(kind).contiguous(memory_format=torch.channels_last)

    def ours(backend: str | None = None, invariant: bool = False) -> Callable[[], Tensor]:
        return Network(fast.optimize(net, x, dtype=kind, backend=backend, batch_invariant=invariant), x)

    def separate() -> Callable[[], Tensor]:
        with gpu_walk.disabled():
            return ours("cuda")

    def through_xla() -> Callable[[], Any]:
        torch.cuda.empty_cache()  # JAX has an allocator of its own
        call = xla.network(plan_of(net, x, dtype), [x], dtype)
        return lambda: call().block_until_ready()

    makers: dict[str, Maker] = {
        "ours": ours,
        "invariant": lambda: ours(invariant=True),
        "eager": lambda: lambda: peer(given),
        "graphs": lambda: compiled(peer, given, "reduce-overhead"),
        "unfrozen": lambda: compiled(peer, given, "reduce-overhead", freezing=False),
        "xla": through_xla,
        "compile": lambda: compiled(peer, given, "max-autotune"),
    }
    if fast.backend_status()["cuda"]:
        kinds = ("triton", "cuda") if n <= ALL_CUDA else ("triton",)
        makers |= {backend: lambda backend=backend: ours(backend) for backend in kinds}
        makers |= {"separate": separate} if n <= gpu_walk.WALK_BATCH else {}
    if model in FROZEN_WRONG and dtype == "bfloat16":
        del makers["graphs"]
    return makers, truth


def network_of(model: str, n: int) -> tuple[nn.Module, Tensor]:
    """The network on the CPU, and images on the GPU."""
    torch.manual_seed(0)
    net = fast.create_model(model).eval()
    size = net.data_config.input_size[-1]
    return net, torch.randn(n, 3, size, size, device=DEVICE)


def compiled(peer: nn.Module, x: Tensor, mode: str, *, freezing: bool = True) -> Callable[[], Tensor]:
    """By Inductor, with CUDA graphs. Its result is a graph's own memory, hence the copy."""
    import torch._inductor.config as inductor

    if not freezing:
        torch._dynamo.reset()  # else what was compiled of the same module with freezing would be taken
    made = torch.compile(peer, mode=mode, dynamic=False)
    with inductor.patch(freezing=freezing):
        made(x)
    return lambda: made(x).clone()


def plan_of(net: nn.Module, x: Tensor, dtype: str) -> Any:
    """The one plan that our engine makes of the network, for inputs like x."""
    like = torch.zeros(x.shape)
    captured = fast.optimize(net, like, backend="torch")._session.executable([like])[1]
    program = lower(captured.graph, [like], triton_gpu.spec_reasons, dtype)
    (item,) = program.items
    return item.plan


def _copied(net: nn.Module, model: str) -> nn.Module:
    twin = fast.create_model(model).eval()
    twin.load_state_dict(net.state_dict())
    return twin


def _truth(net: nn.Module, model: str, x: Tensor) -> Tensor:
    wide = _copied(net, model).to(x.device, torch.float64)
    with torch.inference_mode():
        return torch.cat([wide(part.double()) for part in x.split(8)])
