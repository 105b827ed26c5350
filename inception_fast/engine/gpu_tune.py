"""Finds the fastest tile of every convolution of a model on the GPU that is here, and keeps it in the user's cache.

On Hopper the CUDA kernels are timed beside Triton's, and which one won is kept as well. Runs only when asked;
`optimize` reads the cache and never writes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import hopper_gpu
from ..kernels import cuda
from ..kernels.cuda import abi, choices, pooled
from ..kernels.cuda import convolve as hopper
from ..kernels.cuda import tune as hopper_tune
from ..kernels.cuda.convolve import Cut, Problem, Target
from ..kernels.maps import dense
from ..kernels.plan import ConvStep, PairStep
from ..kernels.spec import ConvSpec, PoolSpec
from ..kernels.triton import configs, pools, tune
from ..kernels.triton.configs import Config, Row
from ..kernels.triton.convolve import Part, pack
from .gpu_plan import DTYPES, GpuPlan, Task
from .gpu_pooled import candidates
from .gpu_runner import GpuCompiled
from .runner import optimize

Progress = Callable[[int, int, Row], None]
Draw = Callable[[ConvSpec], tuple[Tensor, Tensor, Tensor, Tensor]]  # x, weight, scale and shift
KEPT = 4  # cuts of siblings as one wide convolution that are timed again as they run


class Wanted(NamedTuple):
    """A convolution as tiles and cuts are looked up for it, with all of its columns, and the groups of columns that its
    launch computes, each for a place of its own. A `stem` reads the caller's image; one with a `residual` adds to it.
    """

    spec: ConvSpec
    groups: tuple[ConvSpec, ...]
    stem: bool = False
    residual: bool = False

    def drawn(self, draw: Draw) -> tuple[Tensor, list[Part]]:
        """x, for a stem images in planes as they wait for it, and the groups' weights."""
        parts = []
        for group in self.groups:
            _, weight, scale, shift = draw(dataclasses.replace(group, n=1))
            parts.append(Part(weight, scale, shift, (group.padding[0], group.padding[2]), group.relu))
        x = draw(self.spec)[0]
        return x.contiguous() if self.stem else x, parts

    def old(self, device: torch.device) -> Tensor | None:
        """The residual [n, oh, ow, oc], each time the same one; None where there is none."""
        if not self.residual:
            return None
        spec, generator = self.spec, torch.Generator(device).manual_seed(1)
        values = torch.randn(spec.n, spec.oh, spec.ow, spec.oc, device=device, generator=generator)
        return values.to(DTYPES[spec.dtype])


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
    found: dict[ConvSpec, Wanted] = {}
    behind: list[tuple[ConvSpec, PoolSpec]] = []
    for shape in shapes:
        x = torch.zeros(shape, device=device)
        made = optimize(module, x, dtype=DTYPES[dtype], backend="triton")
        executable, _ = made._session.executable([x])
        assert isinstance(executable, GpuCompiled)
        plans = list(executable.native.values())
        found |= {one.spec: one for one in wanted(task for plan in plans for task in plan.tasks)}
        behind += pools_of(plans)
    fastest: dict[ConvSpec, float] = {}
    for i, one in enumerate(found.values(), 1):
        drawn = one.drawn(lambda spec: _draws(spec, device))
        times = tune.tried(one.spec, *drawn, arch, _seconds, stem=one.stem, residual=one.old(device))
        best = min(times, key=times.__getitem__)
        row = tune.row_of(one.spec, arch, best, times[best])
        keep(file, row)
        there = raced(one, times[best], device)
        fastest[one.spec] = times[best] if there is None else min(times[best], there.seconds)
        progress(i, len(found), row)
    for conv, pool in dict.fromkeys(behind):
        raced_pooled(conv, pool, fastest[conv], device)
    return file


def raced(wanted: Wanted, against: float, device: torch.device) -> choices.Row | None:
    """The fastest of the CUDA kernels beside Triton's best, kept; None where they do not run."""
    from .. import dispatch

    spec = wanted.spec
    if not dispatch.backend_status()["cuda"] or hopper_gpu.reasons(spec):
        return None
    gpu = torch.cuda.get_device_name(device)
    found = hopper_tune.tried(cuda.library(), spec, *_draws(spec, device), _seconds, residual=wanted.old(device))
    if len(wanted.groups) > 1:
        x, parts = wanted.drawn(lambda spec: _draws(spec, device))
        found = {cut: _seconds(call) for cut, call in scattered(wanted, x, parts, found).items()}
    if not found:
        return None
    row = choice(spec, gpu, found, against)
    choices.keep(choices.cache_file(gpu, abi.ABI), row)
    return row


def raced_pooled(conv: ConvSpec, pool: PoolSpec, separate: float, device: torch.device) -> choices.Row | None:
    """The fastest launch of a convolution with the maximum behind it, beside the two, of which the convolution takes
    `separate` seconds, kept; None where none runs them.
    """
    from .. import dispatch

    if not dispatch.backend_status()["cuda"] or hopper_gpu.reasons(conv):
        return None
    if pooled.spec_reasons(cuda.library(), conv, pool):
        return None
    found = hopper_tune.tried(cuda.library(), conv, *_draws(conv, device), _seconds, pool=pool)
    best, gpu = min(found, key=found.__getitem__), torch.cuda.get_device_name(device)
    against = separate + _seconds(pool_call(pool, device))
    row = choices.Row(gpu, hopper_gpu.shape_of(conv, "pooled"), best.config.name, 1, found[best], against)
    choices.keep(choices.cache_file(gpu, abi.ABI), row)
    return row


def pool_call(pool: PoolSpec, device: torch.device) -> Callable[[], None]:
    """Triton's prepared launches of a pool, on maps of its own."""
    x = torch.randn(pool.n, pool.h, pool.w, pool.c, device=device).to(DTYPES[pool.dtype])
    y = torch.empty(pool.n, pool.oh, pool.ow, pool.c, device=device, dtype=x.dtype)
    launches = pools.pooled(pool, dense(x), dense(y))

    def call() -> None:
        for launch in launches:
            launch.run()

    return call


def pools_of(plans: Sequence[GpuPlan]) -> list[tuple[ConvSpec, PoolSpec]]:
    """The distinct convolutions that could be one launch with the maximum behind them, as `wanted` has them, and it."""
    found = [one for plan in plans for one in candidates(plan.plan, plan.kept)]
    specs = [(dataclasses.replace(one.first.spec, groups=1, residual=False), one.second.spec) for one in found]
    return list(dict.fromkeys(specs))


def scattered(
    wanted: Wanted, x: Tensor, parts: Sequence[Part], found: dict[Cut, float]
) -> dict[Cut, Callable[[], Tensor]]:
    """Calls by the best of those cuts that can scatter: siblings were first timed as one wide convolution."""
    calls: dict[Cut, Callable[[], Tensor]] = {}
    for cut in sorted(found, key=found.__getitem__):
        if len(calls) < KEPT and able(wanted, cut):
            calls[cut] = cuda_call(wanted, x, parts, cut)
    return calls


def able(wanted: Wanted, cut: Cut) -> bool:
    """Whether a cut runs every block of groups."""
    blocks = [[wanted.groups[i] for i in block] for block in _blocks(wanted)]
    wide = [(dataclasses.replace(b[0], oc=sum(g.oc for g in b)), tuple(g.oc for g in b)) for b in blocks]
    return all(cut.config in hopper.able(cuda.library(), spec, columns) for spec, columns in wide)


def _blocks(wanted: Wanted) -> list[list[int]]:
    """Groups with the same taps and padding: one problem of the CUDA kernels."""
    numbers = range(len(wanted.groups))
    taps = [(group.kh, group.kw, group.padding) for group in wanted.groups]
    return [list(block) for _, block in itertools.groupby(numbers, key=taps.__getitem__)]


def cuda_call(wanted: Wanted, x: Tensor, parts: Sequence[Part], cut: Cut) -> Callable[[], Tensor]:
    """A prepared launch of the CUDA kernels with all destinations, and the memory of its results."""
    source, problems = hopper_gpu.nhwc(x), []
    y, places = tune.results(wanted.spec, [group.oc for group in wanted.groups], x.device)
    residual = wanted.old(x.device)
    old = None if residual is None else dense(residual)
    for block in _blocks(wanted):
        groups = [wanted.groups[i] for i in block]
        weight, scale, shift = (torch.cat(rows) for rows in zip(*(parts[i][:3] for i in block), strict=True))
        packed = hopper.pack(weight, scale, shift, x.dtype, x.device)
        spec = dataclasses.replace(groups[0], oc=sum(group.oc for group in groups), residual=wanted.residual)
        targets = tuple(Target(places[i], wanted.groups[i].relu) for i in block)
        problems.append(Problem(spec, source, packed, targets, old))
    launch = hopper.group("tuned", cuda.library(), problems, cut)

    def call() -> Tensor:
        launch.run()
        return y

    return call


def triton_call(wanted: Wanted, x: Tensor, parts: Sequence[Part], config: Config) -> Callable[[], Tensor]:
    """The prepared launches of a tile with all destinations, and the memory of its results."""
    packed = pack(parts, DTYPES[wanted.spec.dtype], x.device)
    y, made = tune.prepared(wanted.spec, x, packed, wanted.stem, residual=wanted.old(x.device))
    launches = made(config)

    def call() -> Tensor:
        for launch in launches:
            launch.run()
        return y

    return call


def choice(spec: ConvSpec, gpu: str, found: dict[Cut, float], against: float) -> choices.Row:
    """The row of a race."""
    best = min(found, key=found.__getitem__)
    return choices.Row(gpu, hopper_gpu.shape_of(spec), best.config.name, best.splits, found[best], against)


def wanted(tasks: Iterable[Task]) -> list[Wanted]:
    """The distinct convolutions that tiles are looked up for; siblings count as one wide convolution, and one that has
    a residual somewhere has it.
    """
    found: dict[ConvSpec, Wanted] = {}
    for task in tasks:
        step = task.step
        if task.packed is not None and isinstance(step, (ConvStep, PairStep)):
            both = (step.first, step.second) if isinstance(step, PairStep) else (step,)
            plain = [(dataclasses.replace(s.spec, groups=1, residual=False), s.outputs) for s in both]
            groups = tuple(
                dataclasses.replace(spec, oc=o.view.channels, relu=o.relu) for spec, outputs in plain for o in outputs
            )
            spec = dataclasses.replace(plain[0][0], oc=sum(group.oc for group in groups))
            old = len(groups) == 1 and both[0].residual is not None
            if spec not in found or old:
                found[spec] = Wanted(spec, groups, task.entry is not None, old)
    return list(found.values())


def keep(file: Path, row: Row) -> None:
    """Adds a row to the cache in place of an older one for the same shape."""
    with choices.locked(file):
        older = configs.read(file) if file.exists() else []
        rows = [other for other in older if other[:5] != row[:5]] + [row]
        configs.write(file, rows, {"origin": "measured on this machine"})


def _draws(spec: ConvSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = DTYPES[spec.dtype]
    x = torch.randn(spec.n, spec.c, spec.h, spec.w, device=device).to(dtype)
    weight = torch.randn(spec.oc, spec.c, spec.kh, spec.kw, device=device) / (spec.c * spec.kh * spec.kw) ** 0.5
    return x, weight, torch.ones(spec.oc, device=device), torch.zeros(spec.oc, device=device)


def _seconds(call: Callable[[], object], rounds: int = 9) -> float:
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
