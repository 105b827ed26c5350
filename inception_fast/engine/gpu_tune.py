"""Finds the fastest tile of every convolution of a model on the GPU that is here, and keeps it in the user's cache.

On Hopper the CUDA kernels are timed beside Triton's, and which one won is kept as well. Runs only when asked;
`optimize` reads the cache and never writes it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends import hopper_gpu
from ..kernels import cuda
from ..kernels.cuda import abi, choices
from ..kernels.cuda import tune as hopper_tune
from ..kernels.cuda.convolve import Cut
from ..kernels.plan import ConvStep, PairStep
from ..kernels.spec import ConvSpec
from ..kernels.triton import configs, tune
from ..kernels.triton.configs import Row
from .gpu_plan import DTYPES, Task
from .gpu_runner import GpuCompiled
from .runner import optimize

Progress = Callable[[int, int, Row], None]


def tune_model(
    module: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: str, progress: Progress = lambda done, all_, row: None
) -> Path:
    """Tunes the module's convolutions for inputs of these shapes; returns the cache file, written after each.

    Raises RuntimeError where there is no GPU that the Triton kernels run on.
    """
    from .. import dispatch

    status = dispatch.backend_status()["triton"]
    if not status:
        raise RuntimeError(f"backend 'triton' cannot run here: {status.reason}")  # type: ignore[union-attr]
    device = torch.device("cuda")
    arch = configs.arch_of(torch.cuda.get_device_capability(device))
    file = configs.cache_file(torch.cuda.get_device_name(device))
    specs: dict[ConvSpec, None] = {}
    for shape in shapes:
        x = torch.zeros(shape, device=device)
        made = optimize(module, x, dtype=DTYPES[dtype], backend="triton")
        executable, _ = made._session.executable([x])
        assert isinstance(executable, GpuCompiled)
        specs |= dict.fromkeys(wanted_specs([task for plan in executable.native.values() for task in plan.tasks]))
    for i, spec in enumerate(specs, 1):
        found = tune.tried(spec, *_draws(spec, device), arch, _seconds)
        best = min(found, key=found.__getitem__)
        row = tune.row_of(spec, arch, best, found[best])
        keep(file, row)
        raced(spec, found[best], device)
        progress(i, len(specs), row)
    return file


def raced(spec: ConvSpec, against: float, device: torch.device) -> choices.Row | None:
    """The fastest of the CUDA kernels beside Triton's best, kept; None where they do not run."""
    from .. import dispatch

    if not dispatch.backend_status()["cuda"] or hopper_gpu.reasons(spec):
        return None
    gpu = torch.cuda.get_device_name(device)
    found = hopper_tune.tried(cuda.library(), spec, *_draws(spec, device), _seconds)
    row = choice(spec, gpu, found, against)
    choices.keep(choices.cache_file(gpu, abi.ABI), row)
    return row


def choice(spec: ConvSpec, gpu: str, found: dict[Cut, float], against: float) -> choices.Row:
    """The row of a race."""
    best = min(found, key=found.__getitem__)
    return choices.Row(gpu, hopper_gpu.shape_of(spec), best.config.name, best.splits, found[best], against)


def wanted_specs(tasks: Sequence[Task]) -> list[ConvSpec]:
    """The distinct convolutions that tiles are looked up for; siblings count as one wide convolution."""
    found: dict[ConvSpec, None] = {}
    for task in tasks:
        if task.entry is None and task.packed is not None and isinstance(task.step, (ConvStep, PairStep)):
            spec = task.step.first.spec if isinstance(task.step, PairStep) else task.step.spec
            columns = sum(group.channels for group in task.packed.groups)
            found[dataclasses.replace(spec, oc=columns, groups=1, residual=False)] = None
    return list(found)


def keep(file: Path, row: Row) -> None:
    """Adds a row to the cache in place of an older one for the same shape."""
    older = configs.read(file) if file.exists() else []
    rows = [other for other in older if other[:5] != row[:5]] + [row]
    configs.write(file, rows, {"origin": "measured on this machine"})


def _draws(spec: ConvSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = DTYPES[spec.dtype]
    x = torch.randn(spec.n, spec.c, spec.h, spec.w, device=device).to(dtype)
    weight = torch.randn(spec.oc, spec.c, spec.kh, spec.kw, device=device) / (spec.c * spec.kh * spec.kw) ** 0.5
    return x, weight, torch.ones(spec.oc, device=device), torch.zeros(spec.oc, device=device)


def _seconds(call: Callable[[], None], rounds: int = 9) -> float:
    """Median time on the device; a busy backlog keeps the launches out of it."""
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
