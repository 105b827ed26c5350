"""The host side of the Hopper convolutions: packed weights, what can run, how it is cut, launches for given maps."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..maps import Map
from ..spec import ConvSpec
from . import abi
from .loader import Config, Library

ALIGNED = 256  # of workspaces; stands in for addresses where only shapes matter
MULTIPROCESSORS = 132
CLOCK = 1.98e9  # cycles a second of an H200
SHARED = 128  # bytes a cycle of a multiprocessor's shared memory
MEMORY = 3.6e12  # bytes a second of the device's, as convolutions reach it
LAUNCH = 3e-6
SPLITS = (1, 2, 3, 4, 6, 8)


class Packed(NamedTuple):
    """weight [kh * kw, oc, c], rounded once; scale and shift float32 [oc]."""

    weight: Tensor
    scale: Tensor
    shift: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


class Target(NamedTuple):
    """Where a range of output columns goes."""

    y: Map
    relu: bool


class Cut(NamedTuple):
    """How a group of convolutions is run: by which configuration, each with its walk over K in `splits` parts."""

    config: Config
    splits: int = 1


class Problem(NamedTuple):
    """One convolution of a group, on given maps. `pooled`: the rows and columns of its targets where these are the 3x3
    maxima at stride 2 of its result, else zeros.
    """

    spec: ConvSpec
    x: Map
    packed: Packed
    targets: tuple[Target, ...]
    residual: Map | None = None
    residual_scale: float = 1.0
    pooled: tuple[int, int] = (0, 0)


def pack(weight: Any, scale: Any, shift: Any, dtype: torch.dtype, device: torch.device | str) -> Packed:
    """weight [oc, c, kh, kw]; scale and shift [oc] or None."""
    w = _tensor(weight)
    oc, c, kh, kw = w.shape
    rows = w.permute(2, 3, 0, 1).reshape(kh * kw, oc, c).to(device=device, dtype=dtype).contiguous()
    return Packed(rows, _vector(scale, oc, 1.0, device), _vector(shift, oc, 0.0, device))


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values.detach()


def _vector(values: Any, length: int, default: float, device: torch.device | str) -> Tensor:
    if values is None:
        return torch.full((length,), default, dtype=torch.float32, device=device)
    return _tensor(values).to(device=device, dtype=torch.float32).contiguous()


def spec_reasons(library: Library, spec: ConvSpec, columns: tuple[int, ...] = ()) -> list[str]:
    """Why no configuration runs the spec, its output columns cut into ranges of these sizes; empty when one does."""
    return list(_reasons(library, spec, columns or (spec.oc,)))


def able(library: Library, spec: ConvSpec, columns: tuple[int, ...] = ()) -> tuple[Config, ...]:
    """The configurations that run the spec, in the library's order."""
    return _able(library, spec, columns or (spec.oc,))


@functools.lru_cache(maxsize=4096)
def _reasons(library: Library, spec: ConvSpec, columns: tuple[int, ...]) -> tuple[str, ...]:
    unsaid = unsayable(spec, columns)
    if unsaid:
        return unsaid
    alone = [blank(spec, columns)]
    each = [library.reasons(alone, spec.dtype, config) for config in library.configs]
    fewest: list[str] = min(each, key=lambda reasons: len(reasons), default=["the library has no configurations"])
    return tuple(fewest)


def unsayable(spec: ConvSpec, columns: tuple[int, ...]) -> tuple[str, ...]:
    """What the C structure has no words for."""
    if spec.dtype not in abi.TYPES:
        return (f"dtype {spec.dtype}; allowed: {', '.join(abi.TYPES)}",)
    if spec.groups != 1:
        return (f"groups {spec.groups}; allowed: 1",)
    if len(columns) > abi.OUTPUTS:
        return (f"{len(columns)} destinations; allowed: up to {abi.OUTPUTS}",)
    return ()


@functools.lru_cache(maxsize=4096)
def _able(library: Library, spec: ConvSpec, columns: tuple[int, ...]) -> tuple[Config, ...]:
    if _reasons(library, spec, columns):
        return ()
    alone = [blank(spec, columns)]
    return tuple(config for config in library.configs if not library.reasons(alone, spec.dtype, config))


def predicted(library: Library, spec: ConvSpec, columns: tuple[int, ...] = ()) -> Cut:
    """The cut that a model of tile and wave quantisation prefers; for those who named these kernels before a
    measurement did. Tiles that are stored behind are none of these: on an H200 they did not do what the model expects.
    Raises ValueError where no configuration runs the spec.
    """
    configs = [config for config in able(library, spec, columns) if not config.behind]
    best = min(
        ((modelled(spec, Cut(config, splits)), i, splits) for i, config in enumerate(configs)
         for splits in splits_of(spec, config, 4)),
        default=None,
    )  # fmt: skip
    if best is None:
        raise ValueError(f"{spec}: {'; '.join(spec_reasons(library, spec, columns))}")
    return Cut(configs[best[1]], best[2])


def splits_of(spec: ConvSpec, config: Config, least: int) -> list[int]:
    """Into how many parts a configuration may cut K so that each has `least` steps; halo tiles, and those that are
    stored behind, do not cut it.
    """
    if config.halo or config.behind:
        return [1]
    return [splits for splits in SPLITS if splits == 1 or _steps(spec, config) >= least * splits]


def _steps(spec: ConvSpec, config: Config) -> int:
    return spec.kh * spec.kw * math.ceil(spec.c / config.depth)


def modelled(spec: ConvSpec, cut: Cut) -> float:
    """Seconds on an H200 by a model of what a multiprocessor's shared memory and the device's memory give: of 238 timed
    cuts at batch 128 a seventh off (benchmarks/results/nvidia-h200/2026-11-26-gpu-13.json and -14.json).
    """
    config, splits = cut
    m = spec.n * spec.oh * spec.ow
    rows = m
    if config.halo:  # positions of the padded maps, those without an output too
        rows = spec.n * (spec.oh + spec.kh - 1) * (spec.ow + spec.kw - 1)
    units = math.ceil(rows / config.rows) * math.ceil(spec.oc / config.columns) * splits
    steps = math.ceil(_steps(spec, config) / splits)
    tiles = math.ceil(units / MULTIPROCESSORS) * (steps * _step_seconds(spec, config) + _tile_seconds(config))
    moved = 2 * (spec.n * spec.h * spec.w * spec.c + m * spec.oc * (1 + spec.residual))
    finish = 0.0 if splits == 1 else 1.0e-6 + 8 * m * spec.oc * splits / 3e12
    return max(tiles, moved / MEMORY) + LAUNCH + finish


def _step_seconds(spec: ConvSpec, config: Config) -> float:
    """Of `depth` channels of a tile at one tap. Each 16 of them are a product for each 64 rows, which reads its rows
    and all columns from shared memory, where copies wrote them.
    """
    blocks = config.rows / 64
    copied = float(config.rows)
    if config.halo:  # whole rows, once for all taps
        copied = (config.rows + spec.kh * (spec.ow + spec.kw - 1)) / (spec.kh * spec.kw)
    products = blocks * config.columns / 2
    moved = 32 * (config.rows + blocks * config.columns + copied + config.columns) / SHARED
    return config.depth / 16 * max(products, moved) / CLOCK


def _tile_seconds(config: Config) -> float:
    """What a tile takes beside its steps: to change turns, or to finish sums while nothing multiplies. That of tiles
    which are stored behind is expected, a third of what those take that store; on an H200 such tiles took longer.
    """
    if config.turns == 1:
        return 1.2e-6
    warpgroups = config.turns if config.halo else 2
    each = 0.3e-6 if config.behind else 0.9e-6
    return 0.3e-6 + each * config.columns * config.rows / (64 * 64 * warpgroups)


def blank(spec: ConvSpec, columns: tuple[int, ...], splits: int = 1, pooled: tuple[int, int] = (0, 0)) -> abi.Conv:
    """The convolution on dense maps at an address that every alignment divides: for questions about sizes alone."""
    outputs = [(ALIGNED, spec.oc, channels, 0) for channels in columns]
    residual = (ALIGNED, spec.oc) if spec.residual else (0, 0)
    return _filled(replace(spec, n=max(spec.n, 1)), (ALIGNED,) * 4, spec.c, outputs, residual, 1.0, splits, pooled)


def described(problem: Problem, splits: int) -> abi.Conv:
    """The problem as the library reads it."""
    packed, residual = problem.packed, problem.residual
    places = (problem.x.data.data_ptr(), *(t.data_ptr() for t in packed))
    outputs = [(t.y.data.data_ptr(), t.y.pitch, t.y.c, int(t.relu)) for t in problem.targets]
    old = (0, 0) if residual is None else (residual.data.data_ptr(), residual.pitch)
    scale, pooled = problem.residual_scale, problem.pooled
    return _filled(problem.spec, places, problem.x.pitch, outputs, old, scale, splits, pooled)


def _filled(
    spec: ConvSpec, places: Sequence[int], x_pitch: int, outputs: Sequence[tuple[int, int, int, int]],
    residual: tuple[int, int], residual_scale: float, splits: int, pooled: tuple[int, int],
) -> abi.Conv:  # fmt: skip
    x, weights, scale, shift = places
    return abi.Conv(
        x=x, weights=weights, scale=scale, shift=shift, residual=residual[0], x_pitch=x_pitch,
        residual_pitch=residual[1], n=spec.n, h=spec.h, w=spec.w, c=spec.c, oc=spec.oc, kh=spec.kh, kw=spec.kw,
        stride_h=spec.stride[0], stride_w=spec.stride[1], top=spec.padding[0], left=spec.padding[2],
        oh=spec.oh, ow=spec.ow, pooled_h=pooled[0], pooled_w=pooled[1], residual_scale=residual_scale, splits=splits,
        outputs=len(outputs),
        output=(abi.Output * abi.OUTPUTS)(*(abi.Output(*values) for values in outputs)),
    )  # fmt: skip


class Workspace(NamedTuple):
    """Memory for split sums: `counters` zeroed bytes that every launch leaves zeroed, then the sums."""

    data: Tensor
    counters: int

    def placed(self, whole: int, counters: int) -> int:
        """An address whose `counters` bytes end where everyone's end, so that launches in turn can share the memory.

        Raises ValueError where it is too small.
        """
        if counters > self.counters or self.counters - counters + whole > self.data.numel():
            raise ValueError(f"a workspace of {self.data.numel()} bytes, {self.counters} of them counters; needed: "
                             f"{whole}, {counters} of them counters")  # fmt: skip
        return self.data.data_ptr() + self.counters - counters


def workspace_sizes(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bytes of counters and of sums that serve launches with these (whole, counters) in turn."""
    return max((c for _, c in sizes), default=0), max((whole - c for whole, c in sizes), default=0)


def workspace(sizes: Sequence[tuple[int, int]], device: torch.device) -> Workspace | None:
    """One that serves launches with these (whole, counters) in turn; None where none needs any."""
    counters, parts = workspace_sizes(sizes)
    if counters + parts == 0:
        return None
    whole = torch.zeros(counters + parts + ALIGNED, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % ALIGNED
    return Workspace(whole[start : start + counters + parts], counters)


@dataclass(frozen=True)
class Launch:
    """A prepared launch. `kept` keeps the memory alive that the blob points at. `name` is for tables and traces."""

    name: str
    library: Library
    blob: ctypes.Array[ctypes.c_char]
    device: torch.device
    kept: tuple[Any, ...]

    def run(self) -> None:
        """Puts the kernel on the current stream of the device, which has to be the current one."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self.library.launch(self.blob, stream)


def group(
    name: str, library: Library, problems: Sequence[Problem], cut: Cut, *,
    place: Workspace | None = None, overlap: bool = False, blocks: int = 0,
) -> Launch:  # fmt: skip
    """Independent convolutions in one launch. `overlap`: it may start before the launch ahead of it has ended,
    and load its weights; these have to be whole before the last launch without `overlap` ahead of it. `blocks` limits
    the grid where it is not 0.

    Raises ValueError where the library refuses the group.
    """
    dtype, device = problems[0].spec.dtype, problems[0].x.data.device
    convs = [described(problem, cut.splits) for problem in problems]
    refused = library.reasons(convs, dtype, cut.config)
    if refused:
        raise ValueError(f"{name} with {cut.config.name}: {'; '.join(refused)}")
    sizes = library.workspace_bytes(convs, cut.config)
    place = place or workspace([sizes], device)
    address = 0 if place is None or not sizes[0] else place.placed(*sizes)
    blob = library.prepare(convs, dtype, cut.config, address, overlap, blocks)
    return Launch(name, library, blob, device, (tuple(problems), place))
