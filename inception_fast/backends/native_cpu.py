"""The "cpu" backend: one-step plans of the native kernels, compiled once per shape and weights.

Weights are packed in `prepare` and never again until a weight, scale or shift changes: replaced, written in place, or
written behind torch's back (`Stamp`). Safe from any number of threads.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dispatch import PoolProjectSpec, Spec
from ..kernels import cpu
from ..kernels.plan import (
    ALIGNMENT,
    Buffer,
    ConvStep,
    ImportStep,
    Output,
    PairStep,
    Plan,
    PoolStep,
    Step,
    View,
)
from ..kernels.spec import ConvSpec, PairSpec, PoolSpec
from . import Params
from .stamp import Stamp, as_array, can_stamp
from .window import Window

CACHE_BYTES = 1 << 30  # packed weights kept at most, beside the newest plan
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Layout = tuple[bool, bool]  # whether x and the residual are dense NHWC


class Prepared(NamedTuple):
    compiled: cpu.CompiledPlan
    shape: tuple[int, int, int, int]  # of y, logically NCHW


class Entry(NamedTuple):
    prepared: Prepared
    stamps: tuple[Stamp, ...]


class PlanCache:
    """Compiled plans by spec, layout and weights, while these live; the least recently used leave above `limit`."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._entries: OrderedDict[tuple[Any, ...], Entry] = OrderedDict()
        # Re-entrant: a dying weight calls back wherever its last reference falls, be it inside this class.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> Prepared | None:
        """The plan under `key` if `tensors` hold what they held when it was compiled."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        if all(map(Stamp.holds, entry.stamps, tensors)):
            return entry.prepared
        self._drop(key)
        return None

    def put(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], prepared: Prepared) -> None:
        def dropped(_: Any) -> None:
            self._drop(key)

        entry = Entry(prepared, tuple(Stamp(tensor, dropped) for tensor in tensors))
        with self._lock:
            self._drop(key)
            self._entries[key] = entry
            self._bytes += prepared.compiled.packed_bytes
            while self._bytes > self._limit and len(self._entries) > 1:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        with self._lock:
            while self._entries:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[Any, ...]) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._bytes -= entry.prepared.compiled.packed_bytes


plans = PlanCache()


def reasons(spec: Spec) -> list[str]:
    if isinstance(spec, PoolProjectSpec):
        return list(dict.fromkeys(cpu.reasons(spec.conv) + cpu.reasons(spec.pool)))
    return cpu.reasons(spec)


def prepare(
    spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float, winograd: bool = False
) -> Prepared:
    """The compiled plan for these weights, from the cache when they have not changed. winograd: by tiles that pay."""
    key, layout, tensors = _key(spec, params, x, residual, residual_scale, winograd)
    prepared = plans.get(key, tensors)
    if prepared is None:
        writer = _PlanWriter(layout, str(x.dtype).removeprefix("torch."), winograd)
        plan = writer.write(spec, params, residual_scale)
        n, oh, ow, oc = _output_shape(spec)
        prepared = Prepared(cpu.compile(plan), (n, oc, oh, ow))
        if all(map(can_stamp, tensors)):
            plans.put(key, tensors, prepared)
    return prepared


def find(
    spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float, winograd: bool = False
) -> Prepared | None:
    """What `prepare` would take from the cache."""
    key, _, tensors = _key(spec, params, x, residual, residual_scale, winograd)
    return plans.get(key, tensors)


def _key(
    spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float, winograd: bool
) -> tuple[tuple[Any, ...], Layout, tuple[Tensor, ...]]:
    """Under what the cache has a plan, how x and the residual lie, and the tensors that it was compiled from."""
    layout = (_is_nhwc(x), residual is None or _is_nhwc(residual))
    tensors = tuple(tensor for triple in params for tensor in triple)
    return (spec, layout, residual_scale, winograd, *(tensor.data_ptr() for tensor in tensors)), layout, tensors


def run(prepared: Prepared, x: Tensor, residual: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    compiled, (n, c, h, w) = prepared
    out = torch.empty((n, c, h, w), dtype=x.dtype, memory_format=memory_format, device="cpu")
    direct = memory_format is torch.channels_last or c == 1 or h * w == 1
    nhwc = out if direct else torch.empty((n, c, h, w), dtype=x.dtype, memory_format=torch.channels_last, device="cpu")
    aligned = 0
    if compiled.arena_bytes:
        arena = torch.empty(compiled.arena_bytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
        aligned = -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
    inputs: Any = [(t.data_ptr(), NAMES[t.dtype], t.stride()) for t in (x, residual) if t is not None]
    compiled.run(inputs, [nhwc.data_ptr()], aligned, torch.get_num_threads())
    return out if direct else out.copy_(nhwc)


def pool(x: Tensor, window: Window) -> Tensor:
    """The window's pool of a dense channels_last map."""
    prepared = _pool_plan(window, NAMES[x.dtype], *x.shape)
    return run(prepared, x, None, torch.channels_last)


@functools.lru_cache(maxsize=256)
def _pool_plan(window: Window, dtype: str, n: int, c: int, h: int, w: int) -> Prepared:
    (top, left), kind = window.padding, "max" if window.kind == "max" else "avg"
    include = window.kind == "mean_with_padding"
    spec = PoolSpec(n, h, w, c, *window.kernel, window.stride, (top, top, left, left), kind, include, dtype=dtype)
    x, y = Buffer(n, h, w, c, "input", 0, dtype), Buffer(n, spec.oh, spec.ow, c, "output", 0, dtype)
    plan = Plan((x, y), (PoolStep("pool", spec, View(0, 0, c), View(1, 0, c)),), ((n, c, h, w),), 0)
    return Prepared(cpu.compile(plan), (n, c, spec.oh, spec.ow))


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _output_shape(spec: Spec) -> tuple[int, int, int, int]:
    """[n, oh, ow, oc] of what the spec writes."""
    if isinstance(spec, ConvSpec):
        return spec.n, spec.oh, spec.ow, spec.oc
    if isinstance(spec, PairSpec):
        n, oh, ow, oc = _output_shape(spec.second)
        return n, oh, ow, oc + (spec.first.oc if spec.kind == "split" else 0)
    assert isinstance(spec, PoolProjectSpec)
    last = spec.pool if spec.conv_first else spec.conv
    return last.n, last.oh, last.ow, spec.conv.oc


def _array(tensor: Tensor) -> np.ndarray:
    return as_array(tensor.detach().float().contiguous())


class _PlanWriter:
    """Writes the plan of a single operation."""

    def __init__(self, layout: Layout, dtype: str, winograd: bool = False) -> None:
        self._layout, self._dtype, self._winograd = layout, dtype, winograd
        self._buffers: list[Buffer] = []
        self._steps: list[Step] = []
        self._inputs: list[tuple[int, int, int, int]] = []
        self._arena = 0

    def write(self, spec: Spec, params: Params, residual_scale: float) -> Plan:
        first = spec.first if isinstance(spec, PairSpec) else spec
        if isinstance(first, PoolProjectSpec):
            first = first.conv if first.conv_first else first.pool
        x = self._input(first.n, first.h, first.w, first.c)
        y = self._buffer(*_output_shape(spec), "output", 0)
        if isinstance(spec, PairSpec):
            self._pair(spec, params, x, y)
        elif isinstance(spec, PoolProjectSpec):
            self._pool_project(spec, params[0], x, y)
        else:
            assert isinstance(spec, ConvSpec)
            residual = self._input(spec.n, spec.oh, spec.ow, spec.oc) if spec.residual else None
            step = self._conv("conv", spec, params[0], x, y, spec.relu)
            self._steps.append(replace(step, residual=residual, residual_scale=residual_scale))
        return Plan(tuple(self._buffers), tuple(self._steps), tuple(self._inputs), self._arena)

    def _pair(self, spec: PairSpec, params: Params, x: View, y: View) -> None:
        a = spec.first
        chain = spec.kind == "chain"
        by_tiles = any(any(self._tile(part)) for part in (a, spec.second))
        if not by_tiles and cpu.fuses(spec, torch.get_num_threads()):
            middle = self._buffer(a.n, a.oh, a.ow, a.oc, "local", 0)
        else:
            middle = self._scratch(a.n, a.oh, a.ow, a.oc) if chain else View(y.buffer, 0, a.oc)
        first = self._conv("first", a, params[0], x, middle, True)
        y = y if chain else View(y.buffer, a.oc, spec.second.oc)
        second = self._conv("second", spec.second, params[1], middle if chain else x, y, True)
        self._steps.append(PairStep("pair", spec.kind, first, second))

    def _pool_project(self, spec: PoolProjectSpec, params: tuple[Tensor, Tensor, Tensor], x: View, y: View) -> None:
        conv, pool = spec.conv, spec.pool
        if spec.conv_first:
            weight, scale, shift = params
            middle = self._scratch(conv.n, conv.oh, conv.ow, conv.oc, "float32")
            self._steps.append(self._conv("conv", conv, (weight, scale, torch.zeros_like(shift)), x, middle, False))
            self._steps.append(PoolStep("pool", pool, middle, y, shift=_array(shift), relu=True))
        else:
            middle = self._scratch(pool.n, pool.oh, pool.ow, pool.c)
            self._steps.append(PoolStep("pool", pool, x, middle))
            self._steps.append(self._conv("conv", conv, params, middle, y, True))

    def _buffer(self, n: int, h: int, w: int, c: int, kind: str, position: int, dtype: str | None = None) -> View:
        self._buffers.append(Buffer(n, h, w, c, kind, position, dtype or self._dtype))
        return View(len(self._buffers) - 1, 0, c)

    def _scratch(self, n: int, h: int, w: int, c: int, dtype: str | None = None) -> View:
        view = self._buffer(n, h, w, c, "arena", self._arena, dtype)
        self._arena += -(-self._buffers[-1].bytes // ALIGNMENT) * ALIGNMENT
        return view

    def _input(self, n: int, h: int, w: int, c: int) -> View:
        position = len(self._inputs)
        self._inputs.append((n, c, h, w))
        if self._layout[position]:
            return self._buffer(n, h, w, c, "input", position)
        view = self._scratch(n, h, w, c)
        self._steps.append(ImportStep("import", position, view))
        return view

    def _conv(
        self, name: str, spec: ConvSpec, params: tuple[Tensor, Tensor, Tensor], x: View, y: View, relu: bool
    ) -> ConvStep:
        weight, scale, shift = map(_array, params)
        return ConvStep(name, spec, x, weight, scale, shift, (Output(y, relu),), tile=self._tile(spec))

    def _tile(self, spec: ConvSpec) -> tuple[int, int]:
        return cpu.winograd_tile(spec)[0] if self._winograd else cpu.DIRECT
