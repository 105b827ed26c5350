"""The host side of the walk: convolutions and pools that depend on each other, run by one kernel whose blocks stay.

A convolution is cut into tiles of 64 pixels and some columns, and its K into parts that are summed apart; `cut` says
how, by a model. A job starts when those that it needs have ended, and nothing else orders jobs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import Map
from ..spec import ConvSpec, PoolSpec
from . import abi, convolve
from .convolve import ALIGNED, SPLITS, Launch, Problem
from .loader import Library

ROWS, DEPTH = 64, 64  # pixels of a tile, channels of a step
LEAST_STEPS = 4  # of a part of K
# By traces of v3 on an H200: the first step's way through memory, what each one behind it takes by the tile's columns,
# and the parts of a split: written, counted, read again.
FIRST_SECONDS = 0.8e-6
STEP_SECONDS = {32: 0.08e-6, 64: 0.1e-6}
SPLIT_SECONDS, PART_SECONDS = 2.0e-6, 0.15e-6
TABLE_ALIGNED = 128
EMULATED_BLOCKS = 4  # where there is no GPU


class Cut(NamedTuple):
    """How a convolution is cut: columns of a tile, and parts of K. `ahead`: L2 is asked for weights that the ring of a
    block does not hold before their tile begins. `halo`: rows of x stay in shared memory for all taps.
    """

    columns: int
    splits: int = 1
    ahead: bool = False
    halo: bool = False


class Pooling(NamedTuple):
    """A pool on given maps; shift float32 [c]."""

    spec: PoolSpec
    x: Map
    y: Map
    shift: Tensor | None = None
    relu: bool = False


class Job(NamedTuple):
    """One of a walk's: a convolution with its cut, or a pool. `needs` are positions of earlier jobs."""

    work: Problem | Pooling
    cut: Cut | None = None
    needs: tuple[int, ...] = ()


class WalkLaunch(Launch):
    """A prepared walk."""

    def run(self) -> None:
        """Puts the kernel on the current stream of the device, which has to be the current one."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self.library.launch_walk(self.blob, stream)


def conv_reasons(library: Library, spec: ConvSpec, columns: tuple[int, ...], cut: Cut) -> list[str]:
    """Why the spec, its output columns cut into ranges of these sizes, cannot be a job; empty when it can."""
    return list(_conv_reasons(library, spec, columns, cut))


def pool_reasons(library: Library, spec: PoolSpec) -> list[str]:
    """Why the pool cannot be a job; empty when it can."""
    return list(_pool_reasons(library, spec))


@functools.lru_cache(maxsize=4096)
def _conv_reasons(library: Library, spec: ConvSpec, columns: tuple[int, ...], cut: Cut) -> tuple[str, ...]:
    unsaid = convolve.unsayable(spec, columns)
    return unsaid or tuple(library.walk_reasons([blank_conv(spec, columns, cut)], spec.dtype))


@functools.lru_cache(maxsize=4096)
def _pool_reasons(library: Library, spec: PoolSpec) -> tuple[str, ...]:
    if spec.dtype not in abi.TYPES:
        return (f"dtype {spec.dtype}; allowed: {', '.join(abi.TYPES)}",)
    return tuple(library.walk_reasons([blank_pool(spec)], spec.dtype))


def cut(spec: ConvSpec, widths: Sequence[int], blocks: int) -> Cut:
    """The cut that takes the fewest seconds by the model; of equal ones that in fewer parts, then the wider one.

    Raises ValueError without widths.
    """
    if not widths:
        raise ValueError("no widths of tiles; allowed: those of a library with a walk")
    able = [splits for splits in SPLITS if splits == 1 or _steps(spec) >= LEAST_STEPS * splits]
    options = [Cut(columns, splits) for splits in able for columns in sorted(widths, reverse=True)]
    return min(options, key=lambda option: modelled(spec, option, blocks))


def chosen(library: Library, spec: ConvSpec, columns: tuple[int, ...], blocks: int, wide: bool = False) -> Cut:
    """How the convolution, its output columns cut into ranges of these sizes, is cut: as `cut` says, and its rows of x
    stay where they can and a map has several tiles. By traces of v3 on an H200 convolutions with taps took 0 to 0.9 us
    less with these at 35x35 and 17x17, and 0.5 to 1.3 more at 8x8 (benchmarks/results/nvidia-h200/2026-11-28-gpu.json).
    `wide`: its result is float32, which such tiles do not store.
    """
    found = cut(spec, library.walk_columns, blocks)
    staying = found._replace(halo=True)
    pays = spec.kh * spec.kw > 1 and spec.oh * spec.ow > ROWS and not wide
    return staying if pays and not conv_reasons(library, spec, columns, staying) else found


def modelled(spec: ConvSpec, cut: Cut, blocks: int) -> float:
    """Seconds of the convolution alone by a model, good for an order among cuts, not for a figure."""
    tiles = math.ceil(spec.n * spec.oh * spec.ow / ROWS) * math.ceil(spec.oc / cut.columns)
    alone = math.ceil(_steps(spec) / cut.splits) * STEP_SECONDS[cut.columns]
    parts = SPLIT_SECONDS + cut.splits * cut.columns / 32 * PART_SECONDS if cut.splits > 1 else 0.0
    return FIRST_SECONDS + math.ceil(tiles * cut.splits / blocks) * alone + parts


def _steps(spec: ConvSpec) -> int:
    return spec.kh * spec.kw * math.ceil(spec.c / DEPTH)


def blocks_of(device: torch.device) -> int:
    """One for each multiprocessor."""
    if device.type != "cuda":
        return EMULATED_BLOCKS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def blank_conv(spec: ConvSpec, columns: tuple[int, ...], cut: Cut, needs: tuple[int, ...] = ()) -> abi.Job:
    """The job on dense maps at an address that every alignment divides: for questions about sizes alone."""
    return _filled(needs, convolve.blank(spec, columns, cut.splits), cut=cut)


def blank_pool(spec: PoolSpec, needs: tuple[int, ...] = ()) -> abi.Job:
    """As `blank_conv`."""
    return _filled(needs, pool=_pool(replace(spec, n=max(spec.n, 1)), (ALIGNED,) * 3, (spec.c, spec.c), False))


def described(job: Job) -> abi.Job:
    """The job as the library reads it. Raises ValueError for a convolution without a cut and for too many needs."""
    work = job.work
    if isinstance(work, Pooling):
        shift = 0 if work.shift is None else work.shift.data_ptr()
        places = (work.x.data.data_ptr(), work.y.data.data_ptr(), shift)
        return _filled(job.needs, pool=_pool(work.spec, places, (work.x.pitch, work.y.pitch), work.relu))
    if job.cut is None:
        raise ValueError("a convolution without a cut; allowed: columns and splits")
    conv = convolve.described(work, job.cut.splits)
    if work.targets[0].y.data.dtype == torch.float32:
        conv.output[0].relu |= abi.FLOAT32
    return _filled(job.needs, conv, cut=job.cut)


def _filled(
    needs: tuple[int, ...], conv: abi.Conv | None = None, pool: abi.Pool | None = None, cut: Cut | None = None
) -> abi.Job:
    if len(needs) > abi.NEEDS:
        raise ValueError(f"a job that needs {len(needs)} others; allowed: up to {abi.NEEDS}")
    need = (abi.c_int32 * abi.NEEDS)(*needs)
    if pool is not None:
        return abi.Job(kind=abi.POOL_JOB, needs=len(needs), need=need, pool=pool)
    assert conv is not None and cut is not None
    sizes = {"columns": cut.columns, "ahead": int(cut.ahead), "halo": int(cut.halo)}
    return abi.Job(kind=abi.CONV_JOB, needs=len(needs), need=need, conv=conv, **sizes)


def _pool(spec: PoolSpec, places: tuple[int, int, int], pitches: tuple[int, int], relu: bool) -> abi.Pool:
    average = abi.AVERAGE_PADDED_POOL if spec.count_include_pad else abi.AVERAGE_POOL
    top, bottom, left, right = spec.padding
    return abi.Pool(
        x=places[0], y=places[1], shift=places[2], x_pitch=pitches[0], y_pitch=pitches[1], n=spec.n, h=spec.h,
        w=spec.w, c=spec.c, kh=spec.kh, kw=spec.kw, stride_h=spec.stride[0], stride_w=spec.stride[1], top=top,
        left=left, bottom=bottom, right=right, oh=spec.oh, ow=spec.ow,
        kind=abi.MAX_POOL if spec.kind == "max" else average, relu=int(relu),
    )  # fmt: skip


def launch(name: str, library: Library, jobs: Sequence[Job], device: torch.device) -> WalkLaunch:
    """The jobs as one launch, with the memory that it needs: its table, copied here, and its workspace.

    Two launches of it must not run at the same time. Raises ValueError where the library refuses the jobs.
    """
    dtypes = sorted({job.work.spec.dtype for job in jobs})
    if len(dtypes) != 1:
        raise ValueError(f"{name}: jobs of dtypes {', '.join(dtypes) or 'none'}; allowed: jobs of one dtype")
    made, blocks = [described(job) for job in jobs], blocks_of(device)
    refused = library.walk_reasons(made, dtypes[0])
    if refused:
        raise ValueError(f"{name}: {'; '.join(refused)}")
    sizes = library.walk_sizes(made, blocks)
    table = _zeros(sizes.table, TABLE_ALIGNED, device)
    workspace = _zeros(sizes.workspace, ALIGNED, device)
    host, blob = library.prepare_walk(made, dtypes[0], table.data_ptr(), workspace.data_ptr(), blocks)
    table.copy_(torch.frombuffer(host, dtype=torch.uint8))
    return WalkLaunch(name, library, blob, device, (tuple(jobs), table, workspace))


def _zeros(size: int, aligned: int, device: torch.device) -> Tensor:
    whole = torch.zeros(size + aligned, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % aligned
    return whole[start : start + size]
